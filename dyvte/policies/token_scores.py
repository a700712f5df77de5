"""What visual tokens receive in attention, and which of them to drop, in B rows of any images and padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dyvte.errors import UnsupportedError
from dyvte.instrument.role_attention import MAP_ENTRIES


def attention_rows(
    query: Tensor, key: Tensor, allowed: Tensor, scale: float, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Attention [B, H, Q, K] in float32; zeros for a query that may see no key.

    Args:
        query, key: [B, H, Q, head size] and [B, H_kv, K, head size], H a multiple of H_kv (grouped-query attention).
        allowed: [B, Q, K] which keys a query may see.
        scale: factor on the scores.
        bias: [B, 1 or H, Q, K] added to the scores.
        softcap: scores s become softcap * tanh(s / softcap), as in Gemma 2.
    """
    rows, heads, count, size = query.shape
    grouped = (query.float() * scale).reshape(rows, key.shape[1], -1, size)
    scores = (grouped @ key.float().transpose(2, 3)).view(rows, heads, count, key.shape[2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)


def received_head_max(
    rows: Callable[[slice], Tensor], weights: Tensor, num_heads: int, num_keys: int, entries: int = MAP_ENTRIES
) -> Tensor:
    """Attention [B, G, K] that every key receives in G sums over queries, the largest over heads for every pair.

    The matrix is made a few queries at a time, of `entries` at most, and never kept.

    Args:
        rows: gives the attention [B, H, q, K] of a slice of the Q queries.
        weights: [B, G, Q] of every query in each sum.
        num_heads, num_keys: H and K.
        entries: made at once.
    """
    batch, groups, length = weights.shape
    at_once = max(1, entries // (batch * num_heads * num_keys))
    received = weights.new_zeros(batch, groups, num_keys)
    for start in range(0, length, at_once):
        part = slice(start, min(start + at_once, length))
        received += weights[:, :, part] @ rows(part).amax(1)
    return received


def keep_count(share: float | Tensor, candidates: Tensor) -> Tensor:
    """How many of the True positions of `candidates` [B, N] a share of them is: [B], rounded, halves up."""
    return (candidates.sum(1) * share + 0.5).floor().long()


def drop_lowest(scores: Tensor, candidates: Tensor, keep: Tensor) -> Tensor:
    """The candidates [B, N] that are not among the `keep` [B] highest of their row; of equal ones the earlier stays."""
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    # Places are counted among candidates only, as a candidate may score -inf itself.
    place = torch.zeros_like(order).scatter_(1, order, candidates.gather(1, order).long().cumsum(1))
    return candidates & (place > keep[:, None])


def images(visual: Tensor) -> Tensor:
    """[B, N] number of the image in its row that each visual position is of: 0, 1, ...; -1 elsewhere.

    An image is a run of visual positions without text in between (families that put a separator between the tiles of an
    image have as many runs as tiles).
    """
    return torch.where(visual, image_starts(visual).cumsum(1) - 1, -1)


def image_starts(visual: Tensor) -> Tensor:
    """[B, N] whether an image begins at a position."""
    return visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]


def tokens_in_image(image: Tensor, counted: Tensor) -> Tensor:
    """How many positions of `counted` [B, N] lie in the image of each position: [B, N], 0 outside of images."""
    inside = image >= 0
    slot = image.clamp(min=0)
    totals = torch.zeros_like(image).scatter_add_(1, slot, (counted & inside).long())
    return totals.gather(1, slot) * inside


def place_in_image(visual: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N] place of every visual position in its image in raster order (else -1), and the image's size (else 0)."""
    image, number = images(visual), visual.cumsum(1)
    first = torch.where(image_starts(visual), number, 0).cummax(1).values
    return torch.where(visual, number - first, -1), tokens_in_image(image, visual)


def grid_sides(size: int) -> tuple[int, int]:
    """Height and width of an image of `size` tokens: square where it can be, else one row."""
    side = int(size**0.5 + 0.5)
    return (side, side) if side * side == size else (1, size)


def check_square(method: str, sizes: Tensor) -> None:
    """Refuse images whose sizes are no square numbers."""
    for size in sizes.unique().tolist():
        if size > 1 and grid_sides(size)[0] == 1:
            raise UnsupportedError(
                f"{method} needs images with a square grid of visual tokens; one has {size} in a row"
            )


def evenly_spaced(size: int, keep: int) -> Tensor:
    """`keep` of `range(size)`, spread evenly: one from the middle of each of `keep` equal intervals."""
    return ((torch.arange(keep, dtype=torch.float64) + 0.5) * size / max(keep, 1)).long()


def random_subset(size: int, keep: int, generator: torch.Generator) -> Tensor:
    """`keep` of `range(size)` at random, every subset being equally likely; ascending."""
    return torch.randperm(size, generator=generator)[:keep].sort().values


def stratified_subset(size: int, keep: int, generator: torch.Generator) -> Tensor:
    """One random token from each of `keep` compact regions of the image's grid, runs of a Z-order curve; ascending."""
    height, width = grid_sides(size)
    rows, columns = torch.arange(size) // width, torch.arange(size) % width
    code = torch.zeros(size, dtype=torch.long)
    for bit in range(max(height, width).bit_length()):
        code |= ((columns >> bit) & 1) << (2 * bit) | ((rows >> bit) & 1) << (2 * bit + 1)
    curve = code.argsort()
    edges = (torch.arange(keep + 1) * size).div(max(keep, 1), rounding_mode="floor")
    offset = (torch.rand(keep, generator=generator) * edges.diff()).long()
    return curve[edges[:-1] + offset].sort().values


def most_diverse(features: Tensor, candidates: Tensor, keep: Tensor) -> Tensor:
    """Of the candidates [B, N] those that are not among the `keep` [B] most diverse by their features [B, N, d].

    Greedy max-min diversity (DivPrune, arXiv 2503.02175, Section 3): the distance is one minus the cosine; the first
    token is the one farthest from its nearest neighbour, every further one the farthest from all chosen so far.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    apart = distance + torch.diag_embed(torch.full_like(distance[:, 0], torch.inf))
    nearest = apart.masked_fill(~candidates[:, None, :], torch.inf).amin(-1)
    chosen = torch.zeros_like(candidates)
    for step in range(int(keep.max())):
        best = nearest.masked_fill(~candidates | chosen, -torch.inf).argmax(1, keepdim=True)
        active = (step < keep)[:, None]
        chosen |= torch.zeros_like(chosen).scatter_(1, best, active)
        to_best = distance.gather(1, best[:, :, None].expand(-1, 1, distance.shape[2]))[:, 0]
        nearest = to_best if step == 0 else torch.minimum(nearest, to_best)
    return candidates & ~chosen
