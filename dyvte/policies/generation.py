"""Which ways of generating run under a policy, and whether two policies are the same."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.errors import UnsupportedError

DYNAMIC_CACHES = ("dynamic", "dynamic_full", "hybrid")
"""Cache implementations that are dynamic; "hybrid" is what transformers itself takes for dynamic (its #40039)."""


def same_settings(one: Any, other: Any) -> bool:
    """Whether two settings, or lists of policies, are equal in type, values and weights."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(one, other.to(one.device))
    if isinstance(one, nn.Module):
        return same_settings(dict(one.state_dict()), dict(other.state_dict()))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_settings(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_settings, one, other))
    if is_dataclass(one) and not isinstance(one, type):
        return all(same_settings(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))
    return bool(one == other)


def check_generation(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse ways of generating that do not go through one prefill and single steps on a dynamic cache."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    settings = {**copy.copy(config).to_dict(), **kwargs}
    if model.training and getattr(model, "is_gradient_checkpointing", False):
        raise UnsupportedError(
            "gradient checkpointing in train mode generates without a KV cache: call model.eval() before generating"
        )
    if settings.get("prefill_chunk_size") is not None:
        raise UnsupportedError("chunked prefill (prefill_chunk_size) is not supported: a policy needs the whole prompt")
    assistant = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    for name in assistant:
        if settings.get(name) is not None and settings[name] is not False:
            raise UnsupportedError(
                f"assisted decoding ({name}) is not supported: it takes tokens back from the KV cache"
            )
    implementation = settings.get("cache_implementation")
    if implementation is not None and implementation not in DYNAMIC_CACHES:
        raise UnsupportedError(f"a KV cache of kind {implementation!r} is not supported under a policy; use 'dynamic'")
