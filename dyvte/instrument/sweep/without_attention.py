"""Branches through layers that do not attend, or that must run on tokens as they follow each other."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dyvte.instrument.hooks import LayerCall, Selection, output_states
from dyvte.instrument.running_state import packed_arguments
from dyvte.instrument.sweep.frames import repeat_arguments


def run_behind_padding(call: LayerCall, selection: Selection, states: Tensor) -> Tensor:
    """Run a layer that `runs_together`, without a cache, on packed states of one branch or of several.

    Args:
        call: of the layer.
        selection: b rows of n positions, packed to the left, everything that the layer sees of them.
        states: [times * b, n, d].

    Returns:
        [times * b, n, d]; anything at padding.
    """
    times = len(states) // len(selection.rows)
    aligned, there, back = behind_padding(selection)
    arguments = repeat_arguments(call, packed_arguments(call, aligned), times)
    arguments["past_key_values"] = None
    if there is None or back is None:
        return output_states(call.run(states, **arguments))
    return _moved(output_states(call.run(_moved(states, there), **arguments)), back)


def behind_padding(selection: Selection) -> tuple[Selection, Tensor | None, Tensor | None]:
    """A selection with its padding in front, and which column [b, n] each comes from on the way there and back."""
    return selection.remembered("behind padding", None, partial(_aligned, selection))


def _aligned(selection: Selection) -> tuple[Selection, Tensor | None, Tensor | None]:
    if selection.valid is None:
        return selection, None, None
    width = selection.index.shape[1]
    column = torch.arange(width, device=selection.index.device)
    padding = width - selection.valid.sum(1, keepdim=True)
    there, back = (column - padding) % width, (column + padding) % width
    aligned = Selection(selection.rows, selection.index.gather(1, there), column >= padding, selection.everyone)
    return aligned, there, back


def _moved(states: Tensor, source: Tensor) -> Tensor:
    """States [times * b, n, d] with columns from `source` [b, n]."""
    return states.gather(1, source.repeat(len(states) // len(source), 1)[:, :, None].expand_as(states))


def run_whole_rows(call: LayerCall, selection: Selection, branches: Tensor, tokens_at_once: int) -> Tensor:
    """Run a layer that does not attend on whole rows of which branches change some positions.

    Args:
        call: of the layer.
        selection: B rows of M positions that branches carry.
        branches: [n, B, M, d] their states.
        tokens_at_once: bounds memory.

    Returns:
        [n, B, M, d].
    """
    rows, length = call.hidden.shape[:2]
    whole = selection.remembered("whole rows", None, partial(_whole_rows, selection, rows, length))
    packed: dict[str, Any] = {**call.packed(whole), "past_key_values": None}
    packed["attention_mask"] = None if call.mask is None else call.mask.clone()  # another object: it is repeated
    found = []
    for some in branches.split(max(1, tokens_at_once // (rows * length))):
        states = call.hidden.repeat(len(some), 1, 1)
        for at, branch in zip(states.split(rows), some, strict=True):
            selection.put_back(at, branch)
        output = output_states(call.run(states, **repeat_arguments(call, packed, len(some))))
        found += [selection.pack(each) for each in output.split(rows)]
    return torch.stack(found)


def _whole_rows(selection: Selection, rows: int, length: int) -> Selection:
    position = torch.arange(length, device=selection.index.device)
    return Selection(selection.rows, position.expand(rows, -1), None, selection.everyone)
