"""Models with a known answer: text that provably cannot use visual tokens from some layer on.

Every analysis should find the planted layer: attention from text to visual tokens is exactly 0 from there on, and an
exit at or after it changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.errors import UnsupportedError
from dyvte.instrument.cache import KeptLayer
from dyvte.instrument.sweep.frames import Keys
from dyvte.mllm import MLLM
from dyvte.model_parts import cache_among

_MARK = "dyvte_planted_visual"
"""Keyword by which every decoder layer hands the roles of its positions to its attention module.

As an argument of the layer it is cut along with all others when a policy or a sweep runs the layer on some positions.
"""


@contextmanager
def planted(mllm: MLLM, exit_layer: int) -> Iterator[MLLM]:
    """Within the block, text queries do not see visual keys in decoder layers `exit_layer`..L-1.

    Visual tokens go on seeing each other. Works under probes, policies, sweeps and `generate`; attention must be sdpa
    or eager.

    Args:
        mllm: the model; unchanged after the block.
        exit_layer: m in 0..L: the number of layers in which text can use visual tokens.
    """
    if not 0 <= exit_layer <= mllm.num_layers:
        raise ValueError(f"exit_layer must be in 0..{mllm.num_layers} for this model, got {exit_layer}")
    plant = _Plant(mllm)
    with ExitStack() as stack:
        stack.callback(mllm.model.register_forward_pre_hook(plant.find_roles, with_kwargs=True).remove)
        for index in range(exit_layer, mllm.num_layers):
            layer, attention = mllm.layers[index], mllm.attentions[index]
            for module in (layer, attention):
                kinds = [each.kind for each in inspect.signature(module.forward).parameters.values()]
                if inspect.Parameter.VAR_KEYWORD not in kinds:
                    raise UnsupportedError(f"{type(module).__name__} takes no further keyword arguments")
            stack.callback(layer.register_forward_pre_hook(plant.mark, with_kwargs=True).remove)
            stack.callback(attention.register_forward_pre_hook(plant.hide, with_kwargs=True).remove)
        yield mllm


class _Plant:
    """The hooks of one planted model. They do nothing on a deep copy of it."""

    def __init__(self, mllm: MLLM) -> None:
        self.mllm = mllm
        self.modules = {id(module) for module in (mllm.model, *mllm.layers, *mllm.attentions)}
        self.prompt_visual: Tensor | None = None  # [B, N] of the last prefill

    def __deepcopy__(self, memo: dict[int, Any]) -> _Plant:
        return self

    def find_roles(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: find the visual positions of a prefill."""
        if id(module) not in self.modules:
            return
        inputs = _by_name(module, args, kwargs)
        cache = cache_among(inputs)
        if cache is None or cache.get_seq_length() == 0:
            self.prompt_visual = self.mllm.layout(inputs["input_ids"], inputs.get("attention_mask")).visual

    def mark(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer: tell its attention which of the positions are visual."""
        if id(module) not in self.modules or self.prompt_visual is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        visual = self.prompt_visual
        if hidden.shape[1] != visual.shape[1]:  # new tokens after the prompt
            visual = visual.new_zeros(hidden.shape[:2])
        return args, {**kwargs, _MARK: visual}

    def hide(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the attention of a layer: take visual keys out of the mask of text queries."""
        if id(module) not in self.modules or _MARK not in kwargs:
            return None
        inputs = _by_name(module, args, kwargs)
        visual_queries = inputs.pop(_MARK)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.ndim != 4:
            raise UnsupportedError("a planted model needs sdpa or eager attention")
        visual_keys = self._visual_keys(visual_queries, cache_among(inputs), module)
        if mask is not None:  # a sliding window sees the last keys, a static cache has room for more
            visual_keys = visual_keys[:, -mask.shape[3] :]
            visual_keys = nn.functional.pad(visual_keys, (0, mask.shape[3] - visual_keys.shape[1]))
        if visual_keys.any():
            hidden = visual_keys[:, None, None, :] & ~visual_queries[:, None, :, None]
            inputs["attention_mask"] = _without(mask, hidden)
        return (), inputs

    def _visual_keys(self, visual_queries: Tensor, cache: Any, module: Any) -> Tensor:
        """[b, K] which of the keys that this call sees are visual."""
        assert self.prompt_visual is not None
        visual = self.prompt_visual
        if getattr(cache, "positions", None) is not None:  # a sweep's, for some rows and positions
            return visual[cache.rows].gather(1, cache.positions)
        layers = [] if isinstance(cache, Keys) else getattr(cache, "layers", [])
        stored = layers[module.layer_idx] if module.layer_idx < len(layers) else None
        past = 0 if stored is None else stored.get_seq_length()
        if past == 0:
            return visual_queries
        if visual_queries.any():
            raise UnsupportedError("a planted model needs its prompt in one piece (no chunked prefill)")
        num_queries, length = visual_queries.shape[1], visual.shape[1]
        if isinstance(stored, KeptLayer):
            position, valid, _ = stored.key_positions(num_queries)
            return visual.gather(1, position.clamp(max=length - 1)) & valid & (position < length)
        return nn.functional.pad(visual, (0, past + num_queries - length))


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def _without(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The mask without the `hidden` pairs [b, 1, q, K]; no mask means causal attention."""
    if mask is None:
        num_queries, num_keys = hidden.shape[2:]
        causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=hidden.device)
        return causal.tril(num_keys - num_queries) & ~hidden
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
