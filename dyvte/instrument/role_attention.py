"""Attention statistics between token roles, computed from queries and keys a few rows at a time.

Pure tensor mathematics: nothing here knows about models. Every number is an exact sum over rows of
`softmax(Q K^T)` in float32. Rows are made in blocks of a few dozen queries against the keys that those queries may
see, reduced over keys by one small matrix product, and thrown away, so memory stays linear in the sequence length.

Shapes: B samples, H query heads, N positions, R = 4 roles (`dyvte.ROLES`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dyvte.layout import INSTRUCTION, PADDING, ROLES, VISUAL, TokenLayout

QUERY_GROUPS = (*ROLES, "question")
"""Groups of queries that are averaged over: the roles, and the instruction after the last image."""

QUESTION = len(ROLES)

CPU_BLOCK, GPU_BLOCK = (16, 64, 2**23), (64, 512, 2**27)
"""Rows of the attention matrix made at once, at least and at most, and how many of its entries they may hold.

On a CPU the rows of a head should stay in its cache, a GPU needs enough of them to be busy. No result depends on it.
"""

MAP_ENTRIES = 2**24
"""Entries of an attention matrix made at once by what needs all of its rows (64 MiB in float32)."""


@dataclass(frozen=True)
class Groups:
    """Which positions are averaged over and which are summed over.

    Attributes:
        queries: [B, 5, N] membership of every position in `QUERY_GROUPS`, 0 or 1.
        keys: [B, N, 1 + R] one-hot columns: the attention sink (first token that is not padding), then the four roles
            without the sink.
        sink_role: [B, R] one-hot role of the sink.
        last_prompt: [B, N] one-hot position of the last prompt token.
        text: [N] whether any sample has text at this position.
        padding: [B, N] padding.
    """

    queries: Tensor
    keys: Tensor
    sink_role: Tensor
    last_prompt: Tensor
    text: Tensor
    padding: Tensor

    @classmethod
    def of(cls, layout: TokenLayout) -> Groups:
        """Groups of a layout."""
        roles = layout.roles
        members = torch.stack([roles == role for role in range(len(ROLES))], dim=1)
        queries = torch.cat([members, layout.text_status_positions[:, None]], dim=1).float()
        position = torch.arange(roles.shape[1], device=roles.device)
        sink = position == layout.first_token[:, None]
        keys = torch.cat([sink[:, None], members & ~sink[:, None]], dim=1).float()
        return cls(
            queries=queries,
            keys=keys.transpose(1, 2).contiguous(),
            sink_role=(members & sink[:, None]).any(2).float(),
            last_prompt=(position == layout.last_prompt[:, None]).float(),
            text=layout.text.any(0),
            padding=roles == PADDING,
        )

    def merge_sink(self, columns: Tensor) -> Tensor:
        """Add the sink's column to that of its role: [B, ..., 1 + R] -> [B, ..., R]."""
        role = self.sink_role.view(-1, *[1] * (columns.ndim - 2), len(ROLES))
        return columns[..., 1:] + columns[..., :1] * role


@dataclass(frozen=True)
class Block:
    """Queries `rows` against keys `columns`; `text` if a sample has text among the queries."""

    rows: slice
    columns: slice
    text: bool


@dataclass(frozen=True)
class PairCounts:
    """How many keys the mask allows, summed over the queries of every group.

    Attributes:
        queries: [B, 5] queries with an allowed key.
        pairs: [B, 5, R] allowed (query, key) pairs.
        uniform: [B, 5, R] sum over queries of the share of a role among the allowed keys.
        text_keys: [B, N] text keys allowed to a query.
    """

    queries: Tensor
    pairs: Tensor
    uniform: Tensor
    text_keys: Tensor

    @classmethod
    def of(cls, allowed: Tensor, queries: Tensor) -> PairCounts:
        """Sum up `allowed` [B, N, R], the keys of each role that a query may see, over `queries` [B, 5, N]."""
        total = allowed.sum(-1, keepdim=True)
        weights = queries * (total > 0).transpose(1, 2)
        return cls(
            queries=weights.sum(-1),
            pairs=weights @ allowed,
            uniform=weights @ (allowed / total.clamp_min(1)),
            text_keys=total[..., 0] - allowed[..., VISUAL],
        )


