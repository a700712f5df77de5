"""Which of several methods is ahead: the differences of all pairs, with one simultaneous band.

All methods answer the same questions, so differences are bootstrapped over the same draws of images. Methods that are
random are represented by several seeds, and these are drawn again too. Who is ahead is only seen in the data; the band
therefore covers the differences of all pairs, at all costs and on all subsets, together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bands import LEVEL, Array, ImageBootstrap, cluster_mean, generator

LEAST_QUESTIONS = 10
"""Standard errors below those of so many questions answered differently are raised to it: few questions vary by less in
the bootstrap than among other questions."""


def seeded_replicates(values: Array, bootstrap: ImageBootstrap) -> Array:
    """[B] replicates of the mean of `values` [n, seeds], over images and over seeds; NaN outside of a subset."""
    replicates = bootstrap.replicates(values)
    drawn = generator(bootstrap.seed, "seeds of methods").integers(values.shape[1], size=replicates.shape)
    return np.asarray(np.take_along_axis(replicates, drawn, axis=1).mean(1))


@dataclass(frozen=True)
class Contest:
    """Methods that compete: at one cost, on one subset of the questions.

    Attributes:
        methods: their names.
        right: for each [n, seeds] whether it answers right; NaN for questions that do not count.
    """

    methods: Sequence[str]
    right: Sequence[Array]


@dataclass(frozen=True)
class Standing:
    """What a contest came to.

    Attributes:
        methods: in the order of the contest.
        accuracy: [M].
        lead: [M, M] accuracy of the row's method less the column's.
        margin: [M, M] half width of its interval.
    """

    methods: Sequence[str]
    accuracy: Array
    lead: Array
    margin: Array

    @property
    def best(self) -> int:
        """The most accurate; of several the first."""
        return int(self.accuracy.argmax())

    @property
    def tied(self) -> list[int]:
        """The others, most accurate first, that the best cannot be told apart from: its lead may be zero."""
        order = np.argsort(-self.accuracy, kind="stable")
        return [int(i) for i in order if i != self.best and self.lead[self.best, i] <= self.margin[self.best, i]]


def pairs_of(contests: Sequence[Contest]) -> int:
    """Number of differences that one band covers."""
    return sum(len(each.methods) * (len(each.methods) - 1) // 2 for each in contests)


def standings(contests: Sequence[Contest], bootstrap: ImageBootstrap) -> list[Standing]:
    """Compare the methods of every contest.

    The intervals of all differences in all contests hold together with probability `LEVEL` (sup-t band), so a method
    may be called ahead after looking at the numbers.

    Args:
        contests: each of two methods or more, every one with a question that counts.
    """
    means, errors, largest = [], [], np.zeros(bootstrap.draws)
    for contest in contests:
        first, second = np.triu_indices(len(contest.methods), 1)
        mean = np.array([cluster_mean(values).mean() for values in contest.right])
        drawn = np.stack([seeded_replicates(values, bootstrap) for values in contest.right], axis=1)
        deviation = np.nan_to_num(drawn - mean)  # a draw may hold no question of the subset
        deviation = deviation[:, first] - deviation[:, second]
        count = np.isfinite(contest.right[0]).all(1).sum()
        error = np.maximum(deviation.std(0, ddof=1), LEAST_QUESTIONS**0.5 / count)
        largest = np.maximum(largest, (np.abs(deviation) / error).max(1))
        means.append(mean)
        errors.append(error)
    critical = float(np.quantile(largest, LEVEL))
    found = []
    for contest, mean, error in zip(contests, means, errors, strict=True):
        margin = np.zeros((len(mean), len(mean)))
        margin[np.triu_indices(len(mean), 1)] = critical * error
        found.append(Standing(contest.methods, mean, mean[:, None] - mean, margin + margin.T))
    return found
