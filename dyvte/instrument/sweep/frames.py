"""Some tokens of some rows that run through a layer apart from the others, and the keys they attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dyvte.errors import UnsupportedError
from dyvte.instrument.cache import UnknownOfCacheError
from dyvte.instrument.hooks import LayerCall, Selection, output_states, pack_mask
from dyvte.instrument.kept_keys import take
from dyvte.instrument.role_attention import allowed_by
from dyvte.layout import TokenLayout


@dataclass
class Frame:
    """Some tokens of some rows that run through layers apart from the others.

    Attributes:
        own: the tokens that run.
        earlier: tokens of the same rows that they also attend to, whose keys and values come from another pass.
    """

    own: Selection
    earlier: Selection | None

    @property
    def rows(self) -> Tensor:
        """[b] rows of the batch."""
        return self.own.rows

    @cached_property
    def key_positions(self) -> Tensor:
        """[b, K] positions of the keys: the earlier ones, then its own."""
        return self.own.index if self.earlier is None else torch.cat([self.earlier.index, self.own.index], dim=1)

    @cached_property
    def key_valid(self) -> Tensor:
        """[b, K] False where a key is padding."""
        parts = [self.own] if self.earlier is None else [self.earlier, self.own]
        return torch.cat([or_all(each.valid, each.index) for each in parts], dim=1)

    def mask(self, call: LayerCall) -> Tensor | None:
        """The layer's attention mask for these queries and keys."""
        return self.own.remembered("frame mask", call.mask, lambda: self._mask(call))

    def _mask(self, call: LayerCall) -> Tensor | None:
        mask, valid = call.mask, self.key_valid
        if mask is None and call.uses_flash:
            return None if valid.all() else valid
        if mask is None:
            if self.earlier is None:
                return None  # causal, padding on the right
            causal = self.own.index[:, :, None] >= self.key_positions[:, None, :]
            return (causal & valid[:, None, :])[:, None]
        mask = mask.expand(call.hidden.shape[0], *mask.shape[1:])[self.rows]
        return pack_mask(mask, self.own.index, self.key_positions, None if valid.all() else valid)

    def allowed(self, call: LayerCall) -> Tensor:
        """[b, M, K] which keys each query may see."""
        mask = self.mask(call)
        if mask is None or mask.ndim == 2:
            causal = self.own.index[:, :, None] >= self.key_positions[:, None, :]
            return causal & self.key_valid[:, None, :]
        return allowed_by(mask[:, 0])


