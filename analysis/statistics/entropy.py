"""What an exit does to the entropy of the text's self-attention: direction, a floor to hold it against, and answers.

E[k, l] is the entropy in layer l under exit k (arXiv 2411.19628, Fig. 4). A mean of absolute changes
would have a positive floor of its own and no direction, so changes keep their sign, and the floor is measured: how far
the entropy of the same question moves in the same layers when another image is shown.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from .bands import Array, Band, ImageBootstrap, mean_band, percentile_band


def layers_after(values: Array) -> Array:
    """`[n, L - 1]` mean over the layers l > k for every exit k = 0..L-2, of `[n, L + 1, L]`, or `[n, L]` for all exits.

    Layer l = k itself is left out: there the text does not know of the exit yet.
    """
    num_layers = values.shape[-1]
    columns = [(values if values.ndim == 2 else values[:, k])[:, k + 1 :].mean(1) for k in range(num_layers - 1)]
    return np.stack(columns, axis=1) if columns else np.zeros((len(values), 0))


def exit_change(entropy: npt.ArrayLike) -> Array:
    """`[n, L - 1]` mean over l > k of E[k, l] - E[L, l]: what exit k changes, with its sign, in the layers after it.

    Args:
        entropy: E[k, l] of each question, `[n, L + 1, L]`; row L is the full model.

    Example:
        >>> entropy = np.zeros((1, 4, 3)); entropy[0, 0] = 0.5
        >>> exit_change(entropy).tolist()
        [[0.5, 0.0]]
    """
    entropy = np.asarray(entropy, dtype=np.float64)
    return layers_after(entropy - entropy[:, -1:])


def swap_floor(entropy: npt.ArrayLike, swapped: npt.ArrayLike) -> Array:
    """`[n, L - 1]` |mean over l > k of E_swapped[l] - E[L, l]|: how far another image moves the entropy, in nats.

    Args:
        entropy: `[n, L + 1, L]` as above.
        swapped: `[n, L]` of the full model with another scene's image; NaN where there is none.
    """
    entropy = np.asarray(entropy, dtype=np.float64)
    return np.abs(layers_after(np.asarray(swapped, dtype=np.float64) - entropy[:, -1]))


def rank_correlation(values: Array, changed: Array, bootstrap: ImageBootstrap) -> Band:
    """Spearman's correlation between `values [n, K]` and `changed [n, K]`, column by column, with a 95% interval.

    The interval draws images, with the ranks of all questions kept. NaN where either does not vary.

    Example:
        >>> rising = np.arange(12.0)[:, None]
        >>> float(rank_correlation(rising, rising**3, ImageBootstrap(range(12), 50)).mean[0])
        1.0
    """
    x, y = (rankdata(each, axis=0) for each in (values, changed))
    x, y = x - x.mean(0), y - y.mean(0)
    moments = np.stack([x, y, x * y, x**2, y**2], axis=1)  # [n, 5, K]

    def correlation(means: Array) -> Array:
        mx, my, mxy, mxx, myy = np.moveaxis(means, -2, 0)
        spread = np.maximum((mxx - mx**2) * (myy - my**2), 0)
        return np.divide(mxy - mx * my, np.sqrt(spread), out=np.full(mx.shape, np.nan), where=spread > 1e-9)

    return percentile_band(*map(correlation, bootstrap.mean(moments)))


def entropy_change(entropy: Array, swapped: Array, agree: Array, bootstrap: ImageBootstrap) -> dict[str, Band]:
    """What every exit k = 0..L-2 does to the entropy, beside another image and the answers.

    Args:
        entropy, swapped: as above.
        agree: `[n, L + 1]` whether an exit keeps the answer.

    Returns:
        Bands `[L - 1]`: `signed`, the mean change in nats; `floor`, the mean distance that another image brings, in
        nats, NaN where there was none; `answers`, Spearman's correlation between a question's change and whether the
        exit changes its answer.
    """
    change = exit_change(entropy)
    return {
        "signed": mean_band(change, bootstrap),
        "floor": mean_band(swap_floor(entropy, swapped), bootstrap),
        "answers": rank_correlation(change, 1 - agree[:, : change.shape[1]], bootstrap),
    }
