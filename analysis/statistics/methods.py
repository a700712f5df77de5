"""What the methods came to, compared question by question, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from omegaconf import DictConfig

from dyvte.gates.labels import LabelSet
from dyvte.gates.metrics import best_mixture, share_interval
from dyvte.policies.registry import labels
from dyvte.runs.store import RunFolder

from ..measuring.methods import CALIBRATION, UNPUBLISHED_BUDGET, from_reference, plan
from .bands import Array, Clusters, ImageBootstrap, keyed_array
from .markdown import heading, markdown_table, percent_with_limits, published
from .pairwise import Contest, pairs_of, standings
from .published import beside, published_page


@dataclass(frozen=True)
class Outcome:
    """What a method came to on n questions.

    Attributes:
        budget: the cost that it was set to, None for its published setting.
        setting: in a few words.
        correct: [n, seeds] whether each question is answered right.
        agree: [n] whether the answer is the full model's, the mean over seeds.
        cost: [n] decoder FLOPs of the prefill over the full model's mean.
        exit_layer: [n] layers that saw the image.
        tokens: [n] share of the visual tokens that a layer sees, the mean over layers; NaN without an image.
        deciding: cost of choosing tokens or layers, on the same scale, which `cost` leaves out.
    """

    method: str
    budget: float | None
    setting: str
    correct: Array
    agree: Array
    cost: Array
    exit_layer: Array
    tokens: Array
    deciding: float = 0.0

    def spent(self, counted: str) -> float:
        """What a budget is compared with, see `dyvte.policies.method.Counted`."""
        return float(self.cost.mean() if counted == "flops" else np.nanmean(self.tokens))


def outcomes_of(folder: RunFolder, reference: LabelSet, experiment: DictConfig) -> list[Outcome]:
    """Every method at every budget, the full model first; those that cannot meet a budget are left out."""
    names = experiment.methods
    found = [exit_mixture(reference, "none", None, None)] if "none" in names else []
    judged = {}
    if {"fixed_exit", "vtw"} & set(names):
        table = folder.read_table(CALIBRATION)
        judged = {"fixed_exit": table["agreement"].to_numpy(), "vtw": -table["kl"].to_numpy()}
    ran = any(not from_reference(job.method) for job in plan(experiment) if job.method != CALIBRATION)
    answers, settings = (folder.read_table(name) for name in ("answers", "settings")) if ran else (None, None)
    for budget in experiment.budgets:
        for method in names:
            if method in judged and not (method == "fixed_exit" and budget is None):
                found.append(exit_mixture(reference, method, budget, judged[method], experiment.counted))
            elif not from_reference(method):
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
    full_answer = reference.samples.set_index("id")["answer"]
    rows = rows.assign(agree=rows["answer"].to_numpy() == full_answer.loc[rows["id"]].to_numpy())

    def by_seed(name: str) -> Array:
        return keyed_array(rows, name, reference.samples["id"], "seed")

    return Outcome(
        method,
        budget,
        str(setting["setting"].iloc[0]),
        correct=by_seed("correct"),
        agree=by_seed("agree").mean(1),
        cost=by_seed("flops_decoder").mean(1) / float(reference.flops[:, -1].double().mean()),
        exit_layer=by_seed("exit_layer").mean(1),
        tokens=by_seed("visual_tokens").mean(1),
        deciding=float(setting["deciding"].iloc[0]),
    )


def exit_mixture(
    reference: LabelSet, method: str, budget: float | None, judged: Array | None, counted: str = "flops"
) -> Outcome | None:
    """Exits after two fixed layers, mixed at random over questions to cost the budget on average; None if they cannot.

    Of all pairs of layers it is the best on the calibration prompts (`dyvte.gates.metrics.best_mixture`). What layers
    cost is that on the questions that are asked, which the reference holds; their answers play no part in it.

    Args:
        reference: answers of every exit.
        budget: None: `UNPUBLISHED_BUDGET`.
        judged: [L + 1] what the calibration prompts say of every exit, large where it is good: the share of answers
            that stay for a fixed exit, the negative divergence for VTW. None: the full model.
        counted: what the budget is a share of, see `dyvte.policies.method.Counted`.
    """
    costs = reference.cost.numpy()
    last = reference.num_layers
    depth = np.broadcast_to(np.arange(last + 1, dtype=float), costs.shape)
    has_image = costs[:, :1] < costs[:, -1:]  # without one an exit costs all the same
    mixture: tuple[int, int, float] | None = (last, last, 1.0)
    if judged is not None:
        spent = costs.mean(0) if counted == "flops" else np.arange(last + 1) / last
        mixture = best_mixture(spent, judged, UNPUBLISHED_BUDGET if budget is None else budget)
    if mixture is None:
        return None
    below, above, share = mixture

    def mixed(table: Array) -> Array:
        return (1 - share) * table[:, below] + share * table[:, above]

    which = f"{above}" if below == above else f"{below} or {above} ({share:.0%})"
    correct, agree = reference.correct.double().numpy(), reference.agree.double().numpy()
    return Outcome(
        method,
        budget,
        "" if method == "none" else f"layer={which}",
        correct=mixed(correct)[:, None],
        agree=mixed(agree),
        cost=mixed(costs),
        exit_layer=mixed(depth),
        tokens=mixed(np.where(has_image, depth / last, np.nan)),
    )


def accuracy_of(correct: Array, images: Clusters, name: str = "accuracy") -> dict[str, Any]:
    """Accuracy over questions and seeds with its interval, which knows of both, and the number of questions.

    `correct` [n, seeds] is NaN without a reference answer.
    """
    known = np.isfinite(correct).all(1)
    found = {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan, f"{name}_questions": int(known.sum())}
    if known.any():
        correct = correct[known]
        seeds = correct.shape[1]
        between = correct.mean(0).var(ddof=1) / seeds if seeds > 1 else 0.0
        limits = share_interval(correct.mean(1), np.asarray(images)[known], added_variance=between)
        found |= dict(zip(found, (float(each) for each in limits), strict=False))
    return found


def rows_by_kind(found: Sequence[Outcome], kinds: npt.NDArray[Any], images: Sequence[Any]) -> list[dict[str, Any]]:
    """Accuracy of every method on every kind of question, one row each."""
    return [
        {"method": each.method, "budget": each.budget, "kind": str(kind)}
        | accuracy_of(each.correct[kinds == kind], np.asarray(images)[kinds == kind])
        for each in found
        for kind in sorted(set(kinds))
    ]


def outcome_row(each: Outcome, subsets: Mapping[str, npt.NDArray[np.bool_]], images: Sequence[Any]) -> dict[str, Any]:
    """One line of the comparison: cost, and accuracy on each subset of the questions with its interval."""
    row: dict[str, Any] = {"method": each.method, "budget": each.budget, "cost": each.spent("flops")}
    row["tokens"] = each.spent("tokens") if np.isfinite(each.tokens).any() else np.nan
    for name, chosen in subsets.items():
        row |= accuracy_of(each.correct[chosen], np.asarray(images)[chosen], name)
    needed = each.cost[subsets["accuracy_needs_image"]]
    by_seed = np.nanmean(each.correct, axis=0) if np.isfinite(each.correct).any() else np.array([np.nan])
    several = len(by_seed) > 1
    return row | {
        "cost_needs_image": float(needed.mean()) if len(needed) else np.nan,
        "deciding": each.deciding,
        "agreement": float(each.agree.mean()),
        "mean_exit_layer": float(each.exit_layer.mean()),
        "setting": each.setting,
        "seeds": len(by_seed),
        "worst_seed": float(by_seed.min()) if several else np.nan,
        "best_seed": float(by_seed.max()) if several else np.nan,
    }


def compare_methods(
    found: Sequence[Outcome], subsets: Mapping[str, npt.NDArray[np.bool_]], images: Sequence[Any], cfg: DictConfig
) -> list[dict[str, Any]]:
    """At each budget the most accurate method, its lead over the others, and those it cannot be told apart from.

    Methods whose cost is not within `experiment.tolerance` of the budget do not take part. Equivalent to the best are
    those whose whole interval lies within `experiment.equivalence`; `half_width` is the widest interval's. The
    intervals of all leads, on all subsets and at all budgets, hold together (`analysis.statistics.pairwise`).
    """
    contests, about = [], []
    counted, bound = cfg.experiment.counted, cfg.experiment.equivalence
    for name, chosen in subsets.items():
        for budget in [each for each in cfg.experiment.budgets if each is not None]:
            rivals = [each for each in found if each.budget == budget and each.method != "none"]
            spent = {each.method: each.spent(counted) for each in rivals}
            off = {method: cost for method, cost in spent.items() if abs(cost - budget) > cfg.experiment.tolerance}
            matched = [each for each in rivals if each.method not in off]
            right = [np.where(chosen[:, None], each.correct, np.nan) for each in matched]
            if len(matched) > 1 and np.isfinite(right[0]).any():
                contests.append(Contest([each.method for each in matched], right))
                costs = {each.method: float(each.cost[chosen].mean()) for each in matched if counted == "flops"}
                about.append({"on": name, "budget": budget, "counted": counted, "costs": costs, "not_matched": off})
    verdicts = []
    for head, standing in zip(about, standings(contests, ImageBootstrap(images, cfg.bootstrap, cfg.seed)), strict=True):
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
                "equivalent": [name for name, (_, low, high) in leads.items() if max(-low, high) <= bound],
                "equivalence": bound,
                "half_width": max((high - low) / 2 for _, low, high in leads.values()),
                "lead": leads,
                "comparisons": pairs_of(contests),
            }
        )
    return verdicts


def comparison_page(
    cfg: DictConfig,
    rows: Sequence[Mapping[str, Any]],
    by_kind: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    note: str,
) -> list[str]:
    """The lines of the page to put into a document."""
    counts = [_count(rows[0], name) for name in ("accuracy", "accuracy_needs_image")]
    accuracies = [f"{title} (n = {n:,})" for title, n in zip(("accuracy", "image needed"), counts, strict=True)]
    head = ["budget", "method", "decoder FLOPs", "image needed", "+ deciding", "visual tokens", *accuracies]
    benchmark = [f"published, {cfg.experiment.benchmark}"] if cfg.experiment.benchmark else []
    cells = [
        [
            _budget(row),
            labels()[row["method"]],
            *(f"{row[name]:.3f}" for name in ("cost", "cost_needs_image", "deciding", "tokens")),
            percent_with_limits(row, "accuracy"),
            percent_with_limits(row, "accuracy_needs_image"),
            f"{100 * row['agreement']:.1f}",
            row["setting"] + _spread_of_seeds(row),
            *(beside(cfg.experiment, labels()[row["method"]]) for _ in benchmark),
        ]
        for row in rows
    ]
    lines = [*heading(cfg, note), COLUMNS, "", *markdown_table([*head, "same answer", "setting", *benchmark], cells)]
    if verdicts:
        tolerance = cfg.experiment.tolerance
        lines += ["", *(sentence(each, tolerance) for each in verdicts), "", what_it_means(verdicts, tolerance)]
    if cfg.experiment.by_kind:
        of_kind = {row["kind"]: _count(row, "accuracy") for row in by_kind}
        shown: dict[tuple[str, str], dict[str, str]] = {}
        for row in by_kind:
            own = shown.setdefault((_budget(row), labels()[row["method"]]), {})
            own[row["kind"]] = percent_with_limits(row, "accuracy")
        head = ["budget", "method", *(f"{kind} (n = {n:,})" for kind, n in of_kind.items())]
        cells = [[*name, *(own[kind] for kind in of_kind)] for name, own in shown.items()]
        lines += ["", *markdown_table(head, cells)]
    return [*lines, *published_page(cfg.experiment), *published(cfg.experiment)]


def _count(row: Mapping[str, Any], name: str) -> int:
    return int(row[f"{name}_questions"])


def _budget(row: Mapping[str, Any]) -> str:
    return "" if row["budget"] is None or np.isnan(row["budget"]) else f"{row['budget']:g}"


def _spread_of_seeds(row: Mapping[str, Any]) -> str:
    if row["seeds"] == 1:
        return ""
    return f"; {row['seeds']} seeds, {100 * row['worst_seed']:.1f} to {100 * row['best_seed']:.1f}"


COLUMNS = (
    "Decoder FLOPs of the prefill are shares of the full model's, over all questions and over those that need the "
    "image; deciding, which no budget counts, is what choosing tokens or layers takes on top; visual tokens are the "
    "share that a decoder layer sees, the mean over layers. Accuracy and answers that are the full model's are "
    "percentages."
)


def sentence(verdict: Mapping[str, Any], tolerance: float) -> str:
    """Who is ahead at a cost, and who cannot be told apart."""
    text, tied = _leader(verdict), verdict["not_told_apart"]
    behind = [method for method in verdict["lead"] if method not in tied]
    if tied and behind:
        text += f" Behind it: {', '.join(labels()[each] for each in behind)}."
    dearer = {method: cost for method, cost in verdict["costs"].items() if cost > verdict["budget"] + tolerance}
    if dearer:
        text += f" On these, more than the budget is spent by {_with_costs(dearer)}."
    if "equivalent" in verdict:
        within = f"within {100 * verdict['equivalence']:g} points"
        same = ", ".join(labels()[each] for each in verdict["equivalent"]) or "no other"
        text += f" Equivalent to it {within}: {same} (half-widths up to {100 * verdict['half_width']:.1f} points)."
    if verdict["not_matched"]:
        text += f" Not compared, as the budget is not met: {_with_costs(verdict['not_matched'])}."
    return f"- {_contest(verdict)}: {text}"


def _contest(verdict: Mapping[str, Any]) -> str:
    where = "all questions" if verdict["on"] == "accuracy" else "questions that need the image"
    of_what = "visual tokens" if verdict.get("counted") == "tokens" else "FLOPs"
    return f"{verdict['budget']:g} of the {of_what}, {where}"


def _leader(verdict: Mapping[str, Any]) -> str:
    best, tied = verdict["ahead"], verdict["not_told_apart"]
    percent = f"{labels()[best]} ({100 * verdict['accuracy']:.1f}%)"
    if tied:
        others = "all others" if len(tied) == len(verdict["lead"]) else ", ".join(labels()[each] for each in tied)
        return f"{percent} is the most accurate, **not told apart** from {others}."
    nearest = min(verdict["lead"], key=lambda method: verdict["lead"][method][0])
    lead, low, high = (100 * each for each in verdict["lead"][nearest])
    by = f"{lead:.1f} points [{low:.1f}, {high:.1f}]"
    return f"**{percent} is ahead** of all others, of {labels()[nearest]} by {by}."


def leaders_in_words(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Who is ahead in each contest, in one line for the terminal."""
    if not verdicts:
        return "no two methods met the same budget, so none is compared with another: name more methods or budgets"
    return " ".join(f"At {_contest(each)}: {_leader(each).replace('**', '')}" for each in verdicts)


def _with_costs(costs: Mapping[str, float]) -> str:
    return ", ".join(f"{labels()[method]} ({cost:.2f})" for method, cost in costs.items())


def what_it_means(verdicts: Sequence[Mapping[str, Any]], tolerance: float) -> str:
    """How the sentences were decided."""
    return (
        f"Compared are methods whose cost over all questions is within {tolerance:g} of the budget. Two are told apart "
        f"if their difference exceeds a band that holds for all {verdicts[0]['comparisons']} differences of two "
        "methods at one budget, on both sets of questions, together with 95% probability (paired bootstrap over "
        "images, and over the seeds of methods that have some)."
    )
