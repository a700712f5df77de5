"""Token status: what an exit gate looks at, as pure functions of hidden states and roles.

DyVTE's gate (arXiv 2411.19628) looks at the text tokens only; the paper's Table 3 compares other choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyvte.layout import TokenLayout

STATUS_PARTS = ("text_mean", "text_last", "image_mean", "image_last")
"""What a status may be made of: means and last states of the text after the image, and of the visual tokens."""

TEXT_STATUS = ("text_mean", "text_last")
"""The status of the paper's gate."""


def status_weights(layout: TokenLayout, parts: Sequence[str] = TEXT_STATUS) -> Tensor:
    """Weights [B, P, N] that average the hidden states of a batch to P status parts.

    `text_mean` averages the instruction positions after the last visual one, except the prompt's last; where there is
    no other, it is the last itself. `text_last` is the prompt's last position. `image_mean` averages all visual
    positions and `image_last` is the last of them; both are zero in a row without image.

    Raises:
        ValueError: an unknown part.
    """
    unknown = [part for part in parts if part not in STATUS_PARTS]
    if unknown:
        raise ValueError(f"unknown status part {unknown[0]!r}; choose from {', '.join(STATUS_PARTS)}")
    position = torch.arange(layout.roles.shape[1], device=layout.roles.device)
    text_last = position == layout.last_prompt[:, None]
    text_mean = layout.text_status_positions & ~text_last
    visual = layout.visual
    last_visual = torch.where(visual, position, -1).amax(1, keepdim=True)
    masks = {
        "text_mean": torch.where(text_mean.any(1, keepdim=True), text_mean, text_last),
        "text_last": text_last,
        "image_mean": visual,
        "image_last": visual & (position == last_visual),
    }
    chosen = torch.stack([masks[part] for part in parts], dim=1).float()
    return chosen / chosen.sum(-1, keepdim=True).clamp(min=1)


def token_status(hidden: Tensor, weights: Tensor) -> Tensor:
    """Status [B, P * d] of hidden states [B, N, d] under `status_weights` [B, P, N], parts one after the other."""
    return torch.bmm(weights.to(hidden.dtype), hidden).flatten(1)


def text_status(hidden: Tensor, layout: TokenLayout) -> Tensor:
    """The paper's gate input [B, 2d]: mean of the instruction states except the last, then the prompt's last state."""
    return token_status(hidden, status_weights(layout))
