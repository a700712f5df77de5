"""``python -m analysis.kept_positions``: which places of the image each method keeps.

Methods get settings of the same cost (`dyvte.policies.method`) and run on the same questions; one that cannot meet it
runs as its paper or its defaults have it, and is marked. A map says in which share of the questions, and of the layers
that a method has thinned, a place is still seen. Position bias is twice the mean place less one: -1 for the first token
alone, 1 for the last, 0 without a preference. Ranking by attention is known to favour late places, whose tokens are
nearest to the question. A matrix says how far every two methods keep the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dyvte.batch import Batch
from dyvte.cost.spent import SeenPositions
from dyvte.data.base import Sample, build_dataset
from dyvte.errors import ConfigError, DataError
from dyvte.instrument.views import View, view
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.method import Calibration
from dyvte.policies.registry import labels, methods
from dyvte.runs import distributed
from dyvte.runs.config import command, load_model
from dyvte.runs.store import RunFolder, fingerprint
from dyvte.runs.terminal import progress

from .measuring.methods import ALL, describe, encoded, known_methods, load_calibration
from .measuring.runs import fill_shards, run_facts
from .plots.style import figure_style
from .statistics.bands import ImageBootstrap, percentile_band

COLUMNS = 5
BRIGHTEST = 2.0
"""Where maps are white: a place that is seen this many times as often as the method's mean place, or more."""


@command("kept_positions")
def main(cfg: DictConfig) -> str | None:
    """Draw the maps that `conf/kept_positions.yaml` asks for."""
    summary = kept_positions(cfg)
    return places_in_words(summary["methods"]) if summary else None


def kept_positions(cfg: DictConfig) -> dict[str, Any] | None:
    """Run every method over the questions; write maps and summary. None in all processes but the first."""
    mllm, dataset = load_model(cfg), build_dataset(cfg.data)
    thinning = [name for name, method in methods().items() if method.acts == "thins"]
    cfg.methods = thinning if cfg.methods == ALL else known_methods(cfg.methods, "methods")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = {key: plain[key] for key in ("methods", "budget", "calibration")}
    folder = RunFolder.open(cfg.output_dir, fingerprint(mllm, dataset, cfg, **settings), cfg, cfg.overwrite)
    if not distributed.is_main():
        return None
    batches = list(encoded(mllm, dataset, cfg.batch_size))
    grid, chosen = common_grid(mllm, [sample for samples, _ in batches for sample in samples])
    calibration = load_calibration(mllm, cfg)

    def kept_by(name: str) -> tuple[dict[str, pd.DataFrame], int]:
        at_budget = methods()[name].at_cost(calibration, cfg.budget)
        policy = at_budget or own_setting(methods()[name], calibration)
        rows = [] if policy is None else places(mllm, policy, batches, chosen)
        setting = {"method": name, "setting": "cannot" if policy is None else describe(policy)}
        tables = {"settings": pd.DataFrame([{**setting, "at_budget": at_budget is not None}])}
        if rows:
            mean = np.stack([json.loads(each["share"]) for each in rows]).mean(0)
            tables["places"] = pd.DataFrame(rows).assign(method=name)
            tables["maps"] = pd.DataFrame({"method": name, "place": np.arange(len(mean)), "share": mean})
        return tables, len(rows)

    fill_shards(folder, progress("kept positions", "methods", cfg.methods), kept_by)
    return report(cfg, mllm, folder, grid, len(chosen))


def own_setting(method: type[Policy], calibration: Calibration) -> Policy | None:
    """A thinning method as its paper or else its defaults have it; None for an exit, or where a setting has neither."""
    if method.acts != "thins":
        return None
    if (published := method.published(calibration)) is not None:
        return published
    complete = all(each.default is not MISSING or each.default_factory is not MISSING for each in fields(method))
    return method() if complete else None


@torch.no_grad()
def kept_by_layer(mllm: MLLM, batch: Batch, policy: Policy) -> list[Tensor]:
    """Of every row [L, V]: whether layer l sees visual token v."""
    seen = SeenPositions()
    with policy(mllm), seen(mllm):
        mllm.model(**batch, use_cache=False, logits_to_keep=1)
    kept = torch.stack(seen.masks, dim=1).cpu()
    return [kept[row][:, visual] for row, visual in enumerate(batch.layout.visual.cpu())]


