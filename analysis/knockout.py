"""Paths through attention cut in windows of layers: `python -m analysis.knockout`.

For every path and window: how many answers change, by how much log p(answer) and the first token's probability fall;
the same with the image's keys and values replaced, with as many random keys cut, and with text that gets as much
attention as the image; and the entry x exit map
(`docs/causes.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from omegaconf import DictConfig, OmegaConf

from dyvte.data import Dataset, build_dataset
from dyvte.errors import ConfigError
from dyvte.instrument.causal import all_windows
from dyvte.instrument.causal.knockout import check_cuts
from dyvte.mllm import MLLM
from dyvte.runs import store
from dyvte.runs.config import command, load_model

from .measuring.key_sets import knows_targets
from .measuring.knockout import KnockoutMeasurement
from .measuring.runs import finish_run, measure_dataset, run_facts
from .plots import causal as plots
from .statistics.bands import LEVEL, MIN_CLUSTERS, Band, ImageBootstrap, bands_to_dict
from .statistics.causal import effect_bands, mass_reached, over_control, sample_effects


@command("knockout")
def main(cfg: DictConfig) -> str | None:
    """Measure, summarise and draw; continues where an earlier run of the same command was stopped."""
    dataset = build_dataset(cfg.data)
    summary = run(cfg, load_model(cfg), dataset)
    return worst_cut_in_words(summary) if summary else None


def run(cfg: DictConfig, mllm: MLLM, dataset: Dataset) -> dict[str, Any] | None:
    """The command with a model and data that are loaded already; None in processes other than the main one."""
    check_cuts(mllm)
    known = cfg.objects is not False and knows_targets(dataset)
    if cfg.objects and not known:
        raise ConfigError(f"objects=true: data={cfg.data.name} does not say which objects an answer rests on")
    measure = KnockoutMeasurement.of(mllm, cfg, known)
    for mode in cfg.replace:
        check_cuts(mllm, mode)
    names = ("max_new_tokens", "width", "windows", "paths", "replace", "control", "splits", "entry_exit")
    settings: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(names)))
    settings["objects"] = known
    settings |= {"equal_mass": True} if measure.of_equal_mass else {}
    folder = measure_dataset(cfg, mllm, dataset, measure, **settings)
    return None if folder is None else summarise(cfg, folder, measure)


def summarise(cfg: DictConfig, folder: store.RunFolder, measure: KnockoutMeasurement) -> dict[str, Any]:
    """Everything that follows from the tables: bands, figures, summary."""
    samples = counted_samples(folder, cfg.only_right)
    if samples.empty:
        raise ConfigError(
            f"no question of data={cfg.data.name} has an image"
            + (" and a right answer (only_right=true)" if cfg.only_right else "")
        )
    ids, bootstrap = samples["id"].to_numpy(), ImageBootstrap(samples["image_id"].to_numpy(), cfg.bootstrap, cfg.seed)
    effects = sample_effects(folder.read_table("knockouts"), ids, "cut", "window")
    windows = all_windows(measure.mllm.num_layers)
    entry_exit = {}
    if cfg.entry_exit:
        table = folder.read_table("entry_exit")
        number = {window: index for index, window in enumerate(windows)}
        places = [number[pair] for pair in zip(table["start"], table["stop"], strict=True)]
        entry_exit = sample_effects(table.assign(window=places), ids, "window")
    names = [cut.name for cut in measure.cuts]

    kinds = samples["kind"].astype(str).to_numpy()
    masks = {"all": np.ones(len(samples), bool)} | {kind: kinds == kind for kind in sorted(set(kinds) - {"all"})}
    bands, groups = {}, {}
    for name, mask in masks.items():
        # A bootstrap over a few images means nothing: such kinds are left out. Data without kinds call theirs "all".
        among = bootstrap[mask]
        if name != "all" and among.num_images < MIN_CLUSTERS:
            continue
        bands[name], of_map = (
            effect_bands({key: each[mask] for key, each in values.items()}, among) for values in (effects, entry_exit)
        )
        groups[name] = {
            **among.counts(),
            "effects": {
                cut: bands_to_dict({key: band[i] for key, band in bands[name].items()}) for i, cut in enumerate(names)
            },
            "entry_exit": bands_to_dict(of_map) or None,
        }
    folder.write_table("curves", curves_table(bands, names, measure.windows))
    content = {
        **run_facts(cfg, measure.mllm),
        "num_questions": len(samples),
        "num_images": bootstrap.num_images,
        "accuracy": samples["right"].mean() if samples["right"].notna().any() else None,
        "only_right": cfg.only_right,
        "width": max(stop - start for start, stop in measure.windows),
        "windows": measure.windows,
        "splits": measure.splits,
        "entry_exit_windows": windows if cfg.entry_exit else None,
        "overall": groups.pop("all"),
        "kinds": groups,
        "over_control": over_control(effects, names, bootstrap),
        "mass_reached": mass_reached(folder.read_table("equal_mass"), ids) if measure.of_equal_mass else {},
        "settings": {"level": LEVEL, "bootstrap": cfg.bootstrap},
    }
    return finish_run(folder, content, draw, outline)


def counted_samples(folder: store.RunFolder, only_right: bool) -> pd.DataFrame:
    """The questions of a run with an image and, with `only_right`, a right answer of the full model."""
    samples = folder.read_table("samples")
    counted = samples["visual_tokens"] > 0
    return samples[counted & samples["right"].fillna(False).astype(bool) if only_right else counted]


def curves_table(
    groups: Mapping[str, Mapping[str, Band]], names: list[str], windows: list[tuple[int, int]]
) -> pd.DataFrame:
    """One row a group, path, window and measure."""
    return pd.DataFrame(
        [
            {"group": group_name, "name": name, "start": start, "stop": stop, "measure": measure}
            | band[cut, window].to_dict()
            for group_name, group in groups.items()
            for measure, band in group.items()
            for cut, name in enumerate(names)
            for window, (start, stop) in enumerate(windows)
        ]
    )


def draw(summary: Mapping[str, Any]) -> dict[str, plt.Figure]:
    """All figures, by file name, from what `summary.json` will say."""
    effects = summary["overall"]["effects"]
    figures = {"knockout": plots.draw_knockouts(summary)}
    image = "instruction->visual"
    if image in effects and any(f"{image} ({what})" in effects for what in ("mean", "swap")):
        figures["replacement"] = plots.draw_replacements(summary)
    if any(f"({what})" in name for name in effects for what in plots.CONTROLS):
        figures["controls"] = plots.draw_controls(summary)
    if any("(objects)" in name for name in effects):
        figures["objects"] = plots.draw_objects(summary)
    if summary["overall"]["entry_exit"]:
        figures["entry_exit"] = plots.draw_entry_exit(summary)
    if len(summary["kinds"]) > 1:
        figures["kinds"] = plots.draw_knockouts_by_kind(summary)
    return figures


def outline(summary: Mapping[str, Any]) -> str:
    """For each path the windows that matter most, for the terminal."""
    lines = [f"windows of up to {summary['width']} layers; change in answers (percentage points), most harmful window"]
    for name, (layers, mean, low, high) in worst_windows(summary).items():
        lines.append(f"  {name:32} {layers}: {mean:6.1f} [{low:.1f}, {high:.1f}]")
    return "\n".join(lines)


def worst_windows(summary: Mapping[str, Any]) -> dict[str, tuple[str, float, float, float]]:
    """For each path its most harmful window and what it does to the answers, in percentage points with limits."""
    found = {}
    for name, measures in summary["overall"]["effects"].items():
        band = measures["agreement_points"]
        worst = int(np.nanargmin(np.array(band["mean"], dtype=float)))
        start, stop = summary["windows"][worst]
        found[name] = (f"layers {start}-{stop - 1}", *(band[part][worst] for part in ("mean", "low", "high")))
    return found


SPOKEN = {
    "system": "the system prompt",
    "visual": "the image",
    "question": "the question",
    "last": "the last token and the answer",
    "instruction": "the text after the image",
}
"""What the groups of positions are in a sentence."""


def worst_cut_in_words(summary: Mapping[str, Any]) -> str:
    """Which path and layers the answers need most."""
    paths = {name: found for name, found in worst_windows(summary).items() if "(" not in name}  # without controls
    name, (layers, mean, low, high) = min((paths or worst_windows(summary)).items(), key=lambda each: each[1][1])
    queries, _, keys = name.partition("->")
    if high >= 0:
        return "No path through attention is needed in any window: no cut changes the answers beyond chance."
    return (
        f"The answers need {SPOKEN[queries]} to read {SPOKEN[keys]} in {layers} most: cut there, {-mean:.1f}% change "
        f"[{-high:.1f}, {-low:.1f}]."
    )


if __name__ == "__main__":
    main()
