"""Slow and obvious references that share no code with the engine: the full model with visual keys masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.layout import TokenLayout
from dyvte.mllm import MLLM


@torch.no_grad()
def masked_forward(mllm: MLLM, batch: Batch, exit_layer: int | list[int], keep_maps: bool = False) -> Any:
    """A full-length forward in which layers >= k hide the visual keys; visual positions hold rubbish from there on.

    Args:
        mllm: a model with sdpa or eager attention.
        batch: its inputs.
        exit_layer: k, for all rows or for each.
        keep_maps: also return the attention maps (eager attention only), as `output.maps` [B, L, H, N, N].
    """
    rows, length = batch.layout.roles.shape
    exits = torch.tensor([exit_layer] * rows if isinstance(exit_layer, int) else exit_layer)
    maps: dict[int, Tensor] = {}
    handles = []

    def hide(index: int) -> Any:
        hidden_keys = batch.layout.visual & (exits <= index)[:, None]

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            mask = mask.expand(rows, -1, -1, -1)
            if mask.dtype == torch.bool:
                mask = (mask & ~hidden_keys[:, None, None, :]) | torch.eye(length, dtype=torch.bool)
            else:
                mask = mask.masked_fill(hidden_keys[:, None, None, :], torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    for index, layer in enumerate(mllm.layers):
        handles.append(layer.register_forward_pre_hook(hide(index), with_kwargs=True))
        if keep_maps:
            handles.append(
                mllm.attentions[index].register_forward_hook(
                    lambda module, args, output, index=index: maps.__setitem__(index, output[1])
                )
            )
    try:
        output = mllm.model(**{**batch, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    if keep_maps:
        output.maps = torch.stack([maps[index] for index in range(mllm.num_layers)], dim=1)
    return output


def with_generated(mllm: MLLM, batch: Batch, new_ids: Tensor) -> Batch:
    """The prompts of a left-padded batch followed by what was generated."""
    inputs: dict[str, Any] = dict(batch)
    inputs["input_ids"] = torch.cat([batch["input_ids"], new_ids], dim=1)
    inputs["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(new_ids)], dim=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(new_ids, dtype=inputs[name].dtype)], dim=1)
    layout = TokenLayout.from_input_ids(
        inputs["input_ids"], inputs["attention_mask"], mllm.visual_token_ids, answer_start=batch["input_ids"].shape[1]
    )
    return Batch(inputs, layout)
