"""Statistics of visual-token exits: where exits stop to matter, and which of the paper's findings hold.

Exit layers k = 0..L are the last axis of every table `[n, L + 1]`; row L is the full model. `docs/exits.md` explains
the findings on one page. Two facts shape the rules for a finding:

* Agreement with the full model rises towards k = L for *any* model, trained or not, because a late exit changes few
  layers. So a finding about contribution needs answers that are right because of the image, or an exit that changes
  the logits by no more than rounding.
* The layer is chosen by looking at the data. It is found by stepping down from L and stopping at the first exit that
  fails its test, which keeps the error rate of one test without a correction for the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dyvte.gates.metrics import wilson_limits
from dyvte.instrument.sweep.criteria import kl_exit_layer, kl_stays_below

from .bands import LEVEL, MIN_CLUSTERS, TAILS, Array, Clusters, ImageBootstrap, cluster_mean, generator
from .entropy import exit_change, swap_floor

ROUNDING = 1e-4
"""Relative change of the logits that float32 rounding can explain, with a hundredfold margin."""
STOPS = "visual tokens contribute to the answers, and no longer do from some layer on"
DISTURBS = "early exit disturbs the text self-attention entropy, late exit does not"
DEPENDS = "the exit depth depends on the kind of question"
MIN_SAVED = 0.1
"""Share of the decoder's layers that must come after an exit, for "some layer before the end" to be more than words."""


# ---------------------------------------------- where a curve over exits settles


def settled_layer(curves: npt.ArrayLike, limit: float) -> npt.NDArray[np.int64]:
    """First k with `curves[..., j] <= limit` for all j >= k, L + 1 if L itself exceeds it: `[..., L + 1] -> [...]`."""
    fine = np.flip(np.asarray(curves) <= limit, -1)
    return np.asarray(fine.shape[-1] - fine.cumprod(-1).sum(-1))


def one_sided_limits(values: npt.ArrayLike, bootstrap: ImageBootstrap, level: float) -> tuple[Array, Array]:
    """Lower and upper confidence limit of the mean over samples of `values [n, ...]`, each on its own at `level`.

    Percentiles of the bootstrap over images. Rates near 0 or 1 leave a bootstrap without spread, so no limit comes
    closer to the mean than Wilson's interval comes to a rate of 0 with as many draws as there are images.
    """
    mean, replicates = bootstrap.mean(values)
    _, least = wilson_limits(0.0, bootstrap.num_images, 2 * level - 1)  # one-sided
    low, high = np.nanpercentile(replicates, [100 * (1 - level), 100 * level], axis=0)
    return np.minimum(low, mean - least), np.maximum(high, mean + least)


@dataclass(frozen=True)
class Settling:
    """From which exit layer on a loss stays within a limit.

    Attributes:
        estimate: by the means; `interval` holds its bootstrap limits.
        confirmed: the smallest k such that the upper limits of all exits j >= k (j < L) are within the limit; L if
            there is none.
        mean, upper: `[L + 1]`, the loss at each exit and its one-sided upper limit.
    """

    estimate: int
    interval: list[int]
    confirmed: int
    mean: list[float]
    upper: list[float]


def settling(loss: Array, bootstrap: ImageBootstrap, limit: float, level: float) -> Settling:
    """Where the mean of `loss [n, L + 1]` (0 at L) falls within `limit` for good."""
    mean, replicates = bootstrap.mean(loss)
    tail = 100 * (1 - level) / 2
    interval = np.percentile(settled_layer(replicates, limit), [tail, 100 - tail], method="nearest")
    _, upper = one_sided_limits(loss, bootstrap, level)
    upper[-1] = 0.0  # the full model is what the others are compared with
    return Settling(
        estimate=int(settled_layer(mean, limit)),
        interval=[int(each) for each in interval],
        confirmed=int(settled_layer(upper, limit)),
        mean=mean.tolist(),
        upper=upper.tolist(),
    )


