"""Patches that matter to the question and are unlike each other stay: a determinantal point process.

CDPruner (arXiv 2506.10967; code Theia-4869/CDPruner): the kernel is relevance times similarity times relevance, with
similarity the cosine of projected features. Relevance is minus the cosine of a patch and the question in CLIP's common
space (the code's sign), averaged over pieces of the question as long as CLIP's text tower takes, and scaled to 0..1.
The set of largest determinant is built greedily.

Deviations: LLaVA does not have the text tower, so `text_tower` names the CLIP model that its vision tower is from.
Without one, and for vision towers that are not CLIP's (unverified in the paper), relevance is our stand-in: the cosine
of projected features and the mean embedding of the text after the image. That text is what the prompt's template makes
of the question, where the code has the question alone. Relevance is scaled over a tile, where the code scales over the
batch. Newlines leave. Position ids are the original ones unless `positions="contiguous"`, which is what the code has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.instrument.vision_text import TextSimilarity
from dyvte.policies.merging.nearest import unit
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens
from dyvte.policies.vision.tiles import PerTile, shown_layer

SMALL = 1e-6
"""Keeps the least relevant token in the kernel, as in the code."""


@dataclass
class CDPruner(PerTile):
    """Keep tokens that are relevant and diverse.

    Attributes:
        text_tower: Hub id or folder of the CLIP model that the vision tower is from; None for the stand-in.

    Example:
        >>> with dyvte.CDPruner(keep=64, text_tower="openai/clip-vit-large-patch14-336")(mllm):  # doctest: +SKIP
        ...     answers = mllm.generate(batch)
    """

    name = "cdpruner"
    label = "CDPruner"
    source = Source("2506.10967", "Theia-4869/CDPruner", "vision towers that are not CLIP's")

    text_tower: str | None = None

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] relevance to the text, 0..1."""
        if self.text_tower is None:
            relevance = unit(tokens.hidden) @ unit(tokens.text.float().mean(0))
        else:
            features = tokens.of_tower().features(shown_layer(tokens.mllm))
            relevance = -TextSimilarity.load(self.text_tower)(features, tokens.question).float().mean(1)
        low, high = relevance.min(), relevance.max()
        return (relevance - low + SMALL) / (high - low).clamp(min=SMALL)

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """[n] the greedy set of largest determinant."""
        weighted = unit(tokens.hidden) * self.score(tokens)[:, None]
        return torch.zeros_like(tokens.view, dtype=torch.bool).index_fill_(0, greedy_map(weighted, number), True)


def greedy_map(vectors: Tensor, number: int) -> Tensor:
    """`number` of the n vectors [n, c], each time the one that adds most to the determinant of their Gram matrix.

    By updates of a Cholesky factor (Chen et al. 2018, arXiv 1709.05135, Algorithm 1).
    """
    kernel = vectors @ vectors.T
    gain, factor = kernel.diagonal().clone(), vectors.new_zeros(number, len(vectors))
    chosen: list[int] = []
    for step in range(number):
        best = int(gain.argmax())
        row = (kernel[best] - factor[:step, best] @ factor[:step]) / gain[best].clamp(min=SMALL**2).sqrt()
        factor[step] = row
        gain = (gain - row.square()).clamp(min=0)
        chosen.append(best)
        gain[chosen] = -torch.inf
    return torch.tensor(chosen, dtype=torch.long, device=vectors.device)