class Keys:
    """Stands in for a KV cache in one call of one layer: adds the keys of earlier tokens, and keeps what it saw."""

    def __init__(
        self,
        earlier: tuple[Tensor, ...] | None = None,
        rows: Tensor | None = None,
        positions: Tensor | None = None,
        keep: bool = True,
    ) -> None:
        self.earlier = earlier  # keys, values, and an indexer's keys where the layer has one
        self.rows, self.positions = rows, positions  # [b] and [b, K]: which keys `update` returns, None for all
        self.keep = keep  # whether `of_all` will be asked
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.index: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """A layer asks for something else than keys and values."""
        raise UnknownOfCacheError(f"a decoder layer calls {name!r} of its KV cache, which exit_sweep does not know")

    def __getitem__(self, layer: int) -> Keys:
        return self

    @property
    def layers(self) -> Keys:
        """As of a cache: every layer is this one."""
        return self

    def update_indexer(self, indexer_key_states: Tensor, *_: Any) -> Tensor:
        """As of a cache or a layer of one: index keys [b, n, size], the earlier ones in front."""
        return self.update_index(indexer_key_states[:, None])[:, 0]

    def update_index(self, idx_k: Tensor) -> Tensor:
        """As of MiniMax M3's cache layer: index keys [b, 1, n, size]."""
        self.index = idx_k
        return idx_k if self.earlier is None else _behind(self.earlier[2], idx_k)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As of a cache: the keys and values to attend to, the earlier ones in front."""
        if self.keep:
            self.keys, self.values = keys, values
        if self.earlier is None:
            return keys, values
        return _behind(self.earlier[0], keys), _behind(self.earlier[1], values)

    def get_seq_length(self, *_: Any) -> int:
        """As of an empty cache."""
        return 0

    def of_all(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every row that ran: [b, heads, N, head size]."""
        if self.keys is None or self.values is None:
            raise UnsupportedError("a decoder layer did not show its keys: it does not write to a KV cache")
        return self.keys, self.values

    def of(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of `rows`, and an indexer's keys where there is one: [b, heads, N, head size]."""
        found = self.of_all() if self.index is None else (*self.of_all(), self.index)
        return tuple(each.expand(len(rows), -1, -1, -1) if len(each) == 1 else each[rows] for each in found)

    def at(self, rows: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """What `of` gives, of positions [b, n]: [b, heads, n, head size]."""
        return tuple(take(each, index) for each in self.of(rows))


def _behind(earlier: Tensor, own: Tensor) -> Tensor:
    """Earlier keys [b, heads, E, size] in front of each repetition of the batch in [n * b, heads, M, size]."""
    count = earlier.shape[2]
    joint = own.new_empty(*own.shape[:2], count + own.shape[2], own.shape[3])
    joint.unflatten(0, (-1, len(earlier)))[:, :, :, :count] = earlier
    joint[:, :, count:] = own
    return joint


def repeated(tensor: Tensor, times: int, axis: int = 0) -> Tensor:
    """[..., b, ...] -> [..., times * b, ...], the whole batch repeated; no copy for a batch of one."""
    shape = list(tensor.shape)
    wide = tensor.unsqueeze(axis).expand(*shape[:axis], times, *shape[axis:])
    return wide.flatten(axis, axis + 1)


def repeat_argument(name: str, packed: Any, times: int) -> Any:
    """A layer's argument for `times` repetitions of the batch."""
    if isinstance(packed, (tuple, list)):
        return type(packed)(repeat_argument(name, each, times) for each in packed)
    if not isinstance(packed, Tensor):
        return packed
    axis = {"position_ids": packed.ndim - 2, "position_embeddings": packed.ndim - 3}.get(name, 0)
    return repeated(packed, times, axis)


def repeat_arguments(call: LayerCall, packed: dict[str, Any], times: int) -> dict[str, Any]:
    """A layer's arguments for `times` repetitions of a packed batch; what is not of positions stays as it is."""
    if times == 1:
        return packed
    return {
        name: value if value is call.arguments.get(name) else repeat_argument(name, value, times)
        for name, value in packed.items()
    }


class SharedPrefix:
    """Everything up to the last visual token, run once for all rows that show the same image.

    Attributes:
        selection: the prefix of one representative row a group.
        group: [B] group of every row (0 where a row shows no image and has no prefix); `groups` as a list.
        lengths: length of every row's prefix, which stands at its start.
        suffix: frame of the tokens behind the prefix, of all rows.
    """

    def __init__(self, layout: TokenLayout, input_ids: Tensor, shared_image: Sequence[int]) -> None:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        length = torch.where(layout.visual, position, -1).amax(1) + 1
        prefix = position < length[:, None]
        representative: dict[int, int] = {}
        self.lengths: list[int] = length.tolist()
        self.groups: list[int] = []
        for row, image in enumerate(shared_image):
            if self.lengths[row] == 0:
                self.groups.append(0)
                continue
            first = representative.setdefault(image, row)
            if not torch.equal(input_ids[row, : self.lengths[row]], input_ids[first, : self.lengths[first]]):
                raise ValueError(
                    f"rows {first} and {row} are said to share an image, but their prompts differ before its last token"
                )
            self.groups.append(list(representative).index(image))
        device = input_ids.device
        rows = torch.arange(len(self.groups), device=device)
        chosen = torch.tensor(list(representative.values()), device=device)
        self.selection = Selection.of(prefix, chosen, [self.lengths[row] for row in representative.values()])
        self.group = torch.tensor(self.groups, device=device)
        of_group = prefix[chosen][self.group] & (length > 0)[:, None]
        rest = ~layout.padding & ~prefix
        self.suffix = Frame(Selection.of(rest, rows, rest.sum(1).tolist()), Selection.of(of_group, rows, self.lengths))
        self.mask = prefix

    def is_possible(self, call: LayerCall, layout: TokenLayout) -> bool:
        """Whether the model makes the same of a prefix in every row, as the first layer's call shows.

        Not where the image sees the question, nor where positions count what other rows hold (HunYuan-VL numbers the
        images of a batch).

        Raises:
            ValueError: rows whose visual tokens are not those of their representative.
        """
        if (row := self._other_row(call.hidden)) is not None:
            first = int(self.selection.rows[self.group[row]])
            raise ValueError(f"rows {first} and {row} are said to share an image, but their visual tokens differ")
        if sees_ahead(call.mask, self.mask, ~self.mask & ~layout.padding):
            return False
        shape = layout.roles.shape
        for name, value in call.arguments.items():
            for each in value if isinstance(value, (tuple, list)) else (value,):
                if name.startswith("position_") and isinstance(each, Tensor) and each.ndim >= 2:
                    by_row = each.movedim(0, -1) if each.shape[1:] == shape else each
                    if by_row.shape[:2] == shape and self._other_row(by_row.reshape(*shape, -1)) is not None:
                        return False
        return True

    def run(self, call: LayerCall, hidden: Tensor, keys: Keys) -> Any:
        """Run a layer on the prefixes, put what becomes of every row's into `hidden` [B, N, d]; the layer's output."""
        output = call.run(self.selection.pack(hidden), **{**call.packed(self.selection), "past_key_values": keys})
        for row, (group, length) in enumerate(zip(self.groups, self.lengths, strict=True)):
            hidden[row, :length] = output_states(output)[group, :length]
        return output

    def _other_row(self, states: Tensor) -> int | None:
        """The row whose states [B, N, d] differ most from its representative's in the prefix; None if none does."""
        index = self.suffix.earlier
        assert index is not None
        theirs = states[self.selection.rows[self.group][:, None], index.index]
        difference = (index.pack(states) - theirs).abs().amax(-1)
        if index.valid is not None:
            difference = difference * index.valid
        return int(difference.amax(1).argmax()) if (difference > 1e-3 * theirs.abs().amax()).any() else None


def or_all(valid: Tensor | None, like: Tensor) -> Tensor:
    """A mask shaped like `like`: `valid`, or all True for None."""
    return torch.ones_like(like, dtype=torch.bool) if valid is None else valid


def sees_ahead(mask: Tensor | None, queries: Tensor, keys: Tensor) -> bool:
    """Whether the mask lets any of the positions `queries` [B, N] see any of `keys` [B, N]: never if causal."""
    if mask is None or mask.ndim != 4:
        return False
    return bool((allowed_by(mask)[:, 0] & queries[:, :, None] & keys[:, None, :]).any())
