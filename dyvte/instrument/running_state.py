"""Decoder layers that do not attend: linear attention, state spaces, convolutions; and experts by themselves.

What such a layer gives at a position depends on the states of those before it alone, so it can run on some positions:
its state is then built from these, and an exit means that it is built from text. It must not run over padding, which
goes in front of the positions and is masked: zeros leave an empty state empty. Layers without any state go the same
way, and those that attend to pools of keys, which they count off in the order in which these come
(`dyvte.model_parts.runs_together`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from dyvte.instrument.hooks import LayerCall, Selection

_MASKS = ("attention_mask", "conv_mask")
"""Arguments that tell a layer which of its positions are padding."""


def packed_arguments(call: LayerCall, selection: Selection, places: Selection | None = None) -> dict[str, Any]:
    """The arguments of a layer that does not attend, for the positions in `selection`, whose padding is in front."""
    packed = call.packed(selection, places=places)
    for name in _MASKS:
        mask = call.arguments.get(name)
        if selection.valid is None and isinstance(mask, Tensor) and mask.ndim == 2:  # some layers want one always
            packed[name] = torch.ones_like(selection.index, dtype=mask.dtype)
        elif name in packed:
            packed[name] = selection.valid
    return packed


def over_all_layers(statistics: Any, layers: Sequence[int], num_layers: int) -> Any:
    """A dataclass of tensors [B, n, ...] of n layers with NaN for those in between, [B, num_layers, ...]."""
    if len(layers) == num_layers:
        return statistics

    def spread(found: Tensor) -> Tensor:
        full = found.new_full((len(found), num_layers, *found.shape[2:]), torch.nan)
        full[:, list(layers)] = found
        return full

    values = {each.name: getattr(statistics, each.name) for each in fields(statistics)}
    return replace(statistics, **{name: spread(value) for name, value in values.items() if isinstance(value, Tensor)})
