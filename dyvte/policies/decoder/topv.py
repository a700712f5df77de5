"""Tokens that an optimal transport between a layer's inputs and outputs moves most to stay.

TopV (arXiv 2503.18278; no code): after the second layer visual tokens are ranked by a transport plan from the layer's
inputs to its normalised outputs. Its cost adds the distance of features, a Gaussian of the distance on the grid, and
the distance from the middle; three Sinkhorn steps make the plan. Of those that leave some are taken back, evenly
spaced.

Read in summaries only; ours are: equal weights of the three costs, each over its largest value; a temperature of 0.1;
both sides scaled to a root mean square of 1; what a token receives under the plan as its importance; a tenth of the
budget for tokens taken back; and a line in place of a grid for images without a square one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.policies.base import Prefill
from dyvte.policies.decoder.stages import StagedScorer
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens, top
from dyvte.policies.token_scores import evenly_spaced, grid_sides

TEMPERATURE, STEPS = 0.1, 3


@dataclass
class TopV(StagedScorer):
    """Prune once by a transport plan.

    Attributes:
        keep: share or number of an image's tokens that stays.
        layers: the one layer; None for 2 of 32, in proportion.
        recovered: share of the budget for evenly spaced tokens of those that would leave.

    Example:
        >>> with dyvte.TopV()(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "topv"
    label = "TopV"
    source = Source("2503.18278", unverified="weights, temperature, importance and recovery: read in summaries only")
    paper_layers = (2,)

    recovered: float = 0.1

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Put the inputs of the layer before the stage aside."""
        if layer + 1 in self.layers_of(prefill.mllm):
            prefill.state[id(self), "earlier"] = prefill.hidden
        super().before_layer(layer, prefill)

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """The most important, and some of the others."""
        assert tokens.earlier is not None
        scores = importance(tokens.earlier, tokens.hidden, tokens.place, tokens.size)
        stay = top(scores, number - round(number * self.recovered))
        others = (~stay).nonzero().flatten()
        some = evenly_spaced(len(others), min(number - int(stay.sum()), len(others))).to(others.device)
        return stay.index_fill(0, others[some], True)


def importance(inputs: Tensor, outputs: Tensor, place: Tensor, size: int) -> Tensor:
    """[n] what each token receives under the plan, in which every token gives 1 / n.

    From the states [n, d] before and after a layer, and the tokens' places [n] in the whole image.
    """
    rms = [
        each / each.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6) for each in (inputs.float(), outputs.float())
    ]
    height, width = grid_sides(size)
    at = torch.stack([place // width, place % width], dim=1).float()
    near = torch.cdist(at, at) / max(height, width)
    middle = (at - at.new_tensor([height - 1, width - 1]) / 2).norm(dim=1)
    costs = (torch.cdist(rms[0], rms[1]), 1 - (-near.square() / 2).exp(), middle[None].expand_as(near))
    total = torch.stack([each / each.max().clamp(min=1e-6) for each in costs]).sum(0)
    kernel = (-total / TEMPERATURE).exp()
    gives = receives = torch.ones_like(kernel[0])
    for _ in range(STEPS):
        receives = 1 / (gives @ kernel).clamp(min=1e-30)
        gives = 1 / (kernel @ receives).clamp(min=1e-30)
    return (gives @ kernel) * receives / len(kernel)
