"""Entropy of the question's attention to text, under every exit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.instrument.hooks import LayerCall, Selection
from dyvte.instrument.role_attention import allowed_by
from dyvte.instrument.sweep.frames import Frame
from dyvte.layout import TokenLayout

ENTROPIES = ("text_entropy", "text_entropy_normalised", "text_entropy_no_sink", "text_entropy_normalised_no_sink")

_NEVER = -1e30
"""Score of a pair that the mask forbids: its weight is 0, and weight times score still is."""


@dataclass
class EntropyPlan:
    """Which attention rows the entropies of some rows are taken from.

    Attributes:
        frame: the text of these rows; its keys are the text keys.
        queries: the question's tokens within `frame.own`.
        sink: [b, K] the sink among the keys.
    """

    frame: Frame
    queries: Selection
    sink: Tensor

    @classmethod
    def of(cls, frame: Frame, layout: TokenLayout) -> EntropyPlan:
        """The plan for the question's tokens within a frame."""
        own = frame.own
        asks = layout.text_status_positions[own.rows].gather(1, own.index)
        if own.valid is not None:
            asks = asks & own.valid
        queries = Selection.of(asks, torch.arange(len(asks), device=asks.device), asks.sum(1).tolist())
        sink = (frame.key_positions == layout.first_token[own.rows][:, None]) & frame.key_valid
        return cls(frame, queries, sink)

    @property
    def query_positions(self) -> Tensor:
        """[b, q] positions of the queries."""
        return self.frame.own.index.gather(1, self.queries.index)

    def entropies(
        self,
        call: LayerCall,
        query: Tensor,
        key: Tensor,
        scale: float,
        softcap: float | None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """The four `ENTROPIES` [n, b, 4].

        Args:
            call: the layer's call.
            query: [n * b, H, q, size] of `queries`.
            key: [n * b, H_kv, K, size] of the frame's keys.
            scale: factor on the scores.
            softcap: scores s become softcap * tanh(s / softcap).
            chosen: [n * b, 1 or H, q, K] which of the keys a query attends to, where the layer chooses; None for all.
        """
        allowed = self.frame.own.remembered("allowed to the question", call.mask, lambda: self._allowed(call))
        rows, heads, count, size = query.shape
        grouped = (query.float() * scale).reshape(rows, key.shape[1], -1, size)
        scores = (grouped @ key.float().transpose(2, 3)).view(-1, len(allowed), heads, count, key.shape[2])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask = self.frame.mask(call)
        if mask is not None and mask.is_floating_point():
            bias = mask[:, 0].gather(1, self.queries.index[:, :, None].expand(-1, -1, mask.shape[3]))
            scores = scores + torch.where(allowed, bias, 0.0)[:, None]
        if chosen is not None:
            chosen = chosen.unflatten(0, (-1, len(allowed)))
        return text_entropies(scores, allowed, self.sink, self.queries.valid, chosen)

    def _allowed(self, call: LayerCall) -> Tensor:
        allowed = self.frame.allowed(call)
        return allowed.gather(1, self.queries.index[:, :, None].expand(-1, -1, allowed.shape[2]))


def chosen_keys(mask: Tensor | None, queries: Tensor, keys: Tensor | None) -> Tensor | None:
    """[n, 1 or H, q, K] which keys of a layer that chooses them some queries attend to.

    Args:
        mask: [n, 1 or H, M, K] boolean or additive, as the attention function got it; None for all.
        queries: [n, q] which of the M.
        keys: [n, k] which of the K; None for all.
    """
    if mask is None:
        return None
    seen = allowed_by(mask).expand(len(queries), -1, -1, -1)
    seen = seen.gather(2, queries[:, None, :, None].expand(-1, seen.shape[1], -1, seen.shape[3]))
    return seen if keys is None else seen.gather(3, keys[:, None, None].expand(*seen.shape[:3], -1))


def text_entropies(
    scores: Tensor, allowed: Tensor, sink: Tensor, valid: Tensor | None = None, chosen: Tensor | None = None
) -> Tensor:
    """Entropies of attention over text keys, mean over queries and heads, in nats.

    With e the exponentials of the scores s, T the sum of e and W that of e * s over some keys, the entropy of the
    attention on these keys is log T - W / T.

    Args:
        scores: [n, b, H, q, K] attention scores of the queries for text keys, before masking.
        allowed: [b, q, K] which keys a query may see.
        sink: [b, K] which key is the attention sink.
        valid: [b, q] False where a query is padding.
        chosen: [n, b, 1 or H, q, K] which of them it attends to, in layers that choose their keys; None for all.

    Returns:
        [n, b, 4] in the order of `ENTROPIES`. Queries without an allowed (and chosen) key are left out; those with one
        allowed key only are left out of the normalised entropies, whose divisor is the log of the number of these.
    """
    scores = scores.masked_fill(~allowed[:, None], _NEVER)
    if chosen is not None:
        scores = scores.masked_fill(~chosen, _NEVER)
    scores = scores - scores.amax(-1, keepdim=True)
    weight = scores.exp()
    columns = torch.stack([torch.ones_like(sink), ~sink], dim=-1).to(scores.dtype)  # [b, K, 2]
    total = (weight @ columns[:, None]).clamp_min(torch.finfo(scores.dtype).tiny)
    entropy = (total.log() - (weight * scores) @ columns[:, None] / total).clamp_min(0.0)  # [n, b, H, q, 2]
    counts = allowed.to(columns.dtype) @ columns  # [b, q, 2]
    asked = torch.ones_like(counts[..., :1]) if valid is None else valid[..., None].to(counts.dtype)
    results = []
    for divisor, counted in ((torch.ones_like(counts), counts > 0), (counts.clamp_min(2).log(), counts > 1)):
        weights, number = (asked * counted / divisor)[:, None], (asked * counted).sum(1) * scores.shape[2]
        if chosen is not None:
            there = ((chosen & allowed[:, None]).to(columns.dtype) @ columns[:, None] > 0).expand_as(entropy)
            weights, number = weights * there, ((asked * counted)[:, None] * there).sum((2, 3))
        results.append((entropy * weights).sum((2, 3)) / number)
    plain, normalised = results
    return torch.stack([plain[..., 0], normalised[..., 0], plain[..., 1], normalised[..., 1]], dim=-1)
