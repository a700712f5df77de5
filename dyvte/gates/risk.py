"""A threshold whose risk is under a bound: Learn-then-Test with bets on the images.

The risk of a threshold is the share of questions whose answer changes. Thresholds are tried from the strictest down,
on questions that neither training nor early stopping has seen; each has to refute that its risk is the bound or more,
and the first that cannot ends the search (fixed-sequence testing), so that looking at many costs nothing: Angelopoulos,
Bates, Candes, Jordan & Lei, "Learn then Test" (arXiv 2110.01052).

Questions about one image fail together, so it is images that are counted. A p-value is one over what a gambler has who
started with 1 and bet, image by image, that less fails than the bound allows (Waudby-Smith & Ramdas, "Estimating means
of bounded random variables by betting", arXiv 2010.09686). If the risk is above the bound the bets are unfair, and by
Markov's inequality the chance of 1 / p to become that large is at most p: for any number of images, however their
questions hang together. Unlike a limit that estimates the design effect this needs no failures to be right. Stakes are
fixed beforehand rather than adapted, so the order of the images plays no part, and samples of so many questions of each
kind are covered too (a product of means is at most the power of their mean).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dyvte.gates.metrics import Array, at_exit, first_exit, thresholds_by_depth

Images = Sequence[Any] | npt.NDArray[Any]

STAKES = {1.0: 0.4, 0.5: 0.4, 0.25: 0.1, 0.125: 0.1}
"""Share of what there is that an image on which everything fails takes, and the share of the start that bets so.

