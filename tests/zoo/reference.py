"""Slow and obvious: one row of a batch, alone and at full length, with what left hidden or left out.

No code of the engine. A visual token that left is hidden as a key from attention, by the mask. A layer that carries a
running state over the sequence (recurrent, convolution, state space) runs on the positions that are left, and nothing
else is possible there: what it gives depends on which positions it runs over.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.mllm import MLLM
from dyvte.model_parts import self_attention_of

RUNNING_STATE = ("linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding")
"""Kinds of layer, in the words of transformers' `layer_types`, that carry a state from position to position."""

POOLS = ("Glm5NextTextIndexer",)
"""Choose pools of neighbouring tokens, which change with the tokens: such layers, too, run on what is left."""


@torch.no_grad()
def logits_alone(mllm: MLLM, batch: Batch, leaves: Sequence[int]) -> Tensor:
    """Logits [N, vocabulary] of a batch of one row without padding.

    Args:
        mllm: a model with sdpa or eager attention.
        batch: its inputs.
        leaves: of every visual token of the row, the first layer that does not see it.
    """
    assert batch.layout.roles.shape[0] == 1
    assert not batch.layout.padding.any()
    length = batch.layout.roles.shape[1]
    handles: list[Any] = []
    for index, layer in enumerate(mllm.layers):
        left = torch.zeros(length, dtype=torch.bool)
        left[batch.layout.visual[0]] = torch.tensor(leaves) <= index
        if not left.any():
            continue
        if _has_running_state(mllm, index):
            kept, outer = (~left).nonzero()[:, 0], {}
            handles.append(layer.register_forward_pre_hook(partial(_shorten, kept, outer), with_kwargs=True))
            handles.append(layer.register_forward_hook(partial(_lengthen, kept, outer)))
        else:
            handles.append(layer.register_forward_pre_hook(partial(_hide, left.expand(length, -1)), with_kwargs=True))
    return _run(mllm, batch, handles)


@torch.no_grad()
def logits_cut(mllm: MLLM, batch: Batch, queries: Tensor, keys: Tensor, layers: Sequence[int]) -> Tensor:
    """Logits [N, vocabulary] of a batch of one row where in some layers no query [N] sees any of the keys [N].

    A layer that carries a running state has no scores to cut.
    """
    hide = partial(_hide, queries[:, None] & keys)
    attending = [mllm.layers[index] for index in layers if self_attention_of(mllm.layers[index]) is not None]
    return _run(mllm, batch, [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in attending])


def _run(mllm: MLLM, batch: Batch, handles: Sequence[Any]) -> Tensor:
    try:
        return mllm.model(**batch, use_cache=False).logits[0, -batch.layout.roles.shape[1] :]
    finally:
        for handle in handles:
            handle.remove()


def _has_running_state(mllm: MLLM, index: int) -> bool:
    kinds = getattr(mllm.text_config, "layer_types", None) or getattr(mllm.text_config, "layers_block_type", None)
    named = kinds is not None and kinds[index] in RUNNING_STATE
    attention = self_attention_of(mllm.layers[index])
    return named or attention is None or type(getattr(attention, "indexer", None)).__name__ in POOLS


def _hide(hidden: Tensor, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Keys are hidden from queries [N, N], but a query sees itself."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    kwargs = dict(zip(names, args, strict=False)) | kwargs  # some decoders give the mask by its place
    mask = kwargs.get("attention_mask")
    length = len(hidden)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if mask.dtype == torch.bool:
        mask = (mask & ~hidden) | torch.eye(length, dtype=torch.bool)
    else:
        mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    return (), {**kwargs, "attention_mask": mask}


def _cut(value: Any, kept: Tensor, length: int) -> Any:
    """An argument at some positions: every axis as long as the sequence is cut, in tuples and dictionaries too."""
    if isinstance(value, tuple | list):
        return type(value)(_cut(each, kept, length) for each in value)
    if not isinstance(value, Tensor):
        return value
    for axis in range(value.ndim):
        if value.shape[axis] == length:
            value = value.index_select(axis, kept)
    return value


def _shorten(kept: Tensor, outer: dict[str, Tensor], module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    outer["hidden"], length = hidden, hidden.shape[1]
    return _cut(args, kept, length), {name: _cut(value, kept, length) for name, value in kwargs.items()}


def _lengthen(kept: Tensor, outer: dict[str, Tensor], module: Any, args: Any, output: Any) -> Any:
    states = output[0] if isinstance(output, tuple) else output
    whole = outer.pop("hidden").clone()
    whole[:, kept] = states
    return (whole, *output[1:]) if isinstance(output, tuple) else whole
