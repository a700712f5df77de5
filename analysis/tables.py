"""``python -m analysis.tables experiment=NAME``: the paper's tables, and every method at matched cost, on one model.

Methods get settings at which they cost the same (`analysis.matched`), answer the same questions and are compared with
intervals: overall, and on the questions that need the image. What is finished is kept and reused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from analysis import plots
from analysis.markdown import heading, markdown_table, percent_with_limits, published, write_table_page
from analysis.matched import Calibration, methods
from analysis.statistics import cluster_bootstrap, mean_band, percentile_band
from dyvte import distributed
from dyvte.config import command, load_model
from dyvte.data.base import Dataset, Sample, build_dataset
from dyvte.data.metrics import exact_match
from dyvte.errors import ConfigError, DataError
from dyvte.evaluate import policy_digest, reference_labels
from dyvte.flops import plan_decoder_flops
from dyvte.gates.labels import LabelSet
from dyvte.gates.module import Gates, load_gates
from dyvte.mllm import MLLM, Batch
from dyvte.policies.base import Policy, Prefill
from dyvte.policies.compose import Compose
from dyvte.policies.drop import RandomDrop
from dyvte.policies.dynamic_exit import DynamicExit
from dyvte.policies.fastv import FastV
from dyvte.policies.fitprune import FitPrune, Recipe
from dyvte.store import RunFolder, fingerprint

NEEDS_GATES = ("dynamic_exit", "fastv_dynamic_exit")
OF_GATES = ("statuses", "train_on_kinds", "other_gates")
"""Settings of an experiment that only `analysis.gate_tables` reads."""
FROM_REFERENCE = ("none", "fixed_exit")
"""Methods whose answers are in the label set of the full model and every exit already."""
UNPUBLISHED_BUDGET = 0.5
"""Cost, as a share of the full model's, of methods that have no published setting to fall back on."""

Values = npt.NDArray[np.float64]


@command("tables")
def main(cfg: DictConfig) -> None:
    """Make the table that `conf/experiment/` names."""
    tables(cfg)


def tables(cfg: DictConfig) -> dict[str, Any] | None:
    """Run what is missing of an experiment and write its table.

    Returns:
        The summary; None in all processes but the first.

    Raises:
        ConfigError: an unknown method.
    """
    experiment = cfg.experiment
    if experiment.measures == "cost":
        from analysis.cost import cost

        return cost(cfg)
    if experiment.measures == "gates":
        from analysis.gate_tables import gate_table

        return gate_table(cfg)
    mllm, dataset, gates = load_model(cfg), build_dataset(cfg.data), gates_of(cfg)
    reference = reference_labels(mllm, dataset, cfg)
    asked: Any = OmegaConf.to_container(experiment, resolve=True)
    settings = {
        "experiment": {key: value for key, value in asked.items() if key not in OF_GATES},
        "calibration": OmegaConf.to_container(cfg.calibration, resolve=True),
        "gates": None if gates is None else policy_digest(DynamicExit(gates)),
        "max_new_tokens": cfg.max_new_tokens,
    }
    folder = RunFolder.open(cfg.output_dir, fingerprint(mllm, dataset, cfg, **settings), cfg, cfg.overwrite)
    jobs = [job for job in plan(experiment) if job.method not in FROM_REFERENCE]
    todo = [index for index in range(len(jobs)) if not folder.has_shard(index)]
    mine = todo[distributed.rank() :: distributed.world_size()]
    if mine:
        calibration = load_calibration(mllm, cfg)
        batches = list(encoded(mllm, dataset, cfg.batch_size))
        for index in tqdm(mine, desc=experiment.name, unit="run", initial=len(jobs) - len(todo), total=len(jobs)):
            started = time.perf_counter()
            rows, setting = run_job(jobs[index], calibration, gates, batches, cfg.max_new_tokens)
            found = {"answers": rows, "settings": setting}
            folder.write_shard(index, found, num_samples=len(rows), seconds=time.perf_counter() - started)
    distributed.barrier()
    if not distributed.is_main():
        return None
    folder.merge()
    return report(cfg, mllm, folder, reference)