High stakes show a small risk with few images, low ones get near the bound with many.
"""
RISKS = np.geomspace(1e-6, 1.0, 200)
"""1 - threshold of the thresholds tried, from the strictest on: fixed beforehand, as the test demands."""
MOST_IMAGES = 10**9
HALVINGS = 40


class ChosenThreshold(NamedTuple):
    """What `choose_threshold` found.

    Attributes:
        threshold: 1 if none could be shown to keep the bound; such gates never exit.
        upper_limit: of the risk under it. What holds whatever was tried is the bound itself.
        images_needed: images with which the next threshold, the first that was refused, would have been taken if as
            many answers changed; None where no number would do, or none was refused.
    """

    threshold: float
    upper_limit: float
    images_needed: int | None


def number_images(images: Images) -> tuple[npt.NDArray[np.intp], Array]:
    """Number [n] of the image of each question, from 0 to m - 1, and questions [m] that each image is asked."""
    _, number = np.unique(np.asarray(images).astype(str), return_inverse=True)
    return number, np.bincount(number).astype(np.float64)


def _by_image(failures: npt.ArrayLike | Tensor, images: Images) -> tuple[Array, Array]:
    """[m] failures and questions of every image."""
    number, asked = number_images(images)
    return np.bincount(number, np.asarray(failures, dtype=np.float64)).astype(np.float64), asked


def risk_p_value(failed: npt.ArrayLike, asked: npt.ArrayLike, bound: float) -> Array:
    """p-value against "the share of questions that fail is `bound` or more", from images drawn independently.

    Of an image on which `failed` of `asked` questions fail, a bet of the stake s multiplies what there is by

        1 + s (bound * asked - failed) / (most * (1 - bound))

    with `most` the most questions that any image has. p is one over the weighted mean over `STAKES` of the products.

    Args:
        failed: [..., m] of m images.
        asked: [m].
        bound: above 0, below 1.

    Returns:
        [...] p-values, 1 at most.

    Example:
        >>> float(risk_p_value([0] * 400, [3] * 400, 0.01).round(3)), float(risk_p_value([0] * 100, [3] * 100, 0.01))
        (0.039, 0.50...)
    """
    return np.exp(np.minimum(0.0, -_log_wealth(_log_growth(failed, asked, bound).sum(-1))))


def _log_growth(failed: npt.ArrayLike, asked: npt.ArrayLike, bound: float) -> Array:
    """[stakes, ..., m] logarithm of what each image multiplies each bet by; -inf where it takes all."""
    counts, sizes = np.asarray(failed, dtype=np.float64), np.asarray(asked, dtype=np.float64)
    gain = (bound * sizes - counts) / (sizes.max() * (1 - bound))
    with np.errstate(divide="ignore"):  # rounding may leave less than nothing
        return np.stack([np.log1p(np.maximum(stake * gain, -1.0)) for stake in STAKES])


def _log_wealth(log_bets: Array) -> Array:
    """[...] logarithm of what the bets [stakes, ...] made of their shares of 1."""
    shares = np.log(list(STAKES.values())).reshape((-1,) + (1,) * (log_bets.ndim - 1))
    return np.asarray(np.logaddexp.reduce(log_bets + shares, axis=0))


def upper_limit(failures: npt.ArrayLike | Tensor, images: Images, level: float = 0.95) -> float:
    """One-sided upper confidence limit of the share of questions that fail: the least bound that is not refuted.

    Example:
        >>> round(upper_limit([False] * 1200, [each // 3 for each in range(1200)]), 4)
        0.0093
    """
    failed, asked = _by_image(failures, images)
    low, high = float(failed.sum() / asked.sum()), 1.0
    if low == high:
        return 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if risk_p_value(failed, asked, middle) <= 1 - level else (middle, high)
    return high


def images_needed(failures: npt.ArrayLike | Tensor, images: Images, bound: float, level: float = 0.95) -> int | None:
    """Images that would refute a risk of `bound` if they were like those at hand; None where no number would do.

    Example:
        >>> images_needed([False] * 30, range(30), 0.01), images_needed([True, False], [0, 1], 0.01)
        (373, None)
    """
    failed, asked = _by_image(failures, images)
    return _needed(_log_growth(failed, asked, bound), level)


def _needed(growth: Array, level: float) -> int | None:
    """As `images_needed`, of growth [stakes, m]."""
    mean = growth.mean(-1)
    if not (mean > 0).any():
        return None
    return bisect.bisect_left(range(MOST_IMAGES), -np.log(1 - level), key=lambda number: _log_wealth(number * mean))


def _needed_by_all(growth: Sequence[Array], level: float) -> int | None:
    """Images of all groups, the first of which holds the others, with which each has as many as it needs."""
    most = 0
    for each in growth:
        needed = _needed(each, level)
        if needed is None:
            return None
        most = max(most, math.ceil(needed * growth[0].shape[-1] / each.shape[-1]))
    return most


def choose_threshold(
    exit_probability: Tensor,
    agree: Tensor,
    images: Images,
    bound: float,
    level: float = 0.95,
    caution: float = 0.0,
    kinds: Sequence[str] | None = None,
    kind_bound: float | None = None,
) -> ChosenThreshold:
    """The smallest threshold that is shown to change at most a share `bound` of the answers.

    With probability `level` at least, the risk of what is chosen is within the bound: see the top of this file.

    Args:
        exit_probability: [n, L - 1] of questions that the gates have not learned from.
        agree: [n, L + 1] whether exit k gives the full model's answer.
        images: of each question.
        bound: largest risk over all questions.
        level: confidence.
        caution: see `thresholds_by_depth`.
        kinds: of each question.
        kind_bound: largest risk of each kind by itself, to be shown as well. Every kind has to be shown for a threshold
            to be taken, so nothing is paid for their number.
    """
    groups = _groups(images, bound, kinds, kind_bound)

    def failures(threshold: float) -> Array:
        exits = first_exit(exit_probability, thresholds_by_depth(threshold, exit_probability.shape[1] + 1, caution))
        return 1.0 - at_exit(agree, exits).double().numpy()

    chosen, needed = 1.0, None
    for candidate in (1 - RISKS).tolist():
        failed = failures(candidate)
        growth = [_log_growth(each.failed(failed), each.asked, each.bound) for each in groups]
        if any(_log_wealth(each.sum(-1)) < -np.log(1 - level) for each in growth):
            needed = _needed_by_all(growth, level)
            break
        chosen = candidate
    return ChosenThreshold(chosen, upper_limit(failures(chosen), images, level), needed)


class TooFew(NamedTuple):
    """Why no threshold can be shown to keep its bounds.

    Attributes:
        kind: of question; None for all together.
        bound: what cannot be shown.
        present: images there are.
        needed: images that could show it, if no answer changed on any.
        reachable: the least bound that those present could show.
    """

    kind: str | None
    bound: float
    present: int
    needed: int
    reachable: float


def too_few_images(
    images: Images,
    bound: float,
    level: float = 0.95,
    kinds: Sequence[str] | None = None,
    kind_bound: float | None = None,
) -> TooFew | None:
    """Which bound of `choose_threshold` could not be shown even if no answer changed; None if all could.

    Example:
        >>> too_few_images(range(100), 0.01).needed
        373
    """
    for each in _groups(images, bound, kinds, kind_bound):
        present, nothing = len(each.asked), np.zeros(len(each.image))
        needed = images_needed(nothing, each.image, each.bound, level)
        if needed is not None and needed > present:
            return TooFew(each.kind, each.bound, present, needed, upper_limit(nothing, each.image, level))
    return None


@dataclass(frozen=True)
class _Group:
    """Questions that keep a bound of their own: their rows, the number of the image of each, and what images ask."""

    kind: str | None
    rows: npt.NDArray[np.intp]
    image: npt.NDArray[np.intp]
    asked: Array
    bound: float

    def failed(self, failures: Array) -> Array:
        """[m] failures by image, of [n] of all questions."""
        counts = np.bincount(self.image, weights=failures[self.rows], minlength=len(self.asked))
        return counts.astype(np.float64)


def _groups(images: Images, bound: float, kinds: Sequence[str] | None, kind_bound: float | None) -> list[_Group]:
    """All questions, and each kind's where kinds have a bound."""
    number, _ = number_images(images)
    parts: list[tuple[str | None, Any, float]] = [(None, np.arange(len(number)), bound)]
    if kind_bound is not None:
        names = np.asarray(kinds)
        parts += [(str(kind), np.flatnonzero(names == kind), kind_bound) for kind in np.unique(names)]
    return [_Group(kind, rows, *number_images(number[rows]), limit) for kind, rows, limit in parts]