@dataclass(frozen=True)
class Geometry:
    """What an attention mask allows, worked out once for all the layers that share the mask.

    Attributes:
        allowed: [B or 1, N, N] boolean; None for plain causal attention.
        bias: [B or 1, 1 or H, N, N] added to the scores, for masks that hold more than "allowed or not".
        blocks: the pieces in which the attention matrix is made.
        counts: with the sink.
        counts_no_sink: without.
    """

    groups: Groups
    allowed: Tensor | None
    bias: Tensor | None
    blocks: list[Block]
    counts: PairCounts
    counts_no_sink: PairCounts

    @classmethod
    def of(cls, groups: Groups, allowed: Tensor | None, bias: Tensor | None, num_heads: int) -> Geometry:
        """Count the allowed pairs and cut the attention matrix of `num_heads` heads into blocks."""
        if allowed is None:
            by_key = groups.keys.cumsum(1)
        else:
            # Queries that are padding may see nothing; they are not used, but must not give NaN.
            allowed = allowed | groups.padding[:, :, None]
            by_key = allowed.float() @ groups.keys
        no_sink = by_key[..., 1:]
        return cls(
            groups=groups,
            allowed=allowed,
            bias=bias,
            blocks=list(_blocks(groups, allowed, num_heads)),
            counts=PairCounts.of(groups.merge_sink(by_key), groups.queries),
            counts_no_sink=PairCounts.of(no_sink, groups.queries),
        )


