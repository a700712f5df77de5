"""The stage table: each stage confirmed, refuted or undetermined, by attention and by cause (`docs/stage_rules.md`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from dyvte.errors import DataError
from dyvte.gates.metrics import share_interval, wilson_limits
from dyvte.instrument.causal import windows_of_width

from .bands import ROUNDING, Array, Clusters, cluster_mean
from .stages import MIN_EFFECT, NOT_TESTED, UNDETERMINED

CONFIRMED, REFUTED = "confirmed", "refuted"
STAGES = ("fusion", "intra-modality", "reasoning")
ERROR = 0.05
"""Probability with which any of the three causal verdicts of a table is wrong."""
LEVEL = 1 - ERROR / len(STAGES)
"""Of each one-sided limit."""
USE_POINTS = 2.0
"""Loss in percentage points up to which a path counts as unused."""
NOT_RECOVERED = 0.05
"""Late entry fails where it leaves more than this share of what never seeing the image loses."""
USE, QUESTION, VISUAL = "instruction->visual", "question->question", "visual->visual"
"""The paths q->v (the queries of the attention curve, and the answer's), q->q and v->v."""
StageCut = tuple[str, str, tuple[int, int]]
Triple = tuple[float, ...]
"""Estimate, lower and upper limit."""


@dataclass(frozen=True)
class Losses:
    """Whether each question's answer changed under the cuts that a split (b1, b2) asks for: 0, 1, or NaN (unknown).

    Attributes:
        windows: `[n, L - b1 + 1]`, instruction -> visual in every window of b1 layers; column 0 is [0, b1), which is
            late entry as well.
        middle, late, never: `[n]`, the same in [b1, b2), in [b2, L), and in all layers.
        question, visual: `[n]`, question -> question and visual -> visual in [b1, b2).
        swap: `[n]`, another image's keys and values in [b2, L).
    """

    windows: Array
    middle: Array
    late: Array
    never: Array
    question: Array
    visual: Array
    swap: Array


@dataclass(frozen=True)
class StageEvidence:
    """What one kind of evidence says about one stage.

    Attributes:
        verdict: `confirmed`, `refuted`, `undetermined`, or `not_tested_by_attention`.
        conditions: of a confirmation, each with whether it is met.
        numbers: estimate with one-sided limits, in log enrichment or in points.
        note: what the verdict alone does not say.
    """

    stage: str
    verdict: str
    conditions: dict[str, bool]
    numbers: dict[str, Triple]
    note: str = ""

    def in_words(self, digits: int) -> str:
        """Its numbers."""
        return "; ".join(
            f"{name.replace('_', ' ')} {mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            for name, (mean, low, high) in self.numbers.items()
        )


def loss_limits(changed: Array, images: Clusters, level: float = LEVEL) -> Triple:
    """Mean of `changed [n]` (0 or 1) in points with one-sided limits: Wilson's, with the design effect of images."""
    known = np.isfinite(changed)
    if not known.any():
        return (np.nan, 0.0, 100.0)
    mean, low, high = share_interval(changed[known], np.asarray(images)[known], 1 - 2 * (1 - level))
    return 100 * float(mean), 100 * float(low), 100 * float(high)


def difference_limits(points: Array, images: Clusters) -> tuple[Array, Array, Array]:
    """Mean of paired differences `points [n, ...]` with one-sided limits: Student's t, images as clusters.

    A question with NaN is left out where it is NaN. Limits are infinite for fewer than two images. Where all images
    have one mean, they show nothing of how others vary: the limits then allow for as many with the least or largest
    difference there is (-100 and 100 points) as Wilson's limit does from a rate of 0.
    """
    _, index = np.unique(np.asarray(images).astype(str), return_inverse=True)
    flat = points.reshape(len(points), -1)
    known = np.isfinite(flat)
    mean = cluster_mean(flat)
    sums, counts = np.zeros((2, index.max() + 1, flat.shape[1]))
    np.add.at(sums, index, np.where(known, flat - np.nan_to_num(mean), 0.0))
    np.add.at(counts, index, known)
    clusters = (counts > 0).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt((sums**2).sum(0) * clusters / (clusters - 1)) / counts.sum(0)
        half = np.where(clusters > 1, t.ppf(LEVEL, np.maximum(clusters - 1, 1)) * error, np.inf)
    unseen = np.where(half < 100 * ROUNDING, wilson_limits(0.0, clusters, 2 * LEVEL - 1)[1], 0.0)
    low, high = mean - half - unseen * (100 + mean), mean + half + unseen * (100 - mean)
    shape = points.shape[1:]
    return mean.reshape(shape), low.reshape(shape), high.reshape(shape)


def causal_stages(losses: Losses, split: Sequence[int], images: Clusters) -> list[StageEvidence]:
    """The three stages by cause, at the split (b1, b2) that the losses of every question were measured for.

    Example:
        >>> changed = np.zeros((100, 4)); changed[:, 0] = 1
        >>> none, every = np.zeros(100), np.ones(100)
        >>> losses = Losses(changed, none, none, every, every, every, none)
        >>> [each.verdict for each in causal_stages(losses, (2, 4), range(100))]
        ['confirmed', 'undetermined', 'undetermined']
    """
    never = loss_limits(losses.never, images)
    found = [_fusion(losses, split[0], images, never), _intra_modality(losses, images), _reasoning(losses, images)]
    if never[1] > USE_POINTS:
        return found
    why = "these questions do not clearly need the image"
    return [replace(each, verdict=UNDETERMINED, note=why) for each in found]


def _difference(first: Array, second: Array, images: Clusters) -> Triple:
    mean, low, high = difference_limits(100 * (first - second), images)
    return float(mean), float(low), float(high)


def _verdict(conditions: Mapping[str, bool], refuted: bool) -> str:
    return REFUTED if refuted else CONFIRMED if all(conditions.values()) else UNDETERMINED


def _fusion(losses: Losses, width: int, images: Clusters, never: Triple) -> StageEvidence:
    early = losses.windows[:, 0]
    mean, low, high = difference_limits(100 * (early[:, None] - losses.windows[:, 1:]), images)
    rival = int(np.argmin(low))  # the window that is exceeded least clearly
    first = rival + 1
    exceeds: Triple = (float(mean[rival]), float(low[rival]), float(high[rival]))
    fails = _difference(early, NOT_RECOVERED * losses.never, images)
    half = 1 - (1 - LEVEL) / 2  # the two limits of a recovery share their error
    recovers = loss_limits(early, images, half)[2] <= NOT_RECOVERED * loss_limits(losses.never, images, half)[1]
    conditions = {"exceeds every other window": exceeds[1] > 0, "late entry fails": fails[1] > 0}
    numbers = {
        "q->v cut in the stage (late entry)": loss_limits(early, images),
        f"more than cut in layers {first} to {first + width - 1}": exceeds,
        "q->v cut in all layers": never,
    }
    return StageEvidence(STAGES[0], _verdict(conditions, recovers), conditions, numbers)


def _intra_modality(losses: Losses, images: Clusters) -> StageEvidence:
    unused = loss_limits(losses.middle, images)
    over = {
        "q->q": _difference(losses.question, losses.middle, images),
        "v->v": _difference(losses.visual, losses.middle, images),
    }
    exceeding = [path for path, (_, low, _) in over.items() if low > 0]
    conditions = {"q->v unused": unused[2] <= USE_POINTS, **{f"{path} exceeds it": path in exceeding for path in over}}
    numbers = {
        "q->v cut in the stage": unused,
        "q->q cut in the stage": loss_limits(losses.question, images),
        "v->v cut in the stage": loss_limits(losses.visual, images),
        **{f"{path} more than q->v": value for path, value in over.items()},
    }
    note = f"only {exceeding[0]} exceeds q->v" if len(exceeding) == 1 else ""
    return StageEvidence(STAGES[1], _verdict(conditions, unused[1] > USE_POINTS), conditions, numbers, note)


def _reasoning(losses: Losses, images: Clusters) -> StageEvidence:
    used, larger = loss_limits(losses.late, images), _difference(losses.swap, losses.late, images)
    conditions = {"q->v used": used[1] > USE_POINTS, "a swap costs more": larger[1] > 0}
    numbers = {
        "q->v cut in the stage": used,
        "q->v swapped in the stage": loss_limits(losses.swap, images),
        "swap more than cut": larger,
    }
    return StageEvidence(STAGES[2], _verdict(conditions, used[2] <= USE_POINTS), conditions, numbers)


def attention_stages(contrasts: Mapping[str, Any] | None) -> list[StageEvidence]:
    """The three stages by attention.

    Args:
        contrasts: `SplitContrasts` as stored in a stages run; None where there are too few layers or images for any.
    """
    if contrasts is None:
        return [StageEvidence(stage, UNDETERMINED, {}, {}, "too few layers or images") for stage in STAGES]

    def change(stage: str, name: str) -> StageEvidence:
        _, low, high = limits = tuple(contrasts[name])
        verdict = CONFIRMED if low > MIN_EFFECT else REFUTED if high <= MIN_EFFECT else UNDETERMINED
        return StageEvidence(stage, verdict, {name: low > MIN_EFFECT}, {name: limits})

    parts = {name: tuple(contrasts[name]) for name in ("visual_in", "visual_out") if contrasts[name] is not None}
    conditions = {name: limits[1] > MIN_EFFECT for name, limits in parts.items()}
    peaks = len(parts) == 2 and all(conditions.values())
    visual = StageEvidence(STAGES[1], CONFIRMED if peaks else NOT_TESTED, conditions, parts)
    return [change(STAGES[0], "fall"), visual, change(STAGES[2], "rise")]


def cuts_of_split(split: Sequence[int], num_layers: int) -> list[StageCut]:
    """What the stage table asks for at a split: (path, what happens to it, window)."""
    first, second = split
    whole = [*windows_of_width(num_layers, first), (first, second), (second, num_layers), (0, num_layers)]
    return [
        *((USE, "cut", window) for window in dict.fromkeys(whole)),
        *((path, "cut", (first, second)) for path in (QUESTION, VISUAL)),
        (USE, "swap", (second, num_layers)),
    ]


def losses_of(table: pd.DataFrame, split: Sequence[int], num_layers: int, ids: Clusters) -> Losses:
    """What a split asks for, from the table `stage_cuts` of a knock-out run.

    Args:
        table: `id`, `name` (path and what was done to it), `start`, `stop`, `agree`.
        ids: the questions, in the order wanted.
    """
    changed = 1 - table.pivot_table(index="id", columns=["name", "start", "stop"], values="agree").reindex(
        np.asarray(ids)
    )
    first, second = split

    def column(name: str, start: int, stop: int) -> Array:
        if (name, start, stop) not in changed:
            raise DataError(
                f"the knock-out run has not cut {name} in layers {start} to {stop - 1}, which the split ({first}, "
                f"{second}) asks for (python -m analysis.knockout 'splits=[[{first},{second}]]')"
            )
        return changed[name, start, stop].to_numpy(np.float64)

    return Losses(
        windows=np.stack([column(USE, *window) for window in windows_of_width(num_layers, first)], axis=1),
        middle=column(USE, first, second),
        late=column(USE, second, num_layers),
        never=column(USE, 0, num_layers),
        question=column(QUESTION, first, second),
        visual=column(VISUAL, first, second),
        swap=column(f"{USE} (swap)", second, num_layers),
    )


def stage_rows(
    split: Sequence[int], num_layers: int, attention: Sequence[StageEvidence], cause: Sequence[StageEvidence]
) -> list[dict[str, Any]]:
    """The stage table at one split, one row a stage."""
    edges = [0, *split, num_layers]
    return [
        {
            "split": f"({split[0]}, {split[1]})",
            "stage": f"{number} {looks.stage}",
            "first_layer": edges[number - 1],
            "last_layer": edges[number] - 1,
            "by_attention": looks.verdict,
            "attention_numbers": looks.in_words(2),
            "by_cause": uses.verdict,
            "cause_numbers": uses.in_words(1),
            "note": "; ".join(filter(None, (looks.note, uses.note))),
        }
        for number, (looks, uses) in enumerate(zip(attention, cause, strict=True), start=1)
    ]
