"""``python -m analysis.tables experiment=NAME``: the paper's tables, and every method at matched cost, on one model.

Methods get settings at which they cost the same (`analysis.matched`), answer the same questions and are compared with
intervals: overall, and on the questions that need the image. What is finished is kept and reused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from analysis import plots
from analysis.markdown import heading, markdown_table, percent_with_limits, published, write_table_page
from analysis.matched import Calibration, deciding_cost, kl_layers, methods
from analysis.pairwise import Contest, Values, pairs_of, seeded_bootstrap, standings
from analysis.plots_methods import methods_at_cost
from analysis.statistics import percentile_band
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
FROM_REFERENCE = ("none", "fixed_exit", "vtw")
"""Methods whose answers are in the label set of the full model and every exit already."""
UNPUBLISHED_BUDGET = 0.5
"""Cost, as a share of the full model's, of methods that have no published setting to fall back on."""


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
    jobs = plan(experiment)
    mine = range(distributed.rank(), len(jobs), distributed.world_size())
    todo = [index for index in mine if not folder.has_shard(index)]
    if todo:
        batches = list(encoded(mllm, dataset, cfg.batch_size))
        calibration = load_calibration(mllm, cfg)
        calibration.asked = Calibration(mllm, [batch for _, batch in batches])
        progress = {"initial": len(mine) - len(todo), "total": len(mine), "disable": not distributed.is_main()}
        for index in tqdm(todo, desc=experiment.name, unit="run", **progress):
            started = time.perf_counter()
            found = run_job(jobs[index], calibration, gates, batches, cfg.max_new_tokens)
            folder.write_shard(index, found, num_samples=len(dataset), seconds=time.perf_counter() - started)
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
    """Every run of an experiment, in order; of VTW the divergence that its layers follow from, once."""
    jobs = [Job("vtw", None)] if "vtw" in experiment.methods else []
    for budget in experiment.budgets:
        for method in experiment.methods:
            if method not in FROM_REFERENCE:
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
        ConfigError: no method, or an unknown one.
    """
    names = cfg.experiment.methods
    gates = load_gates(cfg.gates) if set(names) & set(NEEDS_GATES) else None
    known = [*FROM_REFERENCE, *methods(gates)]
    if not names:
        raise ConfigError(f"experiment {cfg.experiment.name} names no method; choose experiment.methods from {known}")
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
) -> dict[str, pd.DataFrame]:
    """Tables of a run: `answers`, one row a question (none where the budget cannot be met), and `settings`.

    Of VTW, whose answers are there already: `divergence`.
    """
    if job.method == "vtw":
        kl = calibration.divergence.tolist()
        return {"divergence": pd.DataFrame({"exit_layer": range(len(kl)), "kl": kl})}
    policy = policy_at(job.method, job.budget, calibration, gates)
    if isinstance(policy, RandomDrop):
        policy.seed = job.seed
    label = {"method": job.method, "budget": job.budget, "seed": job.seed}
    if policy is None:
        columns = [*label, "id", "answer", "correct", "flops_decoder", "exit_layer"]
        return {"answers": pd.DataFrame(columns=columns), "settings": pd.DataFrame([{**label, "setting": "cannot"}])}
    rows = [
        row for samples, batch in batches for row in answer(calibration.mllm, policy, samples, batch, max_new_tokens)
    ]
    deciding = deciding_cost(calibration, policy) if job.seed == 0 else 0.0
    return {
        "answers": pd.DataFrame(rows).assign(**label)[[*label, *rows[0]]],
        "settings": pd.DataFrame([{**label, "setting": describe(policy), "deciding": deciding}]),
    }


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
    """What a method came to on n questions.

    Attributes:
        method: its name.
        budget: the cost that it was set to, None for its published setting.
        setting: in a few words.
        correct: [n, seeds] whether each question is answered right.
        agree: [n] whether the answer is the full model's, the mean over seeds.
        cost: [n] decoder FLOPs of the prefill over the full model's mean.
        exit_layer: [n] layers that saw the image.
        deciding: cost of choosing tokens or layers, on the same scale, which `cost` leaves out.
    """

    method: str
    budget: float | None
    setting: str
    correct: Values
    agree: Values
    cost: Values
    exit_layer: Values
    deciding: float = 0.0


def outcomes(folder: RunFolder, reference: LabelSet, experiment: DictConfig) -> list[Outcome]:
    """Every method at every budget, the full model first; those that cannot meet a budget are left out."""
    names = experiment.methods
    layers = {"fixed_exit": list(range(reference.num_layers + 1))}
    if "vtw" in names:
        layers["vtw"] = kl_layers(folder.read_table("divergence")["kl"].tolist())
    found = [exit_mixture(reference, "none", None, [reference.num_layers])] if "none" in names else []
    ran = any(job.method not in FROM_REFERENCE for job in plan(experiment))
    answers, settings = (folder.read_table(name) for name in ("answers", "settings")) if ran else (None, None)
    for budget in experiment.budgets:
        for method in names:
            if method in layers and not (method == "fixed_exit" and budget is None):
                found.append(exit_mixture(reference, method, budget, layers[method]))
            elif method not in FROM_REFERENCE:
                assert answers is not None
                assert settings is not None
                found.append(_from_runs(reference, method, budget, answers, settings))
    return [each for each in found if each is not None]


def _from_runs(
    reference: LabelSet, method: str, budget: float | None, answers: pd.DataFrame, settings: pd.DataFrame
) -> Outcome | None:
    """The runs of a method, one a seed."""

    def of_method(table: pd.DataFrame) -> pd.DataFrame:
        at_budget = table["budget"].isna() if budget is None else table["budget"] == budget
        return table[at_budget & (table["method"] == method)]

    rows, setting = of_method(answers), of_method(settings)
    if rows.empty:
        return None
    position = pd.Series(np.arange(len(reference)), index=reference.samples["id"])
    full_answer = reference.samples["answer"].to_numpy()
    by_seed: dict[str, list[Values]] = {"correct": [], "agree": [], "flops_decoder": [], "exit_layer": []}
    for _, one in rows.groupby("seed"):
        ordered = one.iloc[np.argsort(position.loc[one["id"]].to_numpy())]
        for name, columns in by_seed.items():
            values = ordered["answer"] == full_answer if name == "agree" else ordered[name]
            columns.append(values.to_numpy(dtype=float))
    stacked = {name: np.stack(columns, axis=1) for name, columns in by_seed.items()}
    return Outcome(
        method,
        budget,
        str(setting["setting"].iloc[0]),
        correct=stacked["correct"],
        agree=stacked["agree"].mean(1),
        cost=stacked["flops_decoder"].mean(1) / float(reference.flops[:, -1].double().mean()),
        exit_layer=stacked["exit_layer"].mean(1),
        deciding=float(setting["deciding"].iloc[0]),
    )


def exit_mixture(reference: LabelSet, method: str, budget: float | None, layers: Sequence[int]) -> Outcome | None:
    """Exits after fixed layers, mixed over the questions so that they cost the budget on average.

    Args:
        reference: answers of every exit.
        method: its name.
        budget: None: `UNPUBLISHED_BUDGET`, or the only layer that there is.
        layers: the exits to choose from, ascending; the two whose costs enclose the budget are mixed.

    Returns:
        None if the first of them costs more than the budget.
    """
    costs = reference.cost.numpy()
    mean = costs.mean(0)[list(layers)]
    wanted = (UNPUBLISHED_BUDGET if len(layers) > 1 else mean[-1]) if budget is None else budget
    if wanted < mean[0]:
        return None
    last = len(layers) - 1
    above = min(int(np.searchsorted(mean, wanted - 1e-9)), last)
    below = max(above - 1, 0)
    share = 1.0 if above == below else min(float((wanted - mean[below]) / (mean[above] - mean[below])), 1.0)

    def mixed(table: Values) -> Values:
        return (1 - share) * table[:, layers[below]] + share * table[:, layers[above]]

    which = f"{layers[above]}" if share == 1 else f"{layers[below]} or {layers[above]} ({share:.0%})"
    correct, agree = reference.correct.double().numpy(), reference.agree.double().numpy()
    return Outcome(
        method,
        budget,
        "" if method == "none" else f"layer={which}",
        correct=mixed(correct)[:, None],
        agree=mixed(agree),
        cost=mixed(costs),
        exit_layer=mixed(np.broadcast_to(np.arange(costs.shape[1], dtype=float), costs.shape)),
    )


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
    verdicts = compare(found, subsets, images, cfg)
    note = (
        f"{len(images)} questions about {len(set(images))} images ({int(needs_image.sum())} need the image: without it "
        "the model answers otherwise); intervals 95%, bootstrap over images"
    )
    leading = {
        (each["on"], each["budget"]): {method: method in each["not_told_apart"] for method in each["lead"]}
        | {each["ahead"]: True}
        for each in verdicts
    }
    with plots.style():
        folder.save_figure("accuracy_against_cost", methods_at_cost(table.to_dict("records"), leading, LABELS, note))
    write_table_page(folder, markdown(cfg, table, by_kind, verdicts, note))
    return folder.write_summary(
        model=cfg.model.name,
        data=cfg.data.name,
        num_layers=mllm.num_layers,
        num_samples=len(images),
        num_images=len(set(images)),
        experiment=cfg.experiment.name,
        needs_image=int(needs_image.sum()),
        tolerance=cfg.experiment.tolerance,
        rows=table.to_dict("records"),
        verdicts=verdicts,
    )


def _row(
    each: Outcome, subsets: Mapping[str, npt.NDArray[np.bool_]], images: list[Any], cfg: DictConfig
) -> dict[str, Any]:
    row: dict[str, Any] = {"method": each.method, "budget": each.budget, "cost": float(each.cost.mean())}
    for name, chosen in subsets.items():
        right = each.correct[chosen]
        if np.isfinite(right).any():
            kept = [image for image, wanted in zip(images, chosen, strict=True) if wanted]
            band = percentile_band(np.nanmean(right), seeded_bootstrap(right, kept, cfg.bootstrap, cfg.seed))
            row |= {name: float(band.mean), f"{name}_low": float(band.low), f"{name}_high": float(band.high)}
        else:
            row |= dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    needed = each.cost[subsets["accuracy_needs_image"]]
    by_seed = np.nanmean(each.correct, axis=0) if np.isfinite(each.correct).any() else np.array([np.nan])
    several = len(by_seed) > 1
    return row | {
        "cost_needs_image": float(needed.mean()) if len(needed) else float("nan"),
        "deciding": each.deciding,
        "agreement": float(each.agree.mean()),
        "mean_exit_layer": float(each.exit_layer.mean()),
        "setting": each.setting,
        "seeds": len(by_seed),
        "worst_seed": float(by_seed.min()) if several else float("nan"),
        "best_seed": float(by_seed.max()) if several else float("nan"),
    }


def compare(
    found: Sequence[Outcome], subsets: Mapping[str, npt.NDArray[np.bool_]], images: list[Any], cfg: DictConfig
) -> list[dict[str, Any]]:
    """At each budget the most accurate method, its lead over the others, and those it cannot be told apart from.

    Methods whose cost is not within `experiment.tolerance` of the budget do not take part. The intervals of all leads,
    on all subsets and at all budgets, hold together (`analysis.pairwise`).
    """
    contests, about = [], []
    for name, chosen in subsets.items():
        for budget in [each for each in cfg.experiment.budgets if each is not None]:
            rivals = [each for each in found if each.budget == budget and each.method != "none"]
            off = {each.method: float(each.cost.mean()) for each in rivals}
            off = {method: cost for method, cost in off.items() if abs(cost - budget) > cfg.experiment.tolerance}
            matched = [each for each in rivals if each.method not in off]
            right = [np.where(chosen[:, None], each.correct, np.nan) for each in matched]
            if len(matched) > 1 and np.isfinite(right[0]).any():
                contests.append(Contest([each.method for each in matched], right))
                costs = {each.method: float(each.cost[chosen].mean()) for each in matched}
                about.append({"on": name, "budget": budget, "costs": costs, "not_matched": off})
    verdicts = []
    for head, standing in zip(about, standings(contests, images, cfg.bootstrap, cfg.seed), strict=True):
        best, names = standing.best, standing.methods
        leads = {
            names[i]: [float(lead), float(lead - margin), float(lead + margin)]
            for i, (lead, margin) in enumerate(zip(standing.lead[best], standing.margin[best], strict=True))
            if i != best
        }
        verdicts.append(
            {
                **head,
                "ahead": names[best],
                "accuracy": float(standing.accuracy[best]),
                "not_told_apart": [names[i] for i in standing.tied],
                "lead": leads,
                "comparisons": pairs_of(contests),
            }
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
    "random_stratified": "stratified random",
    "dynamic_exit": "dynamic exit",
    "fastv_dynamic_exit": "FastV + dynamic exit",
}


def markdown(
    cfg: DictConfig, table: pd.DataFrame, by_kind: pd.DataFrame, verdicts: Sequence[Mapping[str, Any]], note: str
) -> list[str]:
    """The lines of the page to put into a document."""
    head = [
        "budget",
        "method",
        "decoder FLOPs",
        "image needed",
        "+ deciding",
        "accuracy",
        "image needed",
        "same answer",
    ]
    rows = [
        [
            _budget(row),
            LABELS[row["method"]],
            f"{row['cost']:.3f}",
            f"{row['cost_needs_image']:.3f}",
            f"{row['deciding']:.3f}",
            percent_with_limits(row, "accuracy"),
            percent_with_limits(row, "accuracy_needs_image"),
            f"{100 * row['agreement']:.1f}",
            row["setting"] + seeds(row),
        ]
        for row in table.to_dict("records")
    ]
    lines = [*heading(cfg, note), COLUMNS, "", *markdown_table([*head, "setting"], rows)]
    if verdicts:
        lines += [
            "",
            *[sentence(each, cfg.experiment.tolerance) for each in verdicts],
            "",
            what_it_means(verdicts, cfg.experiment.tolerance),
        ]
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


def seeds(row: Mapping[str, Any]) -> str:
    """What a method's seeds spread over; nothing for one that has none."""
    if row["seeds"] == 1:
        return ""
    return f"; {row['seeds']} seeds, {100 * row['worst_seed']:.1f} to {100 * row['best_seed']:.1f}"


