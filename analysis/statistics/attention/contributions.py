"""Looking beside writing: attention on the image, and the image's share of what attention writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from ..bands import Array, ImageBootstrap, percentile_band
from ..markdown import with_limits


def compare_looking_and_writing(
    looking: npt.ArrayLike, writing: npt.ArrayLike, bootstrap: ImageBootstrap
) -> dict[str, Any]:
    """Whether the layers that look at the image most are those in which it writes most.

    Args:
        looking: `[n, L]` attention mass of the question on the image; NaN rows (no image) are left out.
        writing: `[n, L]` the image's share of what attention writes into the question.

    Returns:
        `rank_correlation` over layers (Spearman's, of the mean curves) as mean, low, high; `peak_looking` and
        `peak_writing` as layer, share there, and the 95% interval of the layer. Images are drawn together for both.

    Example:
        >>> three = ImageBootstrap(range(3), 20)
        >>> found = compare_looking_and_writing([[0.1, 0.4, 0.2]] * 3, [[0.3, 0.2, 0.1]] * 3, three)
        >>> found["peak_looking"]["layer"], found["peak_writing"]["layer"], found["rank_correlation"]["mean"]
        (1, 0, -0.5)
    """
    looking, writing = np.asarray(looking, np.float64), np.asarray(writing, np.float64)
    if looking.ndim != 2 or looking.shape != writing.shape:
        raise ValueError(f"attention is {looking.shape}, contributions are {writing.shape}; need one shape [n, L]")
    mean, draws = bootstrap.mean(np.stack([looking, writing], axis=1))
    draws = draws[np.isfinite(draws).all((1, 2))]
    correlation = percentile_band(_rank_correlation(mean[None])[0], _rank_correlation(draws))
    peaks = {f"peak_{name}": _peak(mean[i], draws[:, i]) for i, name in enumerate(("looking", "writing"))}
    return {"rank_correlation": correlation.to_dict(), **peaks}


def _rank_correlation(curves: Array) -> Array:
    """Of the two curves in each of `[B, 2, L]`; NaN where one is flat."""
    ranks = stats.rankdata(curves, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    size = np.sqrt((ranks**2).sum(-1).prod(-1))
    return np.divide(ranks.prod(1).sum(-1), size, out=np.full(len(ranks), np.nan), where=size > 0)


def _peak(mean: Array, draws: Array) -> dict[str, Any]:
    low, high = np.percentile(draws.argmax(1), [2.5, 97.5], method="nearest") if len(draws) else (np.nan, np.nan)
    return {"layer": int(mean.argmax()), "share": float(mean.max()), "low": float(low), "high": float(high)}


def looking_and_writing_in_words(found: Mapping[str, Any]) -> str:
    """What :func:`compare_looking_and_writing` found, in a sentence."""
    looking, writing = found["peak_looking"], found["peak_writing"]
    correlation = with_limits(found["rank_correlation"], ".2f", "mean")
    return (
        f"The question looks at the image most in layer {looking['layer']} ({looking['share']:.0%} of its attention), "
        f"and what attention writes into it comes from the image most in layer {writing['layer']} "
        f"({writing['share']:.0%}); over the layers the two have a rank correlation of {correlation}."
    )