# ------------------------------------------------------------------ kl criterion


@dataclass(frozen=True)
class KlExit:
    """K* of one threshold (VTW, arXiv 2405.05803) with its bootstrap interval; None where no exit fulfils it.

    Attributes:
        eta: threshold in nats.
        layer: K* = min {k >= start : D[k] <= eta}.
        interval: bootstrap limits of K*.
        stays: first k from which D stays at or below eta.
    """

    eta: float
    layer: int | None
    interval: list[int | None]
    stays: int | None


def kl_exits(divergence: Array, bootstrap: ImageBootstrap, etas: Sequence[float], start: int) -> list[KlExit]:
    """K* for every threshold from the divergence of each sample, `[n, L + 1]` in nats."""
    mean, replicates = map(torch.from_numpy, bootstrap.mean(divergence))
    none = len(mean)  # "no exit" counts as later than all exits
    results = []
    for eta in etas:
        drawn = [kl_exit_layer(row, eta, start) for row in replicates]
        layers = np.array([none if layer is None else layer for layer in drawn])
        limits = np.percentile(layers, TAILS, method="nearest")
        interval = [None if limit == none else int(limit) for limit in limits]
        found = KlExit(float(eta), kl_exit_layer(mean, eta, start), interval, kl_stays_below(mean, eta, start))
        results.append(found)
    return results


# ---------------------------------------------------------------------- findings


@dataclass(frozen=True)
class ExitFinding:
    """Whether one statement holds for this model on these data.

    Attributes:
        statement: what is claimed.
        verdict: `found`, `not_found` (the data speak against it) or `undetermined` (they cannot tell).
        reasons: why it was not found, or on what evidence it was.
        exit_layer: the layer that the statement speaks of, where it was found.
        estimates: name -> number or `[mean, lower limit, upper limit]`.
        details: everything else that the decision used.
    """

    statement: str
    verdict: str
    reasons: list[str]
    exit_layer: int | None = None
    estimates: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def unchanged_from(logit_change: npt.ArrayLike) -> int:
    """First k from which no exit changes any sample's logits by more than rounding: `[n, L + 1] -> 0..L`.

    Args:
        logit_change: root mean square of the change of a sample's next-token logits under each exit, relative to their
            standard deviation over the vocabulary, computed in float32.
    """
    return int(settled_layer(np.asarray(logit_change, dtype=np.float64).max(0), ROUNDING))