def share_kept(kept: Tensor) -> Tensor | None:
    """[V] share of the thinned layers, which see some and not all of `kept` [L, V], that see each; None without any."""
    thinned = kept.any(1) & ~kept.all(1)
    return kept[thinned].double().mean(0) if thinned.any() else None


def mean_place(share: Tensor) -> float:
    """Mean number of the places, 0 for the first visual token and 1 for the last, weighted by `share` [V]."""
    place = torch.linspace(0, 1, len(share), dtype=share.dtype)
    return float((place * share).sum() / share.sum())


def common_grid(mllm: MLLM, samples: Sequence[Sample]) -> tuple[View, set[str]]:
    """The most frequent arrangement of visual tokens, and the ids of the samples that have it."""
    by_shape: dict[tuple[int, int], dict[str, View]] = {}
    for sample in (each for each in samples if each.image is not None):
        if (found := view(mllm, mllm.encode([sample.image], [sample.question]))) is not None:
            by_shape.setdefault((found.rows, found.columns), {})[sample.id] = found
    if not by_shape:
        raise DataError("no question shows an image whose visual tokens lie on one grid")
    chosen = max(by_shape.values(), key=len)
    return next(iter(chosen.values())), set(chosen)


def overlap(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """How far two methods keep the same tokens: 1 if always, 0 if as often as by chance, below if they avoid it.

    The mean over questions of sum min(a, b), less what tokens drawn at random in the same numbers share, as a part of
    the most that it could be. Both are [n, V] shares of the thinned layers that see each visual token.
    """
    shared = np.minimum(first, second).sum(1)
    most = np.minimum(first.sum(1), second.sum(1))
    # of tokens drawn independently: the mean over all pairs of places
    chance = np.array([np.minimum.outer(a, b).mean() * len(a) for a, b in zip(first, second, strict=True)])
    room = most - chance
    return float(np.mean((shared - chance)[room > 0] / room[room > 0])) if (room > 0).any() else np.nan


def overlaps(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """`overlap` of every two methods, over the questions that both thin."""
    of_method = {name: rows.set_index("id")["share"].map(json.loads) for name, rows in table.groupby("method")}

    def shared(one: str, other: str) -> float:
        ids = of_method[one].index.intersection(of_method[other].index)
        return overlap(*(np.stack(of_method[name].loc[ids].to_list()) for name in (one, other))) if len(ids) else np.nan

    return pd.DataFrame([[shared(one, other) for other in names] for one in names], names, names)


def places(
    mllm: MLLM, policy: Policy, batches: Sequence[tuple[list[Sample], Batch]], chosen: set[str]
) -> list[dict[str, Any]]:
    """One row a question: the mean place that the policy keeps, and the share of every place."""
    rows = []
    for samples, batch in batches:
        for sample, kept in zip(samples, kept_by_layer(mllm, batch, policy), strict=True):
            if sample.id in chosen and (share := share_kept(kept)) is not None:
                row: dict[str, Any] = {"id": sample.id, "image_id": sample.image_id, "mean_place": mean_place(share)}
                rows.append(row | {"kept": float(share.mean()), "share": json.dumps(share.tolist())})
    return rows


def report(cfg: DictConfig, mllm: MLLM, folder: RunFolder, grid: View, num_questions: int) -> dict[str, Any]:
    """Maps and mean places with intervals, of every method that thins a layer."""
    settings: Any = folder.read_table("settings").set_index("method").to_dict("index")
    if not (folder.path / "places.parquet").is_file():
        raise ConfigError(f"at budget={cfg.budget} no method lets a layer see some and not all visual tokens")
    table, maps = folder.read_table("places"), folder.read_table("maps").groupby("method")["share"]
    found: list[dict[str, Any]] = []
    for name, rows in table.groupby("method", sort=False):  # in the order of `cfg.methods`, as their shards are
        bootstrap = ImageBootstrap(rows["image_id"].to_numpy(), cfg.bootstrap, cfg.seed)
        band = percentile_band(*bootstrap.mean(rows["mean_place"]))
        mean, low, high = map(float, (band.mean, band.low, band.high))
        found.append(
            {
                "method": name,
                **settings[name],
                "questions": len(rows),
                "kept": float(rows["kept"].mean()),
                "mean_place": mean,
                "mean_place_ci": [low, high],
                "position_bias": 2 * mean - 1,
                "preference": preference(low, high),
                "map": grid.arrange(torch.tensor(maps.get_group(name).to_numpy(copy=True))).tolist(),
            }
        )
    shared = overlaps(table, [each["method"] for each in found])
    folder.write_table("overlap", shared.rename_axis("method").reset_index())
    title = (
        f"{cfg.model.name} on {cfg.data.name}, {num_questions} questions; bias: -1 the first visual token, 1 the last; "
        "intervals 95%, bootstrap over images"
    )
    with figure_style():
        path = folder.save_figure("kept_positions", figure(found, title))
        matrix = folder.save_figure("overlap", overlap_figure(shared.rename(labels())))
    summary = folder.write_summary(
        **run_facts(cfg, mllm),
        num_samples=num_questions,
        budget=cfg.budget,
        grid=[grid.rows, grid.columns],
        methods=found,
        overlap=shared.to_dict("index"),
    )
    for each in found:
        low, high = each["mean_place_ci"]
        print(
            f"{labels()[each['method']]:>20}  keeps {100 * each['kept']:3.0f}%, mean place {each['mean_place']:.3f} "
            f"[{low:.3f}, {high:.3f}]: {each['preference']}{'' if each['at_budget'] else ' (at a cost of its own)'}"
        )
    print(f"overlap: {matrix}\nfigure: {path}")
    return summary


def overlap_figure(shared: pd.DataFrame) -> Figure:
    """The matrix of overlaps, with its numbers; rows are called by the methods' labels."""
    side, names = 1.8 + 0.34 * len(shared), shared.index
    drawing, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow(shared, cmap="RdBu", vmin=-1, vmax=1)
    for (row, column), value in np.ndenumerate(shared.to_numpy()):
        if row != column:
            ink = "white" if abs(value) > 0.55 else "black"  # on the dark ends of the colours
            shown = f"{value:.2f}".replace("0.", ".")
            axis.text(column, row, shown, ha="center", va="center", fontsize=6, color=ink)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_title("Tokens that two methods both keep:\n1 as many as can be, 0 as by chance", fontsize=max(8, side))
    return drawing


def preference(low: float, high: float) -> str:
    """What an interval of the mean place says; it has no width where a method never looks at the question."""
    if high - low < 1e-6:
        return "the same places for every question"
    if low > 0.5:
        return "late places"
    return "early places" if high < 0.5 else "no preference shown"


def places_in_words(found: Sequence[Mapping[str, Any]]) -> str:
    """How many methods keep late or early places, which is no property of the question."""
    said = []
    for which, furthest in (("late", max), ("early", min)):
        some = [each for each in found if each["preference"] == f"{which} places"]
        if some:
            most = furthest(some, key=lambda each: each["mean_place"])
            said.append(f"{len(some)} of {len(found)} methods keep {which} places, {labels()[most['method']]} most")
    prefer = "; ".join(said) or "no method prefers early or late places"
    return f"{prefer} (the first visual token is at 0, the last at 1, and the mean of all at 0.5)."


def figure(found: Sequence[dict[str, Any]], title: str) -> Figure:
    """One map a method: how often a place is seen, relative to the method's own mean."""
    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    drawing, axes = plt.subplots(
        lines, columns, figsize=(2.2 * columns + 0.2, 2.5 * lines + 0.9), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, each in zip(axes.flat, found, strict=False):
        values = np.asarray(each["map"]) / np.mean(each["map"])
        shown = axis.imshow(values, cmap="gray", vmin=0, vmax=BRIGHTEST, interpolation="nearest")
        axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, clip_on=False, edgecolor="gray"))
        low, high = (2 * place - 1 for place in each["mean_place_ci"])
        axis.set_title(
            f"{labels()[each['method']]}{'' if each['at_budget'] else '*'}, keeps {100 * each['kept']:.0f}%\n"
            f"bias {each['position_bias']:+.2f} [{low:+.2f}, {high:+.2f}]",
            fontsize=8,
        )
    label = "how often a place is seen (mean of the method = 1)"
    bar = {"location": "bottom", "shrink": 0.5, "aspect": 40, "fraction": 0.02, "pad": 0.01}  # a line of the figure
    drawing.colorbar(shown, ax=axes, extend="max", label=label, **bar)
    if not all(each["at_budget"] for each in found):
        title += "; * at a cost of its own"
    drawing.suptitle(title, fontsize=8)
    return drawing


if __name__ == "__main__":
    main()