# ------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Job:
    """One method at one budget (None: its published setting), with one seed."""

    method: str
    budget: float | None
    seed: int = 0


def plan(experiment: DictConfig) -> list[Job]:
    """Every run of an experiment, in order."""
    jobs = []
    for budget in experiment.budgets:
        for method in experiment.methods:
            seeds = range(experiment.random_seeds if method.startswith("random") else 1)
            jobs += [Job(method, budget, seed) for seed in seeds]
    return jobs


def encoded(mllm: MLLM, dataset: Dataset, batch_size: int) -> Iterator[tuple[list[Sample], Batch]]:
    """The readable questions of a data set, in batches ready for the model.

    Raises:
        DataError: none can be read.
    """
    samples = list(dataset.readable())  # the others are in the failures of the label set
    if not samples:
        raise DataError("no question can be read")
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        yield part, mllm.encode([each.image for each in part], [each.question for each in part])


def gates_of(cfg: DictConfig) -> Gates | None:
    """The gates that the methods of an experiment need; None where none does.

    Raises:
        ConfigError: an unknown method.
    """
    names = cfg.experiment.methods
    gates = load_gates(cfg.gates) if set(names) & set(NEEDS_GATES) else None
    known = [*FROM_REFERENCE, *methods(gates)]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"unknown method {unknown[0]!r} in experiment {cfg.experiment.name}; choose from {known}")
    return gates


def load_calibration(mllm: MLLM, cfg: DictConfig) -> Calibration:
    """The prompts of `calibration.data`, which settings are chosen on."""
    dataset = build_dataset(cfg.calibration.data)
    return Calibration(mllm, [batch for _, batch in encoded(mllm, dataset, cfg.batch_size)])