def contribution_stops(
    correct: npt.ArrayLike,
    agree: npt.ArrayLike,
    logit_change: npt.ArrayLike,
    bootstrap: ImageBootstrap,
    *,
    max_loss: float = 0.05,
    min_gain: float = 0.05,
    level: float = LEVEL,
) -> ExitFinding:
    """Finding 1: visual tokens contribute to the answers, and stop to from some layer on (arXiv 2411.19628, Fig. 3).

    Found, with exit layer k, on either of two kinds of evidence.

    * `exact`: exits from k on change no logit beyond rounding, exit k - 1 does. No sampling is involved.
    * `accuracy`: (a) the full model is right more often than exit 0, by more than `min_gain` at the lower limit;
      (b) for every exit from k on, the upper limit of its loss of accuracy is at most `max_loss`; (c) at least a tenth
      of the layers come after k.

    Args:
        correct: `[n, L + 1]`, 1 where the answer under exit k is right; NaN where there is no reference answer.
        agree: `[n, L + 1]`, 1 where it is the full model's answer.
        logit_change: see :func:`unchanged_from`. Rounding in half precision is larger, so there it is no evidence.
        max_loss, min_gain: shares of the questions.
    """
    correct, agree = np.asarray(correct, dtype=np.float64), np.asarray(agree, dtype=np.float64)
    num_layers, num_images = agree.shape[1] - 1, bootstrap.num_images
    exact = unchanged_from(logit_change)
    details: dict[str, Any] = {"max_loss": max_loss, "min_gain": min_gain, "level": level}
    details |= {"num_samples": len(agree), "num_images": num_images, "unchanged_from": exact}
    estimates: dict[str, Any] = {}
    finding = partial(ExitFinding, STOPS, estimates=estimates, details=details)
    if exact == 0:
        why = "no exit changes the logits, not even showing the decoder no image: visual tokens do not contribute"
        return finding("not_found", [why])
    before = float(np.asarray(logit_change, dtype=np.float64)[:, exact - 1].mean())
    if exact < num_layers and before > 10 * ROUNDING:
        details |= {"evidence": "exact", "contributes": True}
        estimates["exit_layer"] = exact
        return finding("found", [f"exits from layer {exact} on leave the logits as they are, up to rounding"], exact)
    if num_images < MIN_CLUSTERS:
        why = f"{num_images} images; fewer than {MIN_CLUSTERS} give no interval (data.limit=)"
        return finding("undetermined", [why])
    answers = settling(1 - agree, bootstrap, max_loss, level)
    details["changed_answers"] = asdict(answers)
    estimates["answers_settle"] = [answers.estimate, *answers.interval]
    usable = np.isfinite(correct).all(1)
    if not usable.any():
        why = "no answer is known to be right (accuracy=false or no references), and agreement rises for any model"
        return finding("undetermined", [why])
    loss, bootstrap = correct[usable, -1:] - correct[usable], bootstrap[usable]
    low, high = one_sided_limits(loss, bootstrap, level)
    accuracy = settling(loss, bootstrap, max_loss, level)
    details |= {"loss": asdict(accuracy), "contributes": bool(low[0] > min_gain)}
    estimates["gain"] = [accuracy.mean[0], float(low[0]), float(high[0])]
    estimates["accuracy_settles"] = [accuracy.estimate, *accuracy.interval]
    latest = num_layers - math.ceil(MIN_SAVED * num_layers)
    reasons = []
    if not details["contributes"]:
        reasons.append(f"the answers are not clearly better with the image (gain {accuracy.mean[0]:+.3f})")
    if accuracy.confirmed > latest:
        reasons.append(f"no exit up to layer {latest} keeps its loss of accuracy clearly below {max_loss:g}")
    if not reasons:
        details["evidence"] = "accuracy"
        why = f"upper limit of the loss of accuracy at most {max_loss:g} from layer {accuracy.confirmed} on"
        return finding("found", [why], accuracy.confirmed)
    against = high[0] < min_gain or low[latest] > max_loss
    return finding("not_found" if against else "undetermined", reasons)


