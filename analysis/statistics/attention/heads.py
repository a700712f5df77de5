"""Which heads look at the image, how many of them carry a layer's attention on it, and how common the valley is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dyvte.gates.metrics import wilson_limits

from ..bands import Array, Band, ImageBootstrap, percentile_band
from ..markdown import with_limits
from ..stages import MIN_EFFECT, log_endpoint

CARRIED = 0.5
"""The heads that carry a layer: the fewest that together hold this share of its attention on the image."""


def summarise_heads(
    mass: npt.ArrayLike, enrichment: npt.ArrayLike, split: Sequence[int] | None, bootstrap: ImageBootstrap
) -> dict[str, Any]:
    """What the heads of a model do, with 95% intervals over images; a head's value is its mean over questions.

    Args:
        mass: `[n, L, H]` attention of the question on the image; NaN samples (no image) are left out.
        enrichment: `[n, L, H]` the same without the sink over even spread (1).
        split: (b1, b2) that cuts the layers into three stages; None for none.

    Returns:
        `mass`, `enrichment`: `[L][H]`. `looking`: by layer, the share of heads that look at the image more than even
        spread; `looking_overall` over all layers. `carrying`: by layer, the smallest share of heads that together hold
        `CARRIED` of its attention on the image. `prevalence` (with a split): how often of two heads, one of each
        stage, the outer one looks at the image more by a tenth at least: `fall` (first over second), `rise` (third).
        Heads of different layers are not the same head, so they are compared in pairs, all with all.

    Example:
        >>> heads = np.array([[3.0, 3.0], [0.5, 0.5], [2.0, 0.2]])[None].repeat(4, 0)  # 3 layers of 2 heads
        >>> found = summarise_heads(heads / 10, heads, (1, 2), ImageBootstrap(range(4), 20))
        >>> found["looking"]["mean"], found["prevalence"]["fall"]["mean"], found["prevalence"]["rise"]["mean"]
        ([1.0, 0.0, 0.5], 1.0, 0.5)
    """
    means, draws = zip(bootstrap.mean(mass), bootstrap.mean(enrichment), strict=True)
    known = np.isfinite(draws[0]).all((1, 2)) & np.isfinite(draws[1]).all((1, 2))

    def band(of: Any, which: int) -> dict[str, Any]:
        found = percentile_band(of(means[which][None])[0], of(draws[which][known]))
        # All heads, or none, in every draw: that shows nothing of how much images vary, so these are counted.
        flat = (found.low == found.high) & np.isin(found.mean, (0.0, 1.0))
        low, high = wilson_limits(np.where(flat, found.mean, np.nan), bootstrap.num_images)
        return Band(found.mean, np.where(flat, low, found.low), np.where(flat, high, found.high)).to_dict()

    found = {
        "mass": means[0].tolist(),
        "enrichment": means[1].tolist(),
        "carried": CARRIED,
        "looking": band(lambda each: (each > 1).mean(-1), 1),
        "looking_overall": band(lambda each: (each > 1).mean((-1, -2)), 1),
        "carrying": band(_carrying, 0),
        "prevalence": None,
    }
    if split is not None:
        first, second = split
        found["prevalence"] = {
            "split": [first, second],
            "fall": band(lambda each: _above(each[:, :first], each[:, first:second]), 1),
            "rise": band(lambda each: _above(each[:, second:], each[:, first:second]), 1),
        }
    return found


def _carrying(mass: Array) -> Array:
    """`[B, L, H]` -> `[B, L]` the smallest share of heads with `CARRIED` of the sum."""
    held = np.sort(mass, axis=-1)[..., ::-1].cumsum(-1)
    needed = CARRIED * held[..., -1:] * (1 - 1e-12)  # half of an even split is half of the heads, whatever the rounding
    return ((held < needed).sum(-1) + 1) / mass.shape[-1]


def _above(outer: Array, middle: Array) -> Array:
    """`[B]` share of the pairs of a head of `outer [B, l, H]` and one of `middle` in which the outer one looks more."""
    found = []
    for high, low in zip(log_endpoint(outer), log_endpoint(middle), strict=True):
        least = np.sort(low.ravel()) + MIN_EFFECT
        found.append(np.searchsorted(least, high.ravel(), side="left").mean() / least.size)
    return np.array(found)


def heads_in_words(found: dict[str, Any]) -> str:
    """What :func:`summarise_heads` found, in a sentence or two."""
    text = (
        f"{with_limits(found['looking_overall'], '.0%', 'mean')} of the heads look at the image more than even spread; "
        f"{found['carried']:.0%} of a layer's attention on it is carried by "
        f"{min(found['carrying']['mean']):.0%} to {max(found['carrying']['mean']):.0%} of its heads."
    )
    if found["prevalence"] is None:
        return text
    fall, rise = (with_limits(found["prevalence"][name], ".0%", "mean") for name in ("fall", "rise"))
    b1, b2 = found["prevalence"]["split"]
    return f"{text} At the split ({b1}, {b2}) {fall} of the pairs of heads show the fall, {rise} the rise."
