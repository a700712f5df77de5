"""How fast visual tokens leave depends on the question: the more text and image tell of each other, the later.

AutoPrune (arXiv 2509.23931; code AutoLab-SAI-SJTU/AutoPrune): after layer 1 of 32 the mutual information of text and
visual tokens, with attention / (number of text tokens) for their joint probability and text tokens equally likely, is
summed over heads; from it k = max(0.4 - 0.2 * information, 0). Layer l then keeps a share proportional to
0.75 / (1 + exp(k (l - 14.9 - k))), scaled so that its mean over the layers is the budget, of the visual tokens with the
most attention from the text.

Deviations: the code first prunes to 2.5 times the budget behind layer 0, with the class token's attention in the rank,
and recycles what leaves as SparseVLM does; both are left out, so that what is compared is the curve. Layers are in
proportion to the depth; the curve is cut at all tokens; images of one prompt share its information; position ids are
kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.mllm import MLLM
from dyvte.policies.attention_policy import LayerAttention
from dyvte.policies.base import Prefill
from dyvte.policies.method import Source
from dyvte.policies.scorer import ScorerPolicy, VisualTokens, top

DEPTH = 32
LOOKS, STARTS = 1, 2
"""The layer whose attention tells the information, and the first before which tokens leave."""
STEEPEST, SLOPE, HEIGHT, MIDDLE = 0.4, 0.2, 0.75, 14.9
TINY = 1e-6
HALVINGS = 40


@dataclass
class AutoPrune(ScorerPolicy):
    """Prune before every layer, along a curve of the prompt's own.

    Attributes:
        keep: share of the visual tokens that a layer sees, the mean over layers, for every prompt the same.

    Example:
        >>> with dyvte.AutoPrune(keep=0.5)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "autoprune"
    label = "AutoPrune's curve"
    source = Source("2509.23931", "AutoLab-SAI-SJTU/AutoPrune")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, int):
            raise ConfigError(f"AutoPrune: keep is a share 0..1, the mean over layers, got {self.keep}")

    def stages(self, mllm: MLLM) -> dict[int, float]:
        """The curve of a prompt whose text and image tell nothing of each other; `choose` takes the prompt's own."""
        curve = shares_by_layer(torch.zeros(1), float(self.keep), mllm.num_layers)[0]
        return {layer: float(curve[layer]) for layer in range(STARTS, mllm.num_layers)}

    def watched_layers(self, mllm: MLLM) -> Collection[int]:
        """Each layer before one where tokens leave."""
        return range(LOOKS, mllm.num_layers - 1)

    def look(self, layer: int, prefill: Prefill, attention: LayerAttention) -> Tensor:
        """Attention received from the text after the image; once also the prompts' own curves."""
        text = prefill.layout.text_status_positions
        if layer == LOOKS:
            asked = attention.selection.pack(text.float()).bool()
            visual = attention.selection.pack(prefill.layout.visual.float()).bool()
            places = asked.any(0).nonzero().flatten()
            told = prefill.hidden.new_zeros(len(asked), dtype=torch.float32)
            if len(places):
                queries = slice(int(places[0]), int(places[-1]) + 1)
                told = information(attention.rows(queries), asked[:, queries], visual)
            num_rows, length = prefill.kept.shape
            curves = told.new_zeros(num_rows, 1, prefill.mllm.num_layers)
            curves[attention.selection.rows, 0] = shares_by_layer(told, float(self.keep), curves.shape[2]).to(curves)
            key = (id(self), "earlier")
            prefill.state[key] = curves.expand(-1, length, -1) + prefill.state.get(key, 0.0)
        return attention.received(text)

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """As many as the prompt's own curve says, of those with the most attention."""
        assert tokens.earlier is not None
        return top(tokens.received, int(tokens.earlier[0, tokens.layer] * tokens.size + 0.5))


def information(attention: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """[b] mutual information in bits of text and visual tokens, summed over heads, from attention [b, H, q, n].

    Of the queries `text` [b, q] and the keys `visual` [b, n] count.

    Example:
        >>> attention = torch.tensor([[[[0.3, 0.1], [0.1, 0.3]]]])
        >>> information(attention, torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
        tensor([0.0755])
    """
    rows = text.sum(1).clamp(min=1)[:, None, None, None]
    joint = attention * (text[:, None, :, None] & visual[:, None, None, :]) / rows
    apart = joint.sum(2, keepdim=True) / rows
    ratio = (joint / (apart + TINY)).log2()
    return torch.where(joint > 0, joint * ratio, 0.0).sum((1, 2, 3))


def steepness(told: Tensor) -> Tensor:
    """The curve's k, from the information."""
    return (STEEPEST - SLOPE * told).clamp(min=0)


def curve_at(layer: Tensor, steep: Tensor) -> Tensor:
    """The curve before it is scaled, at layers of 32.

    Example:
        >>> curve_at(torch.tensor(10.0), steepness(torch.tensor(0.0755)))
        tensor(0.6633)
    """
    return HEIGHT / (1 + (steep * (layer - MIDDLE - steep)).exp())


def shares_by_layer(told: Tensor, keep: float, num_layers: int) -> Tensor:
    """[b, L] share of the visual tokens that each layer sees: by the information [b], the mean over layers is `keep`.

    The first layers see all of them; where that alone is more than the budget, no other layer sees any.
    """
    layer = torch.arange(num_layers, dtype=torch.float64, device=told.device) * DEPTH / num_layers
    curve = curve_at(layer, steepness(told.double())[:, None])
    low, high = torch.zeros_like(curve[:, :1]), 1 / curve.amin(1, keepdim=True)

    def shares(scale: Tensor) -> Tensor:
        found = (scale * curve).clamp(max=1)
        found[:, :STARTS] = 1
        return found

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        within = shares(middle).mean(1, keepdim=True) <= keep
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return shares(high if keep >= 1 else low)
