"""When visual tokens may leave: the KL criterion, exit labels and exit depths, as pure tensor functions.

Exit layers k = 0..L are the last axis of every table `[..., L + 1]`; the entry at L is the full model.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KL_DIRECTIONS = ("exit_to_full", "full_to_exit")

KL_PRESETS = {"llava-1.5-7b": 0.003, "llava-1.5-13b": 0.0005, "llava-next-7b": 0.0001}
"""Thresholds eta published by VTW (arXiv 2405.05803), found in the models' half precision from about 20 samples."""

KL_START = 5
"""First exit layer that VTW's search considers."""


def kl_to_full(logits: Tensor, direction: Literal["exit_to_full", "full_to_exit"] = "exit_to_full") -> Tensor:
    """Divergence of every exit's next-token distribution from the full model's, in nats.

    Args:
        logits: [..., L + 1, vocab].
        direction: "exit_to_full" is KL(P_exit || P_full), what VTW's released code computes; "full_to_exit" is
            KL(P_full || P_exit).

    Returns:
        [..., L + 1]; 0 at L.
    """
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(KL_DIRECTIONS)}, got {direction!r}")
    exit_log = logits.float().log_softmax(-1)
    full_log = exit_log[..., -1:, :]
    first, second = (exit_log, full_log) if direction == "exit_to_full" else (full_log, exit_log)
    # Ruled-out tokens (logit -inf in both) add nothing; rounding may leave a tiny negative sum.
    terms = torch.where(first == -torch.inf, 0.0, first.exp() * (first - second))
    return terms.sum(-1).clamp(min=0)


def kl_exit_layer(divergence: Tensor, eta: float, start: int = KL_START) -> int | None:
    """K* = min {k >= start : D[k] <= eta} (VTW, arXiv 2405.05803), None if there is none.

    Args:
        divergence: [L + 1] mean KL of every exit, in nats.
        eta: threshold, in nats.
        start: first exit layer considered.
    """
    below = (divergence[start:] <= eta).nonzero().flatten()
    return start + int(below[0]) if len(below) else None


def kl_stays_below(divergence: Tensor, eta: float, start: int = KL_START) -> int | None:
    """First k >= start from which D[j] <= eta for all j >= k, None if there is none."""
    stays = _holds_from_here_on(divergence[start:] <= eta).nonzero().flatten()
    return start + int(stays[0]) if len(stays) else None


def sequence_nll(token_nll: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of an answer: mean of the negative log-likelihood of its tokens, in nats.

    Args:
        token_nll: [B, L + 1, A].
        valid: [B, A] False at padding.

    Returns:
        [B, L + 1].
    """
    weights = valid[:, None, :].to(token_nll.dtype)
    return (token_nll.nan_to_num(0.0) * weights).sum(-1) / weights.sum(-1)


def paper_labels(agree: Tensor, nll: Tensor, ratio: float = 1.03, eps: float = 1e-3) -> Tensor:
    """Exit labels after DyVTE (arXiv 2411.19628), teacher-forced on A, the full model's greedy answer.

    y[k] = 1 iff every argmax under exit k is A's token and CE_k(A) <= max(ratio * CE_full(A), CE_full(A) + eps). `eps`
    keeps the rounding noise of a confident model (CE near 0) out of the labels; it is our addition.

    Args:
        agree: [..., L + 1] boolean, every argmax under exit k is A's token (end token included).
        nll: [..., L + 1] CE_k(A), mean over A's tokens, in nats.
        ratio: allowed factor on the full model's cross-entropy.
        eps: allowed difference, in nats.

    Returns:
        [..., L + 1] boolean.
    """
    full = nll[..., -1:]
    return agree.bool() & (nll <= torch.maximum(ratio * full, full + eps))


def token_agreement(token_argmax: Tensor, valid: Tensor) -> Tensor:
    """[B, L + 1] share of an answer's positions at which an exit's likeliest token is the full model's.

    Args:
        token_argmax: [B, L + 1, A].
        valid: [B, A] False at padding.
    """
    same = (token_argmax == token_argmax[:, -1:]) & valid[:, None, :]
    return same.sum(-1) / valid.sum(-1)[:, None]


def release_labels(agreement: Tensor, nll: Tensor, ratio: float = 1.03) -> Tensor:
    """Exit labels [B, L + 1] as in DyVTE's published code, teacher-forced on the ground truth.

    y[k] = 1 iff the argmax sequences of exit k and of the full model agree on at least 99% of the positions (end token
    included) and CE_k < 1.03 * CE_full. The full model itself (k = L) is always labelled 1.

    Args:
        agreement: [B, L + 1] of `token_agreement`.
        nll: [B, L + 1] cross-entropy of the ground truth, mean over its tokens, in nats.
        ratio: allowed factor on the full model's cross-entropy.
    """
    labels = (agreement >= 0.99) & (nll < ratio * nll[:, -1:])
    labels[:, -1] = True
    return labels


def exit_depth(labels: Tensor) -> Tensor:
    """First k with y[j] = 1 for all j >= k: from there on visual tokens are not needed.

    Args:
        labels: [..., L + 1] boolean; the full model (k = L) counts as 1 whatever its entry says.

    Returns:
        [...] in 0..L.
    """
    return _holds_from_here_on(_with_full_model(labels)).int().argmax(-1)


def lucky_exit_depth(labels: Tensor) -> Tensor:
    """Smallest k with y[k] = 1, even where a later exit fails: [...] in 0..L."""
    return _with_full_model(labels).int().argmax(-1)


def _with_full_model(labels: Tensor) -> Tensor:
    return torch.cat([labels[..., :-1].bool(), torch.ones_like(labels[..., -1:], dtype=torch.bool)], dim=-1)


def _holds_from_here_on(condition: Tensor) -> Tensor:
    """[..., K] whether `condition` holds at this and all later entries."""
    return condition.flip(-1).int().cumprod(-1).flip(-1).bool()
