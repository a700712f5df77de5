"""Policies that look at the attention of decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.cost.flops import overhead
from dyvte.instrument.attention_calls import AttentionCall, watch_attention
from dyvte.instrument.cache import KeptLayer
from dyvte.instrument.hooks import Selection
from dyvte.instrument.role_attention import MAP_ENTRIES, allowed_pairs
from dyvte.mllm import MLLM
from dyvte.model_parts import cache_among
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.token_scores import attention_rows


@dataclass
class LayerAttention:
    """The attention of one decoder layer, on the positions of `selection` [b, n] that it ran on.

    The model computes its own attention unchanged; rows asked for here are computed anew from its queries and keys, or
    taken from its weights where it computed them anyway (eager attention).
    """

    call: AttentionCall
    selection: Selection

    @property
    def num_heads(self) -> int:
        """H, the number of query heads."""
        return self.call.query.shape[1]

    @cached_property
    def allowed(self) -> tuple[Tensor, Tensor | None]:
        """[b, n, n] which keys a query may see, and what the mask adds to their scores [b, 1 or H, n, n]."""
        rows, length = self.selection.index.shape
        call, device = self.call, self.call.query.device
        allowed, bias = allowed_pairs(call.mask, length, call.causal, call.sliding_window, device)
        if allowed is None:
            allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
        if self.selection.valid is not None:
            allowed = allowed & self.selection.valid[:, None, :]
        return allowed.expand(rows, -1, -1), None if bias is None else bias.expand(rows, -1, -1, -1)

    def rows(self, queries: slice) -> Tensor:
        """Attention [b, H, q, n] of a slice of the n queries."""
        if self.call.weights is not None:
            return self.call.weights[:, :, queries].float()
        allowed, bias = self.allowed
        bias = None if bias is None else bias[:, :, queries]
        return self._computed(self.call.query[:, :, queries], allowed[:, queries], bias)

    def row(self, position: Tensor) -> Tensor:
        """Attention [b, H, n] of one query a row, at position [B] of the whole sequence."""
        local = (self.selection.index == position[self.selection.rows][:, None]).int().argmax(1)
        at = local[:, None, None]
        if self.call.weights is not None:
            weights = self.call.weights
            return weights.gather(2, at[:, None].expand(-1, weights.shape[1], 1, weights.shape[3]))[:, :, 0].float()
        allowed, bias = self.allowed
        query, width = self.call.query, allowed.shape[2]
        query = query.gather(2, at[:, None].expand(-1, query.shape[1], 1, query.shape[3]))
        bias = None if bias is None else bias.gather(2, at[:, None].expand(-1, bias.shape[1], 1, width))
        return self._computed(query, allowed.gather(1, at.expand(-1, 1, width)), bias)[:, :, 0]

    def _computed(self, query: Tensor, allowed: Tensor, bias: Tensor | None) -> Tensor:
        key = self.call.key[:, :, : allowed.shape[2]]
        return attention_rows(query, key, allowed, self.call.scale, bias, self.call.softcap)

    def received(self, queries: Tensor) -> Tensor:
        """Attention [b, n] that every key receives from some queries: mean over heads, summed over them.

        Args:
            queries: [B, N] boolean, positions of the whole sequence.
        """
        asked = self.selection.pack(queries.float())
        if self.selection.valid is not None:
            asked = asked * self.selection.valid
        places = asked.any(0).nonzero().flatten().tolist()
        received = torch.zeros_like(asked)
        at_once = max(1, MAP_ENTRIES // (asked.numel() * self.num_heads))
        for start in range(places[0], places[-1] + 1, at_once) if places else ():
            part = slice(start, min(start + at_once, places[-1] + 1))
            received += (asked[:, None, part] @ self.rows(part).mean(1))[:, 0]
        return received

    def unpacked(self, packed: Tensor, like: Tensor) -> Tensor:
        """Values [b, n] of the selected positions within [B, N], zero elsewhere."""
        full = torch.zeros(like.shape, dtype=packed.dtype, device=packed.device)
        self.selection.put_back(full, packed)
        return full


@dataclass
class AttentionPolicy(Policy):
    """A policy that decides from the attention of earlier layers. Override `watched_layers` and `see`.

    Example:
        >>> class LastTokensHalf(dyvte.AttentionPolicy):
        ...     def watched_layers(self, mllm):
        ...         return [1]
        ...     def see(self, layer, prefill, attention):
        ...         received = attention.row(prefill.layout.last_prompt).mean(1)  # [b, n], of the layer's positions
        ...         prefill.state["received"] = attention.unpacked(received, prefill.kept.float())
        ...     def before_layer(self, layer, prefill):
        ...         if layer == 2:
        ...             received = prefill.state["received"]
        ...             prefill.drop(received < received[prefill.layout.visual].median())
        >>> with LastTokensHalf()(mllm) as run:
        ...     logits = mllm(**batch).logits
    """

    def watched_layers(self, mllm: MLLM) -> Collection[int]:
        """Layers whose attention the policy looks at."""
        raise NotImplementedError

    def see(self, layer: int, prefill: Prefill, attention: LayerAttention) -> None:
        """Take what is needed from the attention of a watched layer, during prefill, into `prefill.state`.

        Called while the layer runs, once for the rows with and once for those without visual tokens where the layer
        runs on them apart.
        """
        raise NotImplementedError

    def hooks(self, mllm: MLLM, run: PolicyRun) -> AbstractContextManager[None]:
        """As `Policy.hooks`; also refuses models whose attention cannot be watched."""
        return watch_prefill(mllm, run, self.watched_layers(mllm), self.see)


def watch_prefill(
    mllm: MLLM, run: PolicyRun, layers: Collection[int], see: Callable[[int, Prefill, LayerAttention], None]
) -> AbstractContextManager[None]:
    """Within the block, `see` is told of the attention of some layers during prefill (see `AttentionPolicy.see`).

    Raises:
        UnsupportedError: a layer does not attend, or cannot be watched.
    """
    watched = frozenset(layers)
    for each in watched:
        mllm.attention_of(each)

    @torch.no_grad()
    def tell(layer: int, call: AttentionCall) -> None:
        prefill = run.prefill
        if layer in watched and prefill is not None and prefill.running is not None:
            with overhead():
                see(layer, prefill, LayerAttention(call, prefill.running))

    return watch_attention(mllm, tell)


@contextmanager
def watch_steps(mllm: MLLM, layer: int, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block, `see(row)` is told of a layer's attention whenever it decodes: for `watches_steps`.

    `row` [B, T] is that of the last new token to each of the T positions so far, the mean over heads; 0 for those whose
    keys the layer has not.

    Raises:
        UnsupportedError: the layer does not attend, or cannot be watched.
    """
    owner = mllm.attention_of(layer)
    stored: tuple[int, Selection | None] | None = None  # all positions, and those of the keys; None in a prefill

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal stored
        if module is not owner:  # of a deep copy
            return
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache, new, index = cache_among(kwargs), hidden.shape[1], getattr(owner, "layer_idx", layer)
        known = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        stored = None
        if known is not None and known.get_seq_length():
            selection = None
            if isinstance(known, KeptLayer):
                position, valid, _ = known.key_positions(new)
                selection = Selection(torch.arange(len(position), device=position.device), position, valid)
            stored = known.get_seq_length() + new, selection

    @torch.no_grad()
    def seen(watched: int, call: AttentionCall) -> None:
        if watched != layer or stored is None:
            return
        with overhead():
            (length, selection), (rows, _, keys, _) = stored, call.key.shape
            if selection is None:
                position = torch.arange(length - keys, length, device=call.key.device).expand(rows, -1)
                selection = Selection(torch.arange(rows, device=position.device), position, None)
            attention = LayerAttention(call, selection)
            row = attention.rows(slice(-1, None)).mean(1)[:, 0]
            see(attention.unpacked(row, row.new_empty(rows, length)))

    with owner.register_forward_pre_hook(begin, with_kwargs=True), watch_attention(mllm, seen):
        yield
