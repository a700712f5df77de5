"""Means with intervals from a bootstrap over images: several questions about one image are not independent."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from dyvte.gates.metrics import share_interval

Array = npt.NDArray[np.float64]
Clusters = Sequence[Any] | npt.NDArray[Any]
"""The image of each sample, length n."""
LEVEL = 0.95
"""Of every interval that does not say otherwise."""
TAILS = (100 * (1 - LEVEL) / 2, 100 - 100 * (1 - LEVEL) / 2)
"""Percentiles at its ends."""
MIN_CLUSTERS = 10
"""Below this number of images a bootstrap over images means nothing."""
ROUNDING = 1e-12
"""Draws of one value repeated differ from each other by no more than this share of it."""
WEIGHTS_AT_ONCE = 1 << 23
"""Bootstrap weights held in memory together (64 MB)."""


@dataclass(frozen=True)
class Band:
    """A mean with an interval around it; all three arrays have one shape."""

    mean: Array
    low: Array
    high: Array

    def __getitem__(self, index: Any) -> Band:
        """An entry, or some of them."""
        return Band(self.mean[index], self.low[index], self.high[index])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Band:
        """What :meth:`to_dict` gave, read from a `summary.json`: null is NaN."""
        return cls(*(np.array(values[name], dtype=np.float64) for name in ("mean", "low", "high")))

    def to_dict(self) -> dict[str, Any]:
        """`mean`, `low` and `high` as lists, or as numbers where the band has no axes."""
        return {"mean": self.mean.tolist(), "low": self.low.tolist(), "high": self.high.tolist()}


def bands_to_dict(bands: Mapping[str, Band]) -> dict[str, dict[str, Any]]:
    """Bands by name as plain data, for a summary."""
    return {name: band.to_dict() for name, band in bands.items()}


def bands_table(bands: Iterable[tuple[dict[str, Any], Band]], axis: str) -> pd.DataFrame:
    """Curves `[K]` with their bands in long form: what tells each from the others, and its values along `axis`."""
    tables = [pd.DataFrame({**labels, axis: np.arange(len(band.mean)), **band.to_dict()}) for labels, band in bands]
    return pd.concat(tables, ignore_index=True)


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose, independent of those that `seed` draws for any other.

    The draws of images use `seed` itself; whatever else is drawn beside them asks for a stream of its own.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def keyed_array(table: pd.DataFrame, column: str, ids: Clusters | pd.Series, *axes: str) -> Array:
    """A column of a table in long form as `[n, ...]`, placed by its keys, whatever the order of the rows.

    Booleans become 0 and 1; NaN where a value is missing, or the row.

    Args:
        ids: the samples in the order wanted, as in the column `id`; rows of others are left out.
        axes: names of the columns that count, from 0, along the axes after the first.
    """
    row = pd.Index(np.asarray(ids)).get_indexer(table["id"])
    places = [table[axis].to_numpy() for axis in axes]
    values = np.full((len(ids), *(int(place.max()) + 1 for place in places)), np.nan)
    known = row >= 0
    found = table[column].to_numpy(np.float64, na_value=np.nan)
    values[(row[known], *(place[known] for place in places))] = found[known]
    return values


def long_table(labels: Mapping[str, Sequence[Any]], values: Mapping[str, npt.ArrayLike], *axes: str) -> pd.DataFrame:
    """Arrays `[n, ...]` of n samples as one table with a row an entry, samples first; `keyed_array` undoes it.

    Args:
        labels: columns that say which sample it is, n values each.
        axes: names of the columns that count along the axes after the first.

    Example:
        >>> long_table({"id": ["a", "b"]}, {"share": [[0.1], [0.2]]}, "layer").to_dict("list")
        {'id': ['a', 'b'], 'layer': [0, 0], 'share': [0.1, 0.2]}
    """
    arrays = {name: np.asarray(each) for name, each in values.items()}
    shape = next(iter(arrays.values())).shape
    sample, *places = np.indices(shape).reshape(len(shape), -1)
    columns: dict[str, Any] = {name: np.asarray(each, dtype=object)[sample] for name, each in labels.items()}
    columns |= dict(zip(axes, places, strict=True))
    return pd.DataFrame(columns | {name: each.ravel() for name, each in arrays.items()}).infer_objects()


def count_images(clusters: Clusters) -> int:
    """How many images the samples are about."""
    return len(np.unique(np.asarray(clusters).astype(str)))


def cluster_mean(values: npt.ArrayLike) -> Array:
    """Mean over samples of `values [n, ...]`, ignoring NaN; NaN where every sample is NaN."""
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    count = finite.sum(0)
    total = np.where(finite, values, 0.0).sum(0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


@dataclass(frozen=True)
class ImageBootstrap:
    """Draws of whole images with replacement, the same ones for whatever is asked of it.

    Replicates of two quantities measured on the same samples are therefore paired and may be subtracted.

    Attributes:
        images: length n, the image of each sample.
        draws: number of replicates, B.
    """

    images: Clusters
    draws: int = 1000
    seed: int = 0

    def __getitem__(self, samples: Any) -> ImageBootstrap:
        """That of some of the samples."""
        return replace(self, images=np.asarray(self.images)[samples])

    @property
    def num_images(self) -> int:
        """How many images the samples are about."""
        return count_images(self.images)

    def counts(self) -> dict[str, int]:
        """How many samples and images, as summaries call them."""
        return {"num_samples": len(self.images), "num_images": self.num_images}

    def replicates(self, values: npt.ArrayLike) -> Array:
        """`[B, ...]` means over samples of `values [n, ...]`, as `cluster_mean`; NaN without a finite value."""
        values = np.asarray(values, dtype=np.float64)
        if len(values) == 0:
            raise ValueError("ImageBootstrap: no samples")
        if len(self.images) != len(values):
            raise ValueError(f"ImageBootstrap: {len(values)} samples but {len(self.images)} images")
        _, index = np.unique(np.asarray(self.images).astype(str), return_inverse=True)
        n_images = int(index.max()) + 1
        flat = values.reshape(len(values), -1)
        finite = np.isfinite(flat)
        sums, counts = np.zeros((2, n_images, flat.shape[1]))
        np.add.at(sums, index, np.where(finite, flat, 0.0))
        np.add.at(counts, index, finite)
        rng = np.random.default_rng(self.seed)
        means = np.full((self.draws, flat.shape[1]), np.nan)
        at_once = max(1, WEIGHTS_AT_ONCE // n_images)
        for start in range(0, self.draws, at_once):
            rows = means[start : start + at_once]
            weights = rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=len(rows)).astype(np.float64)
            count = weights @ counts
            np.divide(weights @ sums, count, out=rows, where=count > 0)
        return means.reshape(self.draws, *values.shape[1:])

    def mean(self, values: npt.ArrayLike) -> tuple[Array, Array]:
        """Mean over samples of `values [n, ...]`, and its replicates `[B, ...]`."""
        return cluster_mean(values), self.replicates(values)


def percentile_band(mean: npt.ArrayLike, replicates: Array) -> Band:
    """Pointwise percentile interval of `replicates [B, ...]` around `mean [...]`."""
    mean = np.asarray(mean, dtype=np.float64)
    low, high = np.full(mean.shape, np.nan), np.full(mean.shape, np.nan)
    known = np.isfinite(replicates).any(0)
    if known.any():
        low[known], high[known] = np.nanpercentile(replicates[:, known], TAILS, axis=0)
    return Band(mean, low, high)


def mean_band(values: npt.ArrayLike, bootstrap: ImageBootstrap) -> Band:
    """Mean over samples of `values [n, ...]` with a pointwise 95% band.

    No limits (NaN) where no draw of images differs from another: there is one image, or all have one value, which shows
    nothing of how far others would be off.

    Example:
        >>> band = mean_band([2.0] * 3, ImageBootstrap(range(3)))
        >>> float(band.mean), float(band.low)
        (2.0, nan)
    """
    band = percentile_band(*bootstrap.mean(values))
    varies = band.high - band.low > ROUNDING * np.abs(band.mean)
    return Band(band.mean, np.where(varies, band.low, np.nan), np.where(varies, band.high, np.nan))


def rate_band(values: npt.ArrayLike, clusters: Clusters) -> Band:
    """Mean over samples of `values [n, ...]` from 0 to 1 with `dyvte.gates.metrics.share_interval`: no zero width.

    Example:
        >>> band = rate_band([1.0] * 7, range(7))
        >>> float(band.mean), round(float(band.low), 2), float(band.high)
        (1.0, 0.65, 1.0)
    """
    return Band(*(np.asarray(each) for each in share_interval(values, clusters, LEVEL)))


def simultaneous_band(estimate: npt.ArrayLike, replicates: Array) -> Band:
    """Band around `estimate [...]` that covers *all* entries at once (sup-t), from `replicates [B, ...]`.

    The half width is `c * se`, `se` the bootstrap standard error of each entry and `c` the `LEVEL` quantile over
    replicates of the largest standardised deviation. An entry may therefore be picked after looking at the data.
    """
    estimate = np.asarray(estimate, dtype=np.float64)
    error, deviation = _standardised(estimate, replicates)
    critical = float(np.quantile(np.abs(deviation).max(1), LEVEL))
    return Band(estimate, estimate - critical * error, estimate + critical * error)


def one_sided_band(estimate: npt.ArrayLike, replicates: Array, level: float = LEVEL) -> Band:
    """Lower limits that hold for *all* entries at once with probability `level`, and upper limits that do (sup-t).

    As :func:`simultaneous_band`, each side by itself: `c` is the `level` quantile of the largest deviation upwards for
    the lower limits, downwards for the upper ones.
    """
    estimate = np.asarray(estimate, dtype=np.float64)
    error, deviation = _standardised(estimate, replicates)
    above, below = (float(np.quantile(side.max(1), level)) for side in (deviation, -deviation))
    return Band(estimate, estimate - above * error, estimate + below * error)


def _standardised(estimate: Array, replicates: Array) -> tuple[Array, Array]:
    """Standard error `[...]` of each entry, and how many of them each replicate is off, `[B, entries]`."""
    error = replicates.std(0, ddof=1)
    deviation = replicates - estimate
    deviation = np.divide(deviation, error, out=np.zeros_like(deviation), where=error > 1e-12)
    return error, deviation.reshape(len(replicates), -1)
