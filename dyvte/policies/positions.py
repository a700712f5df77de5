"""Position ids of what is left: the original ones, or counted anew as if the dropped tokens had never been there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.errors import ConfigError, UnsupportedError
from dyvte.mllm import MLLM
from dyvte.model_parts import cache_among
from dyvte.policies.base import PolicyRun, Prefill

POSITIONS = ("kept", "contiguous")


def check_positions(name: str, positions: str, mllm: MLLM) -> None:
    """Refuse an unknown kind of positions, and models that "contiguous" has no exact meaning for.

    Raises:
        ConfigError: neither "kept" nor "contiguous".
        UnsupportedError: "contiguous" for a decoder with several position axes (M-RoPE), with sliding windows, or
            without a rotary embedding of its own.
    """
    if positions not in POSITIONS:
        raise ConfigError(f"{name}: positions is one of {', '.join(POSITIONS)}, got {positions!r}")
    if positions == "kept":
        return
    config = mllm.text_config
    if (getattr(config, "rope_parameters", None) or {}).get("mrope_section"):
        raise UnsupportedError(
            f"{name}: positions='contiguous' has no meaning on the several position axes of {config.model_type!r}; use "
            "positions='kept'"
        )
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if windows or getattr(config, "sliding_window", None):
        raise UnsupportedError(
            f"{name}: positions='contiguous' is not supported with sliding windows, which count original positions; "
            "use positions='kept'"
        )
    if not isinstance(getattr(mllm.decoder, "rotary_emb", None), nn.Module):
        raise UnsupportedError(f"{name}: positions='contiguous' needs a decoder with a rotary embedding")


def make_contiguous(prefill: Prefill) -> None:
    """Give the kept positions of every row the position ids of the row's first tokens, in order.

    To be called before decoder layer 0 and after what leaves there was dropped.
    """
    order = prefill.layout.padding.to(torch.int8).argsort(dim=1, stable=True)  # a row's tokens, then its padding
    rank = (prefill.kept.cumsum(1) - 1).clamp(min=0)
    prefill.place = order.gather(1, rank)
    prefill.state["left behind"] = (~prefill.layout.padding & ~prefill.kept).sum(1)


@contextmanager
def shifted_decoding(mllm: MLLM, run: PolicyRun) -> Iterator[None]:
    """Within the block generated tokens follow on contiguous positions of their prefill."""
    model: nn.Module = mllm.model
    rotary: Any = mllm.decoder.rotary_emb
    decoding = False

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal decoding
        cache = cache_among(kwargs)
        decoding = module is model and cache is not None and cache.get_seq_length() > 0

    def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        left: Tensor | None = None if run.prefill is None else run.prefill.state.get("left behind")
        if module is not rotary or not decoding or left is None:
            return None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": kwargs["position_ids"] - left[:, None]}
        return (args[0], args[1] - left[:, None], *args[2:]), kwargs

    with (
        model.register_forward_pre_hook(begin, with_kwargs=True),
        rotary.register_forward_pre_hook(shift, with_kwargs=True),
    ):
        yield
