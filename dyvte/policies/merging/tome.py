"""Similar visual tokens are merged.

ToMe (arXiv 2210.09461) merges tokens of a vision transformer by bipartite soft matching, by their keys. A merged token
counts as many times as tokens are in it (Section 3, proportional attention): the log of its size is added to the scores
of its key in all later layers, for generated tokens too.

Deviations: tokens merge before the layers of a causal decoder, where the paper has a vision transformer's; within one
image only, by the keys (mean over heads, before rotary positions) of the layer before; the token that takes another in
keeps its own place and position id.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.decoder.stages import keep_projections, projected, projection_of
from dyvte.policies.method import Calibration, Source
from dyvte.policies.pruning.fastv import check_share
from dyvte.policies.token_scores import images, tokens_in_image


def bipartite_soft_matching(metric: Tensor, group: Tensor, merges: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N] whether a token leaves, and [B, N] the place of the one that takes it in, else its own.

    ToMe, arXiv 2210.09461, Section 3, "Bipartite Soft Matching": the tokens of a group are dealt out alternately to two
    sets; every token of the first draws an edge to the most similar one of the second; the most similar pairs merge.

    Args:
        metric: [B, N, c] whose cosine is similarity.
        group: [B, N] number of the group (image) of a token, -1 for tokens that take no part.
        merges: [B, N] how many pairs merge in the token's group; at most half of a group can.
    """
    position = torch.arange(group.shape[1], device=group.device)
    member = group >= 0
    same = (group[:, :, None] == group[:, None, :]) & member[:, :, None]
    earlier = position[:, None] > position
    odd = (same & earlier).sum(2) % 2 == 1  # rank within the group
    unit = nn.functional.normalize(metric.float(), dim=-1)
    edges = (unit @ unit.transpose(1, 2)).masked_fill(~(same & odd[:, None, :]), -torch.inf)
    similarity, partner = edges.max(2)
    source = member & ~odd & (similarity > -torch.inf)
    # Rank among the sources of the group; ties go to the earlier one.
    other, own = similarity[:, None, :], similarity[:, :, None]
    ahead = same & source[:, None, :] & ((other > own) | ((other == own) & earlier))
    leaves = source & (ahead.sum(2) < merges)
    return leaves, torch.where(leaves, partner, position)


def merge(features: Tensor, size: Tensor, leaves: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, N, d] and sizes [B, N] (original tokens in a token) after each took others in, weighted by size.

    `leaves` and `into` are of `bipartite_soft_matching`; tokens that left keep what they had.
    """
    taken = torch.where(leaves, size, 0.0)
    new_size = size.scatter_add(1, into, taken)
    weights = size.to(features.dtype)[:, :, None]
    arriving = torch.where(leaves[:, :, None], features * weights, 0.0)
    total = (features * weights).scatter_add(1, into[:, :, None].expand_as(features), arriving)
    merged = total / new_size.to(features.dtype)[:, :, None]
    grown = (new_size != size)[:, :, None]
    return torch.where(grown, merged, features), new_size


@dataclass
class ToMe(Policy):
    """Merge similar visual tokens: before the decoder to a share of them, or some more before every layer.

    Give `keep` or `merges`.

    Attributes:
        keep: share of an image's tokens that is left before the decoder, above 0.
        merges: tokens merged away in every image, before each of the layers 1..L-1 (one number, the paper's r), or
            before each layer 0..L-1 (L numbers).

    Example:
        >>> with dyvte.ToMe(keep=0.25)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> int((run.prefill.kept & run.prefill.layout.visual)[0].sum())
        36
    """

    name = "tome"
    label = "ToMe"
    source = Source("2210.09461", "facebookresearch/ToMe")
    acts = "thins"

    keep: float | None = None
    merges: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.merges is None):
            raise ValueError("ToMe: give either keep (share left before the decoder) or merges (tokens a layer)")
        if self.keep is not None:
            check_share("ToMe: keep", self.keep)

    def check(self, mllm: MLLM) -> None:
        """Refuse a schedule of another length, and attention without a key projection of its own."""
        schedule = self.schedule(mllm.num_layers)
        if len(schedule) != mllm.num_layers or min(schedule) < 0:
            raise ValueError(
                f"ToMe: merges must be one number or {mllm.num_layers} (one a layer) for this model, none negative, "
                f"got {self.merges}"
            )
        for layer in self._keys_of(mllm):
            projection_of(mllm, layer, "k_proj")

    def shares(self, mllm: MLLM) -> list[float]:
        """`keep` from the first layer on; what `merges` leaves depends on the images."""
        if self.keep is None:
            return super().shares(mllm)
        return [self.keep] * mllm.num_layers

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """`keep` is solved for; one token stays at the least."""
        return calibration.solve(lambda keep: cls(keep=max(keep, 1e-6)), budget)

    def schedule(self, num_layers: int) -> list[int]:
        """Tokens merged away in every image before each layer, where `merges` is given."""
        if self.merges is None:
            return [0] * num_layers
        if isinstance(self.merges, int):
            return [0, *[self.merges] * (num_layers - 1)]
        return list(self.merges)

    def _keys_of(self, mllm: MLLM) -> list[int]:
        """The layers whose keys are needed."""
        return [layer - 1 for layer, number in enumerate(self.schedule(mllm.num_layers)) if number and layer]

    def hooks(self, mllm: MLLM, run: PolicyRun) -> AbstractContextManager[None]:
        """Keep the keys that `merges` goes by."""
        return keep_projections(self, mllm, run, self._keys_of(mllm), "k_proj")

    @torch.no_grad()
    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Merge."""
        visual = prefill.layout.visual
        if self.keep is not None:
            if layer == 0:
                image = images(visual)
                left = (tokens_in_image(image, visual) * self.keep + 0.5).floor().long().clamp(min=1)
                halvings = next(n for n in range(64) if self.keep >= 0.5 ** (n + 1) or n == 63)
                for _ in range(halvings + 1):
                    present = tokens_in_image(image, visual & prefill.kept)
                    self._merge(prefill, prefill.hidden, present - left)
            return
        number = self.schedule(prefill.mllm.num_layers)[layer]
        if number:
            metric = projected(self, prefill, layer - 1, "k_proj", normed=False).mean(1) if layer else prefill.hidden
            self._merge(prefill, metric, torch.full_like(prefill.layout.roles, number))

    def _merge(self, prefill: Prefill, metric: Tensor, merges: Tensor) -> None:
        present = prefill.kept & prefill.layout.visual
        leaves, into = bipartite_soft_matching(metric, images(prefill.layout.visual).masked_fill(~present, -1), merges)
        sizes = prefill.state.get((id(self), "sizes"))
        if sizes is None:
            sizes = torch.ones_like(prefill.kept, dtype=torch.float32)
        prefill.hidden, sizes = merge(prefill.hidden, sizes, leaves, into)
        prefill.state[id(self), "sizes"] = sizes
        prefill.key_bias = sizes.log()
        prefill.drop(leaves)
