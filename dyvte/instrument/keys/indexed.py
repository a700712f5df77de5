"""Layers that choose the keys they attend to by an index of their own: DeepSeek's sparse attention, MiniMax M3.

An indexer scores small keys of its own, which lie in the KV cache beside the attention's, and lets each query attend to
the best. Where a layer runs on some positions, it must choose among those: visual tokens that left are never scored.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from dyvte.instrument.cache import KeptLayer
from dyvte.instrument.hooks import Selection, override_method
from dyvte.model_parts import INDEXERS_BY_BLOCK, INDEXERS_BY_VISIBLE_BLOCK, indexer_of

if TYPE_CHECKING:
    from dyvte.mllm import MLLM

INDEXED = ("DynamicIndexedLayer", "MiniMaxM3VLSparseCacheLayer")
"""Cache layers that hold an indexer's keys."""


class KeptIndexedLayer(KeptLayer):
    """A `KeptLayer` that also holds an indexer's keys of the positions that stayed."""

    def __init__(self, replaced: DynamicLayer) -> None:
        self._index = KeptLayer(DynamicLayer())
        super().__init__(replaced)
        self.indexer_position_ids: Tensor | None = getattr(replaced, "indexer_position_ids", None)

    def groups(self, num_queries: int) -> Any:
        """One group at most: an indexer chooses for all rows at once."""
        found = super().groups(num_queries)
        if found is not None and len(found) > 1:
            self.make_table()
            return None
        return found

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """As of transformers' indexed layers: the index keys [B, n, size] to choose from, those given among them."""
        return self.update_index(indexer_key_states[:, None])[:, 0]

    def update_index(self, idx_k: Tensor) -> Tensor:
        """As of MiniMax M3's: index keys [B, 1, n, size], in the order of `update`'s keys."""
        return self._index.update(idx_k, idx_k[..., :0])[0]

    def choosing(self, attention: nn.Module | None, new: int, start: Tensor | None) -> AbstractContextManager[None]:
        """`choosing_among` the keys that the next `update` by so many new tokens returns."""
        position, valid, _ = self.key_positions(new)
        length = self.length + new
        own = torch.arange(self.length, length, device=position.device).expand(len(position), -1)
        if type(indexer_of(attention)).__name__ in INDEXERS_BY_VISIBLE_BLOCK:
            return _turning_at(position, indexer_of(attention))
        return choosing_among(attention, own, position, valid, length, start)

    @contextmanager
    def prefilling(self, selection: Selection, key_bias: Tensor | None) -> Iterator[None]:
        """While active, keys of the positions in `selection` are stored."""
        with super().prefilling(selection, key_bias), self._index.prefilling(selection, key_bias):
            yield

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While active, keys of new tokens are appended."""
        with super().decoding(), self._index.decoding():
            yield

    def finish_prefill(self, length: int) -> None:
        """All groups of rows are stored. The prompt had `length` positions."""
        super().finish_prefill(length)
        self._index.finish_prefill(length)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values, the index's among them."""
        return super().nbytes + self._index.nbytes

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._index.reset()
        self.indexer_position_ids = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        super().batch_select_indices(indices)
        self._index.batch_select_indices(indices)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids.index_select(1, indices)


@contextmanager
def _turning_at(keys: Tensor, indexer: Any) -> Iterator[None]:
    """Within the block an indexer turns the keys that it pools by the rotary tables of their positions [b, K].

    While decoding, the model gives tables of all positions so far, and the indexer takes keys to stand one behind the
    other in them.
    """
    forward = indexer.forward

    def choose(hidden: Tensor, rotary: tuple[Tensor, Tensor], *rest: Any) -> Tensor:
        def of_keys(table: Tensor) -> Tensor:
            return table.expand(len(keys), -1, -1).gather(1, keys[:, :, None].expand(-1, -1, table.shape[2]))

        return forward(hidden, (of_keys(rotary[0]), of_keys(rotary[1])), *rest)

    with override_method(indexer, "forward", choose):
        yield


@contextmanager
def choosing_among(
    attention: nn.Module | None,
    own: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    length: int,
    start: Tensor | None = None,
) -> Iterator[None]:
    """Within the block a layer's indexer chooses among keys that need not lie one behind the other.

    Args:
        attention: of the layer; nothing happens for one that attends to all keys or chooses them by its mask.
        own: [b, q] positions of the queries in the whole sequence.
        keys: [b, K] positions of the keys there.
        valid: [b, K] False where a key is padding; None where none is.
        length: of the whole sequence.
        start: [b, 1] positions of the rows' first tokens; None for 0.
    """
    indexer = indexer_of(attention)
    if type(indexer).__name__ not in INDEXERS_BY_BLOCK:
        yield
        return
    blocks = _Blocks(indexer, own, keys, valid, length, start)
    with override_method(indexer, "forward", blocks.choose), override_method(indexer, "build_block_mask", blocks.mask):
        yield