def _blocks(groups: Groups, allowed: Tensor | None, num_heads: int) -> Iterator[Block]:
    """Runs of positions with and without text, cut to the block size, with the keys that they may see."""
    text = groups.text.tolist()
    least, most, entries = GPU_BLOCK if groups.text.is_cuda else CPU_BLOCK
    size = min(most, max(least, entries // (groups.padding.numel() * num_heads)))
    seen = None if allowed is None else (allowed & ~groups.padding[:, :, None]).any(0)
    start = 0
    while start < len(text):
        stop = start + 1
        while stop < len(text) and stop - start < size and text[stop] == text[start]:
            stop += 1
        first, last = 0, stop
        if seen is not None:
            columns = seen[start:stop].any(0).nonzero().flatten().tolist() or [0]
            first, last = columns[0], columns[-1] + 1
        yield Block(slice(start, stop), slice(first, last), text[start])
        start = stop


@dataclass
class RoleSums:
    """Sums over queries of one layer's attention, by query group and key role.

    Attributes:
        probability: [B, H, 5, R] total probability.
        probability_no_sink: [B, H, 5, R] the same without what the sink receives; not renormalised, so its sum over key
            roles is what the queries do not give the sink.
        entropy: [B, H, 5] for the question's queries, summed: total entropy; entropy over text keys, with the same
            divided by the log of the number of text keys; and these two without the sink. In nats.
        received: [B, H, 2, N] attention on every key from the last prompt token, and summed over instruction queries.
        mean_map: [B, N, N] mean over heads of the attention matrix, where asked for.
    """

    probability: Tensor
    probability_no_sink: Tensor
    entropy: Tensor
    received: Tensor
    mean_map: Tensor | None


ENTROPIES = (
    "total_entropy",
    "text_entropy",
    "text_entropy_normalised",
    "text_entropy_no_sink",
    "text_entropy_normalised_no_sink",
)
"""Order of the entropies in `RoleSums.entropy`."""


def role_sums(
    rows_of: Callable[[Block], Tensor],
    geometry: Geometry,
    num_heads: int,
    keep_map: bool = False,
    also: Callable[[Block, Tensor], None] | None = None,
) -> RoleSums:
    """Reduce the attention of one layer, block by block.

    Args:
        rows_of: gives the attention probabilities [B, H, queries, keys] of a block, in float32.
        geometry: of the layer's mask.
        num_heads: H.
        keep_map: also average the attention matrix over heads.
        also: shown every block with its rows [B, H, queries, keys], which are not kept.
    """
    groups = geometry.groups
    batch, num_groups, length = groups.queries.shape
    new = groups.queries.new_zeros
    probability = new(batch, num_heads, num_groups, 1 + len(ROLES))
    entropy = new(batch, num_heads, len(ENTROPIES))
    received = new(batch, num_heads, 2, length)
    mean_map = new(batch, length, length) if keep_map else None
    receivers = torch.stack([groups.last_prompt, groups.queries[:, INSTRUCTION]], dim=1)
    entropy_weights = _entropy_weights(geometry)

    for block in geometry.blocks:
        rows, columns = block.rows, block.columns
        attention = rows_of(block)
        keys = groups.keys[:, None, columns]
        by_key = attention @ keys
        probability += groups.queries[:, None, :, rows] @ by_key
        if block.text:
            by_key_entropy = torch.special.entr(attention) @ keys
            row_entropies = _row_entropies(by_key, by_key_entropy, groups)
            entropy += torch.einsum("bhqe,beq->bhe", row_entropies, entropy_weights[:, :, rows])
            received[..., columns] += receivers[:, None, :, rows] @ attention
        if mean_map is not None:
            mean_map[:, rows, columns] = attention.mean(1)
        if also is not None:
            also(block, attention)
    if mean_map is not None:
        mean_map.masked_fill_(groups.padding[:, :, None], 0.0)
    return RoleSums(groups.merge_sink(probability), probability[..., 1:], entropy, received, mean_map)


def _row_entropies(by_key: Tensor, by_key_entropy: Tensor, groups: Groups) -> Tensor:
    """Entropy [B, H, queries, 5] of every row, in the order of `ENTROPIES` and not yet divided by anything.

    With p the probabilities of some keys, T their sum and E = -sum p log p, the entropy of p / T is log T + E / T, so
    sums over keys are enough.
    """
    not_visual = by_key.new_tensor([role != VISUAL for role in range(len(ROLES))])
    sink_is_text = groups.sink_role[:, None, None] @ not_visual

    def of_text(with_sink: bool) -> Tensor:
        total, entropy = ((sums[..., 1:] @ not_visual) for sums in (by_key, by_key_entropy))
        if with_sink:
            total, entropy = total + by_key[..., 0] * sink_is_text, entropy + by_key_entropy[..., 0] * sink_is_text
        safe = total.clamp_min(torch.finfo(total.dtype).tiny)
        return torch.where(total > 0, safe.log() + entropy / safe, 0.0).clamp_min(0.0)

    text, text_no_sink = of_text(with_sink=True), of_text(with_sink=False)
    return torch.stack([by_key_entropy.sum(-1), text, text, text_no_sink, text_no_sink], dim=-1)


def entropy_queries(geometry: Geometry) -> Tensor:
    """Which queries [B, 5, N] each of `ENTROPIES` is averaged over.

    An entropy over keys needs an allowed key, one divided by the log of their number needs two.
    """
    question = geometry.groups.queries[:, QUESTION]
    text, no_sink = geometry.counts.text_keys, geometry.counts_no_sink.text_keys
    return torch.stack(
        [question, question * (text > 0), question * (text > 1), question * (no_sink > 0), question * (no_sink > 1)],
        dim=1,
    )


def _entropy_weights(geometry: Geometry) -> Tensor:
    """Weights [B, 5, N] of the queries in the sums of `ENTROPIES`: 0, 1, or one over the log of the number of keys."""
    weights = entropy_queries(geometry)
    for index, counts in ((2, geometry.counts), (4, geometry.counts_no_sink)):
        weights[:, index] /= counts.text_keys.clamp_min(2).log()
    return weights


def score_rows(
    query: Tensor,
    key: Tensor,
    scale: float,
    softcap: float | None,
    geometry: Geometry,
    position_bias: Tensor | None = None,
) -> Callable[[Block], Tensor]:
    """Attention rows from queries and keys, to be given to `role_sums`.

    Args:
        query: [B, H, N, head size], rotary embedding applied.
        key: [B, H_kv, N, head size], H a multiple of H_kv (grouped-query attention).
        scale: multiplied with the scores.
        softcap: scores s become softcap * tanh(s / softcap), as in Gemma 2; None leaves them.
        geometry: of the layer's mask.
        position_bias: [B, H, N, K >= N] added to the scores, of relative positions (Inkling); None for nothing.
    """
    batch, num_heads, length, size = query.shape
    num_key_heads = key.shape[1]
    grouped = (query.float() * scale).view(batch, num_key_heads, num_heads // num_key_heads, length, size)
    key = key.float().contiguous()
    position = torch.arange(length, device=query.device)

    def rows_of(block: Block) -> Tensor:
        rows, columns = block.rows, block.columns
        queries = grouped[:, :, :, rows].reshape(batch, num_key_heads, -1, size)
        scores = queries @ key[:, :, columns].transpose(2, 3)
        scores = scores.view(batch, num_heads, rows.stop - rows.start, columns.stop - columns.start)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if position_bias is not None:
            scores += position_bias[:, :, rows, columns]
        if geometry.bias is not None:
            scores += geometry.bias[:, :, rows, columns]
        if geometry.allowed is not None:
            scores.masked_fill_(~geometry.allowed[:, None, rows, columns], -torch.inf)
        else:
            later = position[rows] > position[rows, None]
            scores[..., rows.start :].masked_fill_(later, -torch.inf)
        return scores.softmax(-1)

    return rows_of


def allowed_by(mask: Tensor) -> Tensor:
    """A mask, boolean (True: attend) or added to the scores, as what it allows.

    Example:
        >>> allowed_by(torch.tensor([0.0, torch.finfo(torch.float32).min])).tolist()
        [True, False]
    """
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def added_to_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: attend) as numbers that are added to the scores; one of numbers as it is.

    `scaled_dot_product_attention` does this to a boolean mask at every call, and so once a layer.

    Example:
        >>> added_to_scores(torch.tensor([True, False]), torch.float32).tolist()[0]
        0.0
    """
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def allowed_pairs(
    mask: Tensor | None, length: int, causal: bool, sliding_window: int | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """What an attention mask allows.

    Args:
        mask: [B or 1, 1 or H, N, K] boolean (True = attend) or additive, [B, N] with 0 at padding (flash attention), or
            None.
        length: N.
        causal: whether a mask of fewer than four dimensions goes with causal attention.
        sliding_window: how many positions back a query sees, where the mask does not say it already.
        device: where to put the result.

    Returns:
        [B or 1, N, N] boolean, or None for plain causal attention; and the additive part of the mask [B or 1, 1 or H,
        N, N], or None where it only says what is allowed.
    """
    if mask is not None and mask.ndim == 4:
        mask, bias = mask[..., :length], None
        allowed = allowed_by(mask)
        if mask.dtype != torch.bool:
            bias = mask.float().masked_fill(~allowed, 0.0)
        if mask.shape[1] > 1:  # heads that choose their keys: a pair is allowed if one of them may see it
            bias = (torch.zeros_like(mask, dtype=torch.float) if bias is None else bias).masked_fill(
                ~allowed, torch.finfo(torch.float).min
            )
        return allowed.any(1), bias if bias is not None and bias.any() else None
    if sliding_window is None:
        sliding_window = length
    if mask is None and causal and sliding_window >= length:
        return None, None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    allowed = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
    allowed = (allowed & (distance < sliding_window))[None]
    return allowed if mask is None else allowed & mask.bool()[:, None], None


def stack_layers(of_layers: Iterable[Tensor]) -> Tensor:
    """One tensor a layer -> [B, L, ...] on the CPU."""
    return torch.stack([each.cpu() for each in of_layers], dim=1)


def stack_heads(of_layers: Iterable[Tensor]) -> Tensor:
    """One tensor [B, H_l, ...] a layer -> [B, L, H, ...] on the CPU, NaN where a layer has fewer than H heads."""
    heads_first = [each.cpu().transpose(0, 1) for each in of_layers]
    return pad_sequence(heads_first, batch_first=True, padding_value=torch.nan).movedim(2, 0)
