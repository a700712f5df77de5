"""Many questions about one scene in one training sequence.

A prefix (system prompt and image, or a scene in words) is followed by branches, one for each question with its
answer. A branch sees the prefix and itself, never another branch, and its positions continue those of the prefix: each
question trains as if it stood alone, while the prefix is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class PackedBatch:
    """Packed sequences of one length N.

    Attributes:
        input_ids: [B, N], padding filled with ``pad_id``.
        position_ids: [B, N] positions as if every branch stood alone.
        branch: [B, N] 0 in the prefix, 1, 2, ... in the branches, -1 at padding.
        labels: [B, N] id of the *next* token of the same branch where it is trained on, else ``IGNORE``.
        weights: [B, N] weight of each label in the loss.
        kinds: name of the question in each branch, by (row, branch).
    """

    input_ids: Tensor
    position_ids: Tensor
    branch: Tensor
    labels: Tensor
    weights: Tensor
    kinds: dict[tuple[int, int], str]

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        return self._each(lambda t: t.to(device))

    def rows(self, part: slice) -> PackedBatch:
        """Some of the rows; ``kinds`` stay those of the whole batch."""
        return self._each(lambda t: t[part])

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        tensors: dict[str, Any] = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "kinds"}
        return replace(self, **tensors)

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, N, N]: 0 where the query (row) may see the key (column), else a very negative number."""
        length = self.branch.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.branch.device).tril()
        key, query = self.branch[:, None, :], self.branch[:, :, None]
        # padding sees itself alone, so that its softmax has something to normalise
        allowed = causal & ((key == 0) | (key == query))
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min / 2).unsqueeze(1)


@dataclass(frozen=True)
class Branch:
    """A prompt with its answer, whose ``decided`` words (None: all) carry the full weight, others the prompt's."""

    kind: str
    prompt: Sequence[int]
    answer: Sequence[int]
    decided: Sequence[bool] | None = None


def pack(
    rows: Sequence[tuple[Sequence[int], Sequence[Branch]]],
    length: int,
    pad_id: int,
    prompt_weight: float = 0.0,
    prefix_weight: float = 0.0,
) -> PackedBatch:
    """Pack rows of (prefix, branches) to a fixed length; branches that no longer fit are left out.

    ``prompt_weight`` and ``prefix_weight`` are the loss weights of the words of prompts and prefixes; answers weigh 1.
    """
    shape = (len(rows), length)
    ids = torch.full(shape, pad_id)
    positions = torch.zeros(shape, dtype=torch.long)
    branch_of = torch.full(shape, -1)
    labels = torch.full(shape, IGNORE)
    weights = torch.zeros(shape)
    kinds: dict[tuple[int, int], str] = {}
    for row, (prefix, branches) in enumerate(rows):
        start = len(prefix)
        if start > length:
            raise ValueError(f"a prefix of {start} tokens does not fit a packed length of {length}")
        ids[row, :start] = torch.tensor(prefix)
        positions[row, :start] = torch.arange(start)
        branch_of[row, :start] = 0
        if prefix_weight:
            labels[row, : start - 1] = ids[row, 1:start]
            weights[row, : start - 1] = prefix_weight
        cursor, number = start, 0
        for branch in branches:
            tokens = [*branch.prompt, *branch.answer]
            end = cursor + len(tokens)
            if end > length:
                continue
            number += 1
            kinds[row, number] = branch.kind
            ids[row, cursor:end] = torch.tensor(tokens)
            positions[row, cursor:end] = torch.arange(start, start + len(tokens))
            branch_of[row, cursor:end] = number
            answer = cursor + len(branch.prompt)
            decided = torch.tensor([True] * len(branch.answer) if branch.decided is None else branch.decided)
            weights[row, cursor : end - 1] = prompt_weight
            weights[row, answer - 1 : end - 1] = torch.where(decided, 1.0, prompt_weight)
            trained = weights[row, cursor : end - 1] > 0
            labels[row, cursor : end - 1] = ids[row, cursor + 1 : end].where(trained, torch.tensor(IGNORE))
            cursor = end
    return PackedBatch(ids, positions, branch_of, labels, weights, kinds)
