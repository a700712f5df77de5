"""Dropping visual tokens without looking at them: the baselines that scores have to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, Prefill
from dyvte.policies.method import Source
from dyvte.policies.pruning.fastv import check_share
from dyvte.policies.token_scores import evenly_spaced, place_in_image, random_subset, stratified_subset


@dataclass
class UniformDrop(Policy):
    """Keep a share of every image's visual tokens, evenly spaced in raster order.

    Attributes:
        keep: share of an image's tokens that stays, 0..1.
        layer: number of decoder layers that see all visual tokens, 0..L-1.

    Example:
        >>> with dyvte.UniformDrop(keep=0.25)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> int((run.prefill.kept & run.prefill.layout.visual)[0].sum())
        36
    """

    name = "uniform"
    label = "uniform"
    source = Source()
    acts = "thins"
    by_place = True

    keep: float = 0.5
    layer: int = 0

    def __post_init__(self) -> None:
        check_share(f"{type(self).__name__}: keep", self.keep)

    def check(self, mllm: MLLM) -> None:
        """Refuse a layer outside 0..L-1."""
        self.check_layer(self.layer, mllm)

    def shares(self, mllm: MLLM) -> list[float]:
        """All up to `layer`, then `keep`."""
        return [1.0] * self.layer + [self.keep] * (mllm.num_layers - self.layer)

    def choose(self, size: int, keep: int) -> Tensor:
        """Which `keep` of an image's `size` tokens stay."""
        return evenly_spaced(size, keep)

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Drop by place in the image."""
        if layer != self.layer:
            return
        place, size = place_in_image(prefill.layout.visual)
        stays = torch.zeros_like(prefill.kept)
        for of_image in size.unique().tolist():
            if of_image:
                chosen = torch.zeros(of_image, dtype=torch.bool)
                chosen[self.choose(of_image, int(of_image * self.keep + 0.5))] = True
                stays |= (size == of_image) & chosen.to(place.device)[place.clamp(0, of_image - 1)]
        prefill.drop(~stays)


@dataclass
class RandomDrop(UniformDrop):
    """Keep a random share of every image's visual tokens.

    One seed is one draw of places, the same for every image of the same size whatever the batch, so that runs can be
    repeated. Compare over at least ten seeds.

    Attributes:
        seed: of the draw.
        stratified: draw one token from each of as many compact regions of the grid as tokens stay.

    Example:
        >>> with dyvte.RandomDrop(keep=0.25, seed=3)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> int((run.prefill.kept & run.prefill.layout.visual)[0].sum())
        36
    """

    name = "random"
    label = "random"
    source = Source()

    seed: int = 0
    stratified: bool = False

    def choose(self, size: int, keep: int) -> Tensor:
        """A random subset."""
        draw = stratified_subset if self.stratified else random_subset
        return draw(size, keep, torch.Generator().manual_seed(self.seed))


@dataclass
class StratifiedDrop(RandomDrop):
    """Keep one random visual token of every region of the grid.

    Example:
        >>> with dyvte.StratifiedDrop(keep=0.25)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> int((run.prefill.kept & run.prefill.layout.visual)[0].sum())
        36
    """

    name = "random_stratified"
    label = "stratified random"
    source = Source()

    stratified: bool = True