def early_exit_disturbs(
    entropy: Array, swapped: Array, exit_layer: int | None, bootstrap: ImageBootstrap
) -> ExitFinding:
    """Finding 2: early exit disturbs the text self-attention entropy, late exit does not (arXiv 2411.19628, Fig. 4).

    Early are the exits before the layer of finding 1, late those from it on; tested only if finding 1 holds. An exit
    disturbs the entropy where the mean change, with its sign, is further from 0 than another image moves it
    (:func:`analysis.statistics.entropy.swap_floor`). Found if early exits, on average, exceed this floor at the lower
    limit, and late ones stay below it at the upper limit.

    Args:
        entropy: `[n, L + 1, L]`.
        swapped: `[n, L]`, of the full model with another image; questions with NaN are left out.
        exit_layer: of finding 1, None if it was not found.
    """
    estimates: dict[str, Any] = {}
    finding = partial(ExitFinding, DISTURBS, estimates=estimates, details={"level": LEVEL, "boundary": exit_layer})
    if exit_layer is None:
        why = "not tested: there is no layer from which visual tokens stop contributing, hence no early and late"
        return finding("undetermined", [why])
    known = np.isfinite(swapped).all(1)
    if not known.any():
        why = "not tested: no question could be asked about another image, so there is no floor"
        return finding("undetermined", [why])
    change, floor = exit_change(entropy[known]), swap_floor(entropy[known], swapped[known])
    if not 0 < exit_layer < change.shape[1]:
        why = f"there are no exits on both sides of layer {exit_layer} with a layer after them"
        return finding("undetermined", [why])
    # question by question: change and floor, of early and of late exits
    parts = [of[:, part].mean(1) for of in (change, floor) for part in (slice(exit_layer), slice(exit_layer, None))]
    over = [np.sign(cluster_mean(parts[index])) * parts[index] - parts[index + 2] for index in range(2)]
    mean, replicates = bootstrap[known].mean(np.stack([*parts, *over], axis=1))
    low, high = np.percentile(replicates, [100 * (1 - LEVEL), 100 * LEVEL], axis=0)
    names = ("early_change", "late_change", "early_floor", "late_floor", "early_over_floor", "late_over_floor")
    estimates |= {name: [float(mean[i]), float(low[i]), float(high[i])] for i, name in enumerate(names)}

    def sentence(index: int, what: str) -> str:
        return (
            f"{('early', 'late')[index]} exits change the entropy by {mean[index]:+.3f} nats, {what} another image "
            f"({mean[index + 2]:.3f})"
        )

    reasons = []
    if low[4] <= 0:
        reasons.append(sentence(0, "not clearly more than"))
    if high[5] > 0:
        reasons.append(sentence(1, "not clearly less than"))
    if not reasons:
        return finding("found", [sentence(0, "more than"), sentence(1, "less than")], exit_layer)
    against = high[4] < 0 or low[5] > 0
    return finding("not_found" if against else "undetermined", reasons)


def depth_depends_on_kind(
    depth: Array, kinds: npt.NDArray[Any], images: Clusters, contributes: bool, n_perm: int = 1999, seed: int = 0
) -> ExitFinding:
    """Finding 3: how long a question needs the visual tokens depends on its kind.

    Tested only if visual tokens contribute to the answers (condition (a) of finding 1, or its exact evidence): under
    random weights the depth differs between kinds as well, because their prompts do.

    A permutation test of the variance of the mean exit depth between kinds. Kinds change places among the questions
    about one image, which keeps images of different difficulty out of it; images with one question form one group.

    Args:
        depth: `[n]`, exit depth of each sample in layers.
        contributes: from `details` of finding 1.
    """
    finding = partial(ExitFinding, DEPENDS, details={"level": LEVEL, "permutations": n_perm})
    if not contributes:
        why = "not tested: it is not shown that visual tokens contribute to the answers"
        return finding("undetermined", [why])
    names, kind = np.unique(kinds, return_inverse=True)
    if len(names) < 2:
        return finding("undetermined", ["the questions are of one kind"])
    means = {str(name): float(depth[kind == i].mean()) for i, name in enumerate(names)}
    _, image, size = np.unique(np.asarray(images).astype(str), return_inverse=True, return_counts=True)
    stratum = np.where(size[image] > 1, image, -1)
    rng = generator(seed, "kinds")
    order = np.argsort(stratum, kind="stable")
    member = np.eye(len(names))[kind[order]]  # rows by stratum
    count = member.sum(0)
    sorted_depth, sorted_stratum = depth[order] - depth.mean(), stratum[order]

    def between(values: Array) -> float:
        return float(((member.T @ values) ** 2 / count).sum())

    least = between(sorted_depth) - 1e-9
    shuffled = (np.lexsort((rng.random(len(depth)), sorted_stratum)) for _ in range(n_perm))
    exceeding = sum(between(sorted_depth[each]) >= least for each in shuffled)
    p_value = (1 + exceeding) / (n_perm + 1)
    verdict = "found" if p_value <= 1 - LEVEL else "undetermined"
    estimates = {"p_value": p_value, "mean_depth": means}
    return finding(verdict, [f"permutation test: p = {p_value:.4f}"], estimates=estimates)