COLUMNS = (
    "Decoder FLOPs of the prefill are shares of the full model's, over all questions and over those that need the "
    "image; deciding, which no budget counts, is what choosing tokens or layers takes on top. Accuracy and answers "
    "that are the full model's are percentages."
)


def sentence(verdict: Mapping[str, Any], tolerance: float) -> str:
    """Who is ahead at a cost, and who cannot be told apart."""
    where = "all questions" if verdict["on"] == "accuracy" else "questions that need the image"
    best, tied = verdict["ahead"], verdict["not_told_apart"]
    behind = [method for method in verdict["lead"] if method not in tied]
    percent = f"{LABELS[best]} ({100 * verdict['accuracy']:.1f}%)"
    if not tied:
        nearest = min(verdict["lead"], key=lambda method: verdict["lead"][method][0])
        lead, low, high = (100 * each for each in verdict["lead"][nearest])
        text = (
            f"**{percent} is ahead** of all others, of {LABELS[nearest]} by {lead:.1f} points [{low:.1f}, {high:.1f}]."
        )
    else:
        others = "all others" if not behind else ", ".join(LABELS[each] for each in tied)
        text = f"{percent} is the most accurate, **not told apart** from {others}."
        if behind:
            text += f" Behind it: {', '.join(LABELS[each] for each in behind)}."
    dearer = {method: cost for method, cost in verdict["costs"].items() if cost > verdict["budget"] + tolerance}
    if dearer:
        text += f" On these, more than the budget is spent by {_with_costs(dearer)}."
    if verdict["not_matched"]:
        text += f" Not compared, as the budget is not met: {_with_costs(verdict['not_matched'])}."
    return f"- {verdict['budget']:g} of the FLOPs, {where}: {text}"


def _with_costs(costs: Mapping[str, float]) -> str:
    return ", ".join(f"{LABELS[method]} ({cost:.2f})" for method, cost in costs.items())


def what_it_means(verdicts: Sequence[Mapping[str, Any]], tolerance: float) -> str:
    """How the sentences were decided."""
    return (
        f"Compared are methods whose cost over all questions is within {tolerance:g} of the budget. Two are told apart "
        f"if their difference exceeds a band that holds for all {verdicts[0]['comparisons']} differences of two "
        "methods at one budget, on both sets of questions, together with 95% probability (paired bootstrap over "
        "images, and over the seeds of methods that have some)."
    )


if __name__ == "__main__":
    main()
