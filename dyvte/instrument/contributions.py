"""What each token role writes into the residual stream through attention: the value, not the attention, decides.

In a layer, role b contributes to query q the vector `c_b(q) = sum_h W_O^h sum_{k in b} A_hqk v_hk` (Kobayashi et al.
2020, "Attention is Not Only a Weight", arXiv 2004.10102). It is reduced at once: no vector is stored per head and key.

Text queries are few, so all of their roles are summed directly. Of the many visual queries only what text writes is,
and what is left of the layer's own output is the image's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyvte.errors import UnsupportedError
from dyvte.instrument.role_attention import Block, Geometry
from dyvte.layout import ROLES, VISUAL

TINY = torch.finfo(torch.float32).tiny


Index = slice | Tensor
"""Positions: a slice where they are a run, so that indexing copies nothing, else a tensor on the CPU."""


@dataclass(frozen=True)
class RoleKeys:
    """Where the keys of every role are and which queries see them, worked out once for all layers that share a mask.

    Positions are on the CPU, so that nothing in a layer waits for the device.

    Attributes:
        members: [B, 4, N] membership of every position in a role, 0 or 1.
        columns: a role's positions in any sample, by role.
        rows: positions of the queries that see a role's keys and whose share of them is summed directly, by role: for
            visual keys those of text, since what is left of the output tells what visual queries take from them.
        shared: whether a role has the same positions in all samples.
        text, image: the positions with text in any sample, and the others.
    """

    members: Tensor
    columns: list[Tensor]
    rows: list[Tensor]
    shared: list[bool]
    text: Tensor
    image: Tensor

    @classmethod
    def of(cls, geometry: Geometry) -> RoleKeys:
        """The keys of a mask."""
        groups = geometry.groups
        members = groups.queries[:, : len(ROLES)]
        if geometry.allowed is None:
            seeing = members.cumsum(-1) > 0
        else:
            seeing = (geometry.allowed.float() @ members.transpose(1, 2) > 0).transpose(1, 2)
        seeing[:, VISUAL] &= groups.text
        has, seen, text = members.any(0).cpu(), seeing.any(0).cpu(), groups.text.cpu()
        return cls(
            members=members,
            columns=[each.nonzero().flatten() for each in has],
            rows=[each.nonzero().flatten() for each in seen],
            shared=(members.bool().all(0).cpu() == has).all(-1).tolist(),
            text=text.nonzero().flatten(),
            image=(~text).nonzero().flatten(),
        )

    def in_block(self, block: Block) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The roles whose keys a block has: role, their positions, and their numbers among the role's."""
        for role, columns in enumerate(self.columns):
            inside = ((columns >= block.columns.start) & (columns < block.columns.stop)).nonzero().flatten()
            if len(inside) and len(self.rows[role]) and (role != VISUAL or block.text):
                yield role, columns[inside], inside

    def among(self, queries: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The roles that some of `queries` see: role, their numbers among the role's rows, and among `queries`."""
        for role, rows in enumerate(self.rows):
            inside = torch.isin(rows, queries).nonzero().flatten()
            if len(inside):
                yield role, inside, torch.searchsorted(queries, rows[inside])


class ValueMixtures:
    """Values of one layer, mixed by attention for the keys of every role apart, one block of attention rows at a time.

    A role of fewer keys than a value is wide keeps its attention: its values are then projected before they are mixed,
    which is the same sum in another order and far cheaper than to project a mixture for every query.

    Args:
        value: [B, H_kv, N, value size].
        keys: where the roles are.
        num_heads: H, a multiple of H_kv.
    """

    def __init__(self, value: Tensor, keys: RoleKeys, num_heads: int) -> None:
        batch, key_heads, length, size = value.shape
        self.keys = keys
        self._value = value.float()
        self._shape = batch, key_heads, num_heads // key_heads, size
        self._few = [len(columns) < size for columns in keys.columns]
        self._kept = [
            self._value.new_zeros(batch, length if len(rows) else 0, num_heads, len(columns) if few else size)
            for rows, columns, few in zip(keys.rows, keys.columns, self._few, strict=True)
        ]

    def add(self, block: Block, attention: Tensor) -> None:
        """Take in attention rows [B, H, queries, keys] of a block."""
        for role, seen, inside in self.keys.in_block(block):
            weights = attention[..., _span(seen - block.columns.start)]
            if not self.keys.shared[role]:
                weights = weights * self.keys.members[:, None, None, role, seen]
            if self._few[role]:
                self._kept[role][:, block.rows, :, _span(inside)] = weights.transpose(1, 2)
            else:
                self._kept[role][:, block.rows] = self._mix(weights, seen).transpose(1, 2)

    def _mix(self, weights: Tensor, keys: Tensor) -> Tensor:
        """Values at `keys` mixed by `weights` [B, H, queries, keys]: [B, H, queries, value size]."""
        batch, key_heads, group, size = self._shape
        queries = weights.shape[2]
        folded = weights.reshape(batch, key_heads, group * queries, len(keys))
        return (folded @ self._value[:, :, _span(keys)]).view(batch, key_heads * group, queries, size)

    def _write(self, role: int, projection: nn.Module) -> Tensor:
        """What a role writes at the rows that see it: [B, rows, d]."""
        kept = self._kept[role][:, _span(self.keys.rows[role])]  # [B, rows, H, keys or value size]
        if self._few[role] and type(projection) is nn.Linear:
            _, key_heads, group, size = self._shape
            weight = projection.weight.float().view(-1, key_heads, group, size)
            values = self._value[:, :, _span(self.keys.columns[role])]
            projected = torch.einsum("bksv,dkgv->bkgsd", values, weight).flatten(1, 3)  # [B, H x keys, d]
            return kept.flatten(2) @ projected
        if self._few[role]:
            kept = self._mix(kept.transpose(1, 2), self.keys.columns[role]).transpose(1, 2)
        return linear_part(projection, kept.flatten(2)).float()

    def through(self, projection: nn.Module, output: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Send the mixtures through the layer's output projection and compare them with what they are added to.

        Args:
            projection: the output projection, [..., H x value size] -> [..., d]; its bias belongs to no role.
            output: [B, N, d], what it gave for the whole attention.
            residual: [B, N, d], the hidden states that enter the layer.

        Returns:
            Mean over the queries of a role of the contribution's norm over the residual stream's, and of its share
            (shares add to 1 over key roles): two times [B, 4, 4] (query role, key role), NaN where a role is absent.
        """
        output = without_bias(projection, self._kept[0].shape[2] * self._shape[-1], output).float()
        written = [self._write(role, projection) if len(rows) else None for role, rows in enumerate(self.keys.rows)]
        norms, shares = (output.new_zeros(*output.shape[:2], len(ROLES)) for _ in range(2))
        for rows in (self.keys.text, self.keys.image):
            if not len(rows):
                continue
            parts: list[tuple[int, Tensor, Tensor]] = []  # role, places among the rows, what it writes there
            for role, inside, places in self.keys.among(rows):
                vectors = written[role]
                assert vectors is not None
                parts.append((role, places, vectors[:, _span(inside)]))
            visual_queries = rows is self.keys.image
            if visual_queries:
                total = output[:, _span(rows)]
                rest, shares[:, _span(rows), VISUAL] = total, 1.0
                for _, places, vectors in parts:
                    if len(places) == len(rows):
                        rest = rest - vectors
                    else:
                        rest = rest.index_add(1, places.to(rest.device), -vectors)
                norms[:, _span(rows), VISUAL] = rest.norm(dim=-1)
            else:
                total = output.new_zeros(len(output), len(rows), output.shape[-1])
                for _, places, vectors in parts:
                    total[:, _span(places)] += vectors
            squared = total.square().sum(-1).clamp_min(TINY)
            for role, places, vectors in parts:
                at = _span(rows[places])
                norms[:, at, role] = vectors.norm(dim=-1)
                along = torch.linalg.vecdot(vectors, total[:, _span(places)])
                shares[:, at, role] = along / squared[:, _span(places)]
                if visual_queries:  # shares add to one, and the image has what is left
                    shares[:, at, VISUAL] -= shares[:, at, role]
        norms /= residual.float().norm(dim=-1, keepdim=True).clamp_min(TINY)
        queries = self.keys.members.sum(-1)  # [B, 4]
        absent = ~((queries > 0)[:, :, None] & (queries > 0)[:, None])
        divisor = queries.clamp_min(1)[..., None]
        norm, share = ((self.keys.members @ each / divisor).masked_fill(absent, torch.nan) for each in (norms, shares))
        return norm, share


def _span(index: Tensor) -> Index:
    """Ascending positions on the CPU, as a slice where they are a run."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def linear_part(module: nn.Module, vectors: Tensor) -> Tensor:
    """Output of an affine layer without its bias; of a plain layer, a quantised one or one with an adapter."""
    vectors = vectors.to(next((p.dtype for p in module.parameters() if p.is_floating_point()), vectors.dtype))
    if type(module) is nn.Linear:
        return nn.functional.linear(vectors, module.weight)
    return module.forward(vectors) - module.forward(torch.zeros_like(vectors[:1, :1]))


def without_bias(module: nn.Module, width: int, output: Tensor) -> Tensor:
    """Output of an affine layer of input `width`, less what it adds to everything."""
    if type(module) is nn.Linear:
        return output if module.bias is None else output - module.bias
    return output - module.forward(output.new_zeros(1, 1, width))


class OutputProjection:
    """Finds the layer that an attention module sends its heads through, when it is called.

    Args:
        attention: the attention module.
        done: told (projection, output with bias) once it was called.
    """

    def __init__(self, attention: nn.Module, done: Callable[[nn.Module, Tensor], None]) -> None:
        self._heads: Tensor | None = None
        self._done = done
        children = [child for child in attention.children() if any(p.ndim == 2 for p in child.parameters())]
        self._handles = [child.register_forward_hook(self._called) for child in children]
        self._children = {id(child) for child in children}

    def expect(self, heads: Tensor) -> None:
        """What the attention function gave, [B, N, H, value size], to be projected next."""
        self._heads = heads

    def _called(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if self._heads is None or id(module) not in self._children or not args:
            return
        given, heads = args[0], self._heads
        if not isinstance(given, Tensor) or not isinstance(output, Tensor) or given.numel() != heads.numel():
            return
        if given.data_ptr() == heads.data_ptr() or torch.equal(given.flatten(), heads.flatten()):
            self._heads = None
            self._done(module, output)

    def check(self, name: str) -> None:
        """Complain if the heads never arrived.

        Raises:
            UnsupportedError: a layer changes the heads' output (a gate, a norm) before it projects it.
        """
        if self._heads is not None:
            raise UnsupportedError(
                f"contributions need the heads' output to go straight into an output projection, which {name} does not "
                "do (a gate or a norm stands between); use AttentionProbe without contributions"
            )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