def starts_of(mllm: MLLM, mask: Tensor | None) -> Tensor | None:
    """[B, 1] positions of the rows' first tokens, where keys are chosen by blocks and some row is padded on the left.

    The model itself counts blocks from the padding on, and takes positions for places, so that a row that is padded on
    the left is not what it is alone (as its file in transformers says). What is driven counts from the first token.

    Args:
        mllm: the model.
        mask: [B, N] 0 at padding.
    """
    by_block = any(type(indexer_of(each)).__name__ in INDEXERS_BY_BLOCK for each in mllm.attentions)
    if not by_block or not isinstance(mask, Tensor) or mask.ndim != 2 or mask[:, 0].all():
        return None
    return mask.bool().int().argmax(1, keepdim=True)


class _Blocks:
    """MiniMax M3's choice of blocks for keys that lie anywhere; arguments as for `choosing_among`.

    Blocks stay where they are in the whole sequence, as rotary positions and sliding windows do: a block of which all
    keys left is never worth choosing, but those around a query are taken all the same.
    """

    def __init__(
        self, indexer: Any, own: Tensor, keys: Tensor, valid: Tensor | None, length: int, start: Tensor | None
    ) -> None:
        if start is not None:
            own, keys = own - start, keys - start
            valid = keys >= 0 if valid is None else valid & (keys >= 0)
        self.indexer = indexer
        self.own_block = (own // indexer.block_size).clamp(min=0)
        self.block = (keys // indexer.block_size).clamp(min=0)
        self.number = -(-length // indexer.block_size)
        seen = keys[:, None, None] <= own[:, None, :, None]  # [b, 1, q, K] not later than the query
        self.seen = seen if valid is None else seen & valid[:, None, None]

    def choose(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: Any, position_ids: Tensor) -> Tensor:
        """The blocks [b, H, q, n] that each query attends to, -1 for none."""
        indexer = self.indexer
        apply_rotary = inspect.unwrap(type(indexer).forward).__globals__["apply_rotary_pos_emb"]
        heads = (*hidden.shape[:2], -1, indexer.head_dim)
        query = indexer.q_norm(indexer.q_proj(hidden).view(heads)).transpose(1, 2)
        key = indexer.k_norm(indexer.k_proj(hidden).view(heads)).transpose(1, 2)
        query, key = apply_rotary(query, key, *(each[..., : indexer.head_dim] for each in rotary))
        if cache is not None:
            key = cache.layers[indexer.layer_idx].update_index(key)
        scores = (query.float() @ key.float().mT).masked_fill(~self.seen, -torch.inf)
        best = scores.new_full((*scores.shape[:3], self.number), -torch.inf)
        best.scatter_reduce_(3, self.block[:, None, None].expand_as(scores), scores, "amax")
        around = self.own_block[..., None] - torch.arange(indexer.local_blocks, device=best.device)
        best.scatter_(3, around.clamp(min=0)[:, None].expand(-1, best.shape[1], -1, -1), torch.inf)
        chosen = best.topk(min(indexer.topk_blocks, self.number))
        return chosen.indices.masked_fill(chosen.values == -torch.inf, -1)

    def mask(
        self,
        chosen: Tensor,
        mask: Tensor | None,
        key_length: int,
        dtype: torch.dtype,
        device: torch.device,
        position_ids: Tensor,
    ) -> Tensor:
        """Additive mask [b, heads, q, K] of the chosen blocks."""
        heads = self.indexer.config.num_attention_heads // chosen.shape[1]
        picked = (chosen[..., None] == torch.arange(self.number, device=device)).any(3)  # [b, H, q, blocks]
        keep = picked.gather(3, self.block[:, None, None].expand(*picked.shape[:3], -1)).repeat_interleave(heads, 1)
        mask = self.seen if mask is None else mask
        if mask.dtype == torch.bool:
            keep, mask = keep & mask, torch.zeros(keep.shape, dtype=dtype, device=device)
        return mask.masked_fill(~keep, torch.finfo(dtype).min)
