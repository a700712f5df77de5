"""Patches most like the class token stay, as many as come before the curve's knee; later, those most like the text.

Sparsity Meets Similarity (arXiv 2409.01162; its first version is called Balancing Performance and Efficiency; no public
code): before the projector, tokens are sorted by their similarity to the class token and cut at the inflection point of
the sorted curve, sample by sample; within the decoder tokens of low relevance to the text are dropped.

Unverified (the abstracts say no more): which similarity and layer, the rule of the inflection point, the decoder layer,
the second stage's share and relevance. Here: cosine with the class token's state in the layer that the projector gets;
the point that is farthest below the chord of the sorted curve, itself included; cosine with the mean state of the text
after the image, before decoder layer 2, half of what is left.

Deviations: text tokens, which the first version drops too, stay. Without class token its place is taken by the mean
patch. Newlines leave. Position ids are the original ones unless `positions="contiguous"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.instrument.vision_tower import TowerNeeds
from dyvte.mllm import MLLM
from dyvte.policies.merging.nearest import unit
from dyvte.policies.method import Calibration, Source
from dyvte.policies.scorer import ScorerPolicy, VisualTokens, top
from dyvte.policies.vision.tiles import shown_layer


@dataclass
class SparsityMeetsSimilarity(ScorerPolicy):
    """Cut at the knee of similarity to the class token, then by similarity to the text.

    Attributes:
        keep: share or number that stays before the decoder; None for as many as come before the knee.
        layer: decoder layer before which tokens leave a second time; None for no second time.
        relevant: share of what is left then that stays.

    Example:
        >>> with dyvte.SparsityMeetsSimilarity()(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "sparsity_similarity"
    label = "Sparsity Meets Similarity"
    source = Source("2409.01162", unverified="layer, knee and second stage: read in the abstracts only")
    needs = ("vision tower",)

    keep: float | None = None  # type: ignore[assignment]
    layer: int | None = 2
    relevant: float = 0.5

    def __post_init__(self) -> None:
        if self.keep is not None:
            super().__post_init__()

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> SparsityMeetsSimilarity | None:
        """The second stage halves what is left as long as the first can meet the budget, and gives way above that."""
        return calibration.solve(
            lambda share: cls(keep=min(1.0, share / cls.relevant), relevant=max(cls.relevant, share)), budget
        )

    def stages(self, mllm: MLLM) -> Mapping[int, float]:
        """Before the decoder and before `layer`; of unknown numbers the largest."""
        first = 1.0 if self.keep is None else self.keep
        second = int(first * self.relevant + 0.5) if isinstance(first, int) else first * self.relevant
        return {0: first} if self.layer is None else {0: first, self.layer: second}

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """The states that the projector gets."""
        return TowerNeeds(features=(shown_layer(mllm),))

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] similarity to the class token before the decoder, to the text within it."""
        if tokens.layer:
            return unit(tokens.hidden) @ unit(tokens.text.float().mean(0))
        layer, tower = shown_layer(tokens.mllm), tokens.of_tower()
        features = tower.features(layer)
        has_class_token = bool(tower.class_states)
        whole = tower.of_class_token(tower.class_states, layer) if has_class_token else features.mean(0, keepdim=True)
        return (unit(features) * unit(whole)).sum(-1)

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """[n] the highest, as many as the budget or the knee says."""
        if tokens.layer:
            return top(self.score(tokens), int(len(tokens.place) * self.relevant + 0.5))
        if self.keep is None:
            number = knee(self.score(tokens)[tokens.view >= 0]) + 1
        return super().choose(tokens, number)


def knee(scores: Tensor) -> int:
    """Index, in the falling order of the scores [n], of the point that is farthest below the curve's chord."""
    curve = scores.double().sort(descending=True).values
    height = (curve - curve[-1]) / (curve[0] - curve[-1]).clamp(min=torch.finfo(curve.dtype).tiny)
    chord = torch.linspace(1, 0, len(curve), dtype=curve.dtype, device=curve.device)
    return int((chord - height).argmax())