def run_job(
    job: Job,
    calibration: Calibration,
    gates: Gates | None,
    batches: Sequence[tuple[list[Sample], Batch]],
    max_new_tokens: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Answers under a method, one row a question (none where it cannot meet the budget), and its setting."""
    policy = policy_at(job.method, job.budget, calibration, gates)
    if isinstance(policy, RandomDrop):
        policy.seed = job.seed
    label = {"method": job.method, "budget": job.budget, "seed": job.seed}
    setting = pd.DataFrame([{**label, "setting": "cannot" if policy is None else describe(policy)}])
    if policy is None:
        columns = [*label, "id", "answer", "correct", "flops_decoder", "exit_layer"]
        return pd.DataFrame(columns=columns), setting
    rows = [
        row for samples, batch in batches for row in answer(calibration.mllm, policy, samples, batch, max_new_tokens)
    ]
    return pd.DataFrame(rows).assign(**label)[[*label, *rows[0]]], setting


def policy_at(method: str, budget: float | None, calibration: Calibration, gates: Gates | None) -> Policy | None:
    """A method at a budget, None where it cannot meet it.

    Without a budget: as its paper or its training set it; the others at half of the full model's cost.
    """
    if budget is None:
        if method == "dynamic_exit" and gates is not None:
            return DynamicExit(gates)
        if method == "fastv":
            return FastV()
        if method == "fastv_dynamic_exit" and gates is not None:
            return Compose([FastV(), DynamicExit(gates, min_layer=FastV().layer + 1)])
        budget = UNPUBLISHED_BUDGET
    return methods(gates)[method](calibration, budget)


@dataclass
class SeenPositions(Policy):
    """Changes nothing; notes which positions every layer runs on.

    Attributes:
        masks: [B, N] of every layer, in the last prefill.
    """

    masks: list[torch.Tensor] = field(default_factory=list, repr=False)

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Note them."""
        if layer == 0:
            self.masks.clear()
        self.masks.append(prefill.kept.clone())


def answer(
    mllm: MLLM, policy: Policy, samples: Sequence[Sample], batch: Batch, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Answers of one batch and the decoder FLOPs of each prefill, from the positions that every layer ran on."""
    seen = SeenPositions()
    with policy(mllm) as run, seen(mllm):
        answers = mllm.decode(mllm.generate_ids(batch, max_new_tokens=max_new_tokens))
        exits, counts = run.exit_layers.tolist(), torch.stack(seen.masks, dim=1).sum(2).tolist()
    return [
        {
            "id": sample.id,
            "answer": text,
            "correct": float("nan") if sample.answer is None else float(exact_match(text, sample.answer)),
            "flops_decoder": float(plan_decoder_flops(mllm.text_config, count)),
            "exit_layer": exit_layer,
        }
        for sample, text, exit_layer, count in zip(samples, answers, exits, counts, strict=True)
    ]


def describe(policy: Policy) -> str:
    """The settings of a policy in a few words."""
    if isinstance(policy, Compose):
        return "; ".join(f"{type(each).__name__} {describe(each)}" for each in policy.policies)
    if isinstance(policy, FitPrune):
        assert isinstance(policy.recipe, Recipe)
        return f"alpha={policy.recipe.alpha:.3g}"
    shown = {}
    for each in fields(policy):
        value = getattr(policy, each.name) if not each.name.startswith("_") else None
        if isinstance(value, (int, float, str)) and each.name != "seed" and value is not False:
            shown[each.name] = f"{value:.3g}" if isinstance(value, float) else value
    return " ".join(f"{name}={value}" for name, value in shown.items())


# ------------------------------------------------------------------------------ report


@dataclass(frozen=True)
class Outcome:
    """What a method came to on n questions; for methods of several seeds the mean over them, question by question."""

    method: str
    budget: float | None
    setting: str
    correct: Values
    agree: Values
    cost: Values
    exit_layer: Values
    num_seeds: int
    seed_range: tuple[float, float] | None


def outcomes(folder: RunFolder, reference: LabelSet, experiment: DictConfig) -> list[Outcome]:
    """Every method at every budget, the full model first; those that cannot meet a budget are left out."""
    position = pd.Series(np.arange(len(reference)), index=reference.samples["id"])
    full_answer = reference.samples["answer"].to_numpy()
    full_flops = float(reference.flops[:, -1].double().mean())
    answers, settings = folder.read_table("answers"), folder.read_table("settings")
    found = [_from_reference(reference, "none", 1.0)] if "none" in experiment.methods else []
    for budget in experiment.budgets:
        if "fixed_exit" in experiment.methods and budget is not None:
            fixed = _from_reference(reference, "fixed_exit", budget)
            found += [] if fixed is None else [fixed]
        for method in experiment.methods:
            wanted = answers["budget"].isna() if budget is None else answers["budget"] == budget
            rows = answers[wanted & (answers["method"] == method)]
            if rows.empty:
                continue
            runs = []
            for _, one in rows.groupby("seed"):
                ordered = one.iloc[np.argsort(position.loc[one["id"]].to_numpy())]
                agree = (ordered["answer"].to_numpy() == full_answer).astype(float)
                columns = [ordered[name].to_numpy(dtype=float) for name in ("correct", "flops_decoder", "exit_layer")]
                runs.append([columns[0], agree, columns[1] / full_flops, columns[2]])
            mean = np.mean(runs, axis=0)
            by_seed = [float(np.nanmean(each[0])) for each in runs]
            same = settings["budget"].isna() if budget is None else settings["budget"] == budget
            setting = str(settings[same & (settings["method"] == method)]["setting"].iloc[0])
            spread = (min(by_seed), max(by_seed)) if len(runs) > 1 else None
            found.append(Outcome(method, budget, setting, *mean, num_seeds=len(runs), seed_range=spread))
    return [each for each in found if each is not None]


def _from_reference(reference: LabelSet, method: str, budget: float) -> Outcome | None:
    """The full model, or the mixture of two neighbouring fixed exits that costs exactly the budget on average."""
    costs = (reference.flops.double() / reference.flops[:, -1].double().mean()).numpy()
    mean = costs.mean(0)
    if budget < mean[0]:
        return None
    upper = int(np.searchsorted(mean, budget - 1e-9).clip(1, len(mean) - 1))
    share = float((budget - mean[upper - 1]) / (mean[upper] - mean[upper - 1]))
    share = min(max(share, 0.0), 1.0)

    def mixed(table: Values) -> Values:
        return (1 - share) * table[:, upper - 1] + share * table[:, upper]

    layers = np.broadcast_to(np.arange(costs.shape[1], dtype=float), costs.shape)
    correct, agree = reference.correct.double().numpy(), reference.agree.double().numpy()
    setting = "" if method == "none" else f"layer={upper - 1 + share:.2f} (mixture)"
    exits = [mixed(each) for each in (correct, agree, costs, layers)]
    return Outcome(method, None if method == "none" else budget, setting, *exits, num_seeds=1, seed_range=None)


def report(cfg: DictConfig, mllm: MLLM, folder: RunFolder, reference: LabelSet) -> dict[str, Any]:
    """Write the table (Parquet, CSV, Markdown), the figure and the summary."""
    images = reference.samples["image_id"].tolist()
    kinds = reference.samples["kind"].astype(str).to_numpy()
    needs_image = ~reference.agree[:, 0].numpy()
    found = outcomes(folder, reference, cfg.experiment)
    if not found:
        raise ConfigError(f"experiment {cfg.experiment.name}: no method can meet any of its budgets")
    subsets = {"accuracy": np.ones(len(images), dtype=bool), "accuracy_needs_image": needs_image}
    rows = [_row(each, subsets, images, cfg) for each in found]
    table = pd.DataFrame(rows)
    folder.write_table("comparison", table)
    by_kind = pd.DataFrame(
        [
            {"method": each.method, "budget": each.budget}
            | {kind: float(np.nanmean(each.correct[kinds == kind])) for kind in sorted(set(kinds))}
            for each in found
        ]
    )
    folder.write_table("kinds", by_kind)
    verdicts = [verdict for name, chosen in subsets.items() for verdict in _verdicts(found, name, chosen, images, cfg)]
    note = (
        f"{len(images)} questions about {len(set(images))} images ({int(needs_image.sum())} need the image: without it "
        "the model answers otherwise); intervals 95%, bootstrap over images"
    )
    with plots.style():
        folder.save_figure("accuracy_against_cost", figure(table, note))
    write_table_page(folder, markdown(cfg, table, by_kind, verdicts, note))
    return folder.write_summary(
        model=cfg.model.name,
        data=cfg.data.name,
        num_layers=mllm.num_layers,
        num_samples=len(images),
        experiment=cfg.experiment.name,
        needs_image=int(needs_image.sum()),
        rows=table.to_dict("records"),
        verdicts=verdicts,
    )


def _row(
    each: Outcome, subsets: Mapping[str, npt.NDArray[np.bool_]], images: list[Any], cfg: DictConfig
) -> dict[str, Any]:
    row: dict[str, Any] = {"method": each.method, "budget": each.budget, "cost": float(each.cost.mean())}
    for name, chosen in subsets.items():
        if chosen.any():
            kept = [image for image, wanted in zip(images, chosen, strict=True) if wanted]
            band = mean_band(each.correct[chosen], kept, n_boot=cfg.bootstrap, seed=cfg.seed)
            row |= {name: float(band.mean), f"{name}_low": float(band.low), f"{name}_high": float(band.high)}
        else:
            row |= dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    low, high = each.seed_range or (float("nan"), float("nan"))
    return row | {
        "agreement": float(each.agree.mean()),
        "mean_exit_layer": float(each.exit_layer.mean()),
        "setting": each.setting,
        "seeds": each.num_seeds,
        "worst_seed": low,
        "best_seed": high,
    }


def _verdicts(
    found: Sequence[Outcome], name: str, chosen: npt.NDArray[np.bool_], images: list[Any], cfg: DictConfig
) -> list[dict[str, Any]]:
    """At each budget the most accurate method, and those that it cannot be told apart from (paired differences)."""
    kept = [image for image, wanted in zip(images, chosen, strict=True) if wanted]
    verdicts = []
    for budget in cfg.experiment.budgets:
        rivals = [each for each in found if each.budget == budget and each.method != "none"]
        if budget is None or len(rivals) < 2 or not kept:
            continue
        best = max(rivals, key=lambda each: float(np.nanmean(each.correct[chosen])))
        differences = {}
        for other in rivals:
            if other is not best:
                values = (best.correct - other.correct)[chosen]
                band = percentile_band(np.nanmean(values), cluster_bootstrap(values, kept, cfg.bootstrap, cfg.seed))
                differences[other.method] = [float(band.mean), float(band.low), float(band.high)]
        tied = [method for method, (_, low, _) in differences.items() if low <= 0]
        verdicts.append(
            {"on": name, "budget": budget, "ahead": best.method, "not_told_apart": tied, "lead": differences}
        )
    return verdicts


LABELS = {
    "none": "full model",
    "fixed_exit": "fixed exit",
    "vtw": "VTW",
    "fastv": "FastV",
    "pyramid_drop": "PyramidDrop",
    "tome": "ToMe",
    "fitprune": "FitPrune",
    "divprune": "DivPrune",
    "uniform": "uniform",
    "random": "random",
    "random_stratified": "random, stratified",
    "dynamic_exit": "dynamic exit",
    "fastv_dynamic_exit": "FastV + dynamic exit",
}


def markdown(
    cfg: DictConfig, table: pd.DataFrame, by_kind: pd.DataFrame, verdicts: Sequence[Mapping[str, Any]], note: str
) -> list[str]:
    """The lines of the page to put into a document."""
    head = ["budget", "method", "decoder FLOPs", "accuracy", "accuracy, image needed", "same answer as full model"]
    rows = [
        [
            _budget(row),
            LABELS[row["method"]],
            f"{row['cost']:.3f}",
            percent_with_limits(row, "accuracy"),
            percent_with_limits(row, "accuracy_needs_image"),
            f"{100 * row['agreement']:.1f}",
            row["setting"],
        ]
        for row in table.to_dict("records")
    ]
    lines = [*heading(cfg, note), *markdown_table([*head, "setting"], rows)]
    lines += ["", *[_sentence(each) for each in verdicts]]
    if cfg.experiment.by_kind:
        names = [name for name in by_kind.columns if name not in ("method", "budget")]
        rows = [
            [_budget(row), LABELS[row["method"]], *(f"{100 * row[name]:.1f}" for name in names)]
            for row in by_kind.to_dict("records")
        ]
        lines += ["", *markdown_table(["budget", "method", *names], rows)]
    return [*lines, *published(cfg.experiment)]


def _budget(row: Mapping[str, Any]) -> str:
    return "" if row["budget"] is None or np.isnan(row["budget"]) else f"{row['budget']:g}"


def _sentence(verdict: Mapping[str, Any]) -> str:
    where = "overall" if verdict["on"] == "accuracy" else "where the image is needed"
    tied = [LABELS[each] for each in verdict["not_told_apart"]]
    told = f"not told apart from it: {', '.join(tied)}" if tied else "ahead of all others"
    return f"- Budget {verdict['budget']:g}, {where}: {LABELS[verdict['ahead']]} is most accurate, {told}."


def figure(table: pd.DataFrame, note: str) -> Figure:
    """Accuracy against cost, one line a method: overall, and where the image is needed."""
    drawing, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharex=True, layout="constrained")
    titles = {"accuracy": "all questions", "accuracy_needs_image": "questions that need the image"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for index, (method, rows) in enumerate(table.groupby("method", sort=False)):
            rows = rows.sort_values("cost")
            series = plots.CYCLE[index % len(plots.CYCLE)]
            error = np.stack([rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]]).clip(min=0)
            axis.errorbar(
                rows["cost"],
                100 * rows[name],
                yerr=100 * error,
                label=LABELS[str(method)],
                color=series.color,
                linestyle=series.linestyle,
                marker=series.marker if index < len(plots.CYCLE) else f"${index}$",
                capsize=2,
                elinewidth=0.8,
            )
        axis.set(title=title, xlabel="decoder FLOPs of the prefill (full model = 1)", ylabel="accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=5)
    drawing.suptitle(note, fontsize=8)
    return drawing


if __name__ == "__main__":
    main()
