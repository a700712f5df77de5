"""What a gate looks at, put together from token statuses: the status, its change between layers, and the lens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dyvte.gates.lens import LENS_FEATURES
from dyvte.instrument.states import STATUS_PARTS

LENS = "lens"
"""A status part of three numbers: how sure the model already is of its next token, see `dyvte.gates.lens`."""
QUESTION = "question"
"""A status part for the control that never saw the image (see `dyvte.gates.labels`); no policy can run it."""
CHANGE = "_change"
"""Ending of a part that is the change of the part named before it: its value less that after the layer before."""
GATE_PARTS = (*STATUS_PARTS, LENS, QUESTION, *(f"{part}{CHANGE}" for part in (*STATUS_PARTS, LENS)))
"""What a gate may look at."""


def base_of(part: str) -> str:
    """The part that a change is of; any other part itself."""
    return part.removesuffix(CHANGE)


def width_of(part: str, hidden_size: int) -> int:
    """Entries of a part."""
    return len(LENS_FEATURES) if base_of(part) == LENS else hidden_size


def bases_of(parts: Sequence[str]) -> list[str]:
    """The parts that `parts` are made of, each once.

    Example:
        >>> bases_of(["text_last", "text_last_change", "lens_change"])
        ['text_last', 'lens']
    """
    return list(dict.fromkeys(map(base_of, parts)))


def at_layer(parts: Sequence[str], now: Mapping[str, Tensor], before: Mapping[str, Tensor] | None) -> Tensor:
    """[B, inputs] what one gate looks at: `assemble` for a single layer, as a prefill meets them one by one.

    `now` and `before` hold every part of `bases_of(parts)`, [B, width], after the gate's layer and the one before it;
    `before` is None for the first.
    """
    return _joined(parts, now, lambda base: torch.zeros_like(now[base]) if before is None else now[base] - before[base])


def assemble(parts: Sequence[str], base: Mapping[str, Tensor]) -> Tensor:
    """[..., L - 1, inputs] what the gates of all layers look at, parts one after the other.

    `base` holds every part of `bases_of(parts)`, [..., L - 1, width]. Behind the first layer there is no change: 0.

    Example:
        >>> assemble(["lens", "lens_change"], {"lens": torch.tensor([[1.0, 2, 3], [1, 4, 9]])})
        tensor([[1., 2., 3., 0., 0., 0.],
                [1., 4., 9., 0., 2., 6.]])
    """
    return _joined(parts, base, lambda part: F.pad(base[part][..., 1:, :] - base[part][..., :-1, :], (0, 0, 1, 0)))


def _joined(parts: Sequence[str], base: Mapping[str, Tensor], change: Callable[[str], Tensor]) -> Tensor:
    return torch.cat([change(base_of(part)) if part.endswith(CHANGE) else base[part] for part in parts], dim=-1)
