"""Tokens that repeat a few pivots leave.

DART (arXiv 2502.11494; read in ports, ModelTC/LightCompress among them): before layer 2, the four visual and the four
later text tokens with the largest L1 norm of their keys in the layer before are pivots; visual pivots stay, and each
pivot adds the visual tokens with the lowest cosine to it, of states after the decoder's final norm.

Deviations: keys are taken before rotary positions, which change an L1 norm with the place of the whole prompt; the
ports take them from the cache. The count is exact, where the ports round a share for every pivot down. Visual pivots
come first, by norm, then text pivots; the ports' order is a set's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.errors import ConfigError, UnsupportedError
from dyvte.mllm import MLLM
from dyvte.policies.base import PolicyRun, Prefill
from dyvte.policies.decoder.stages import keep_projections, projected
from dyvte.policies.method import Source
from dyvte.policies.scorer import ScorerPolicy, VisualTokens, top


@dataclass
class DART(ScorerPolicy):
    """Keep pivots and what is least like them.

    Attributes:
        layer: the layer before which tokens leave, 1..L-1.
        image_pivots: visual tokens of largest keys.
        text_pivots: text tokens after the image of largest keys.

    Example:
        >>> with dyvte.DART(keep=0.33)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "dart"
    label = "DART"
    source = Source("2502.11494", unverified="read in ports; the order of pivots")

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4

    def stages(self, mllm: MLLM) -> Mapping[int, float]:
        """One."""
        return {self.layer: self.keep}

    def check(self, mllm: MLLM) -> None:
        """Refuse layer 0, before which there are no keys, and decoders without a final norm."""
        super().check(mllm)
        if self.layer < 1:
            raise ConfigError("DART: layer must be 1 or more (a layer has to make keys first), got 0")
        if not isinstance(getattr(mllm.decoder, "norm", None), nn.Module):
            raise UnsupportedError(f"DART needs the decoder's final norm, which {type(mllm.decoder).__name__} has not")

    @contextmanager
    def hooks(self, mllm: MLLM, run: PolicyRun) -> Iterator[None]:
        """Keep the keys of the layer before."""
        with super().hooks(mllm, run), keep_projections(self, mllm, run, [self.layer - 1], "k_proj"):
            yield

    @torch.no_grad()
    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """L1 norm of the keys, over all heads."""
        if layer == self.layer:
            norm = projected(self, prefill, layer - 1, "k_proj").abs().sum((1, 3))
            prefill.state[id(self), "seen"] = (layer - 1, norm)
        super().before_layer(layer, prefill)

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """Pivots first."""
        norm: Any = tokens.mllm.decoder.norm
        pivots = top(tokens.received, min(self.image_pivots, number))
        by_norm = tokens.received.masked_fill(~pivots, -torch.inf).argsort(descending=True)[: int(pivots.sum())]
        text = tokens.text[top(tokens.text_received, self.text_pivots)]
        return pivots | least_alike(norm(tokens.hidden), pivots, [*by_norm.tolist()], norm(text), number)


def least_alike(states: Tensor, taken: Tensor, pivots: list[int], text: Tensor, number: int) -> Tensor:
    """[n] boolean: `number` of the states [n, d], those `taken` [n] and, pivot by pivot, those of lowest cosine to it.

    What is not taken is shared out over the pivots, those of the text [t, d] after the others; the first ones get what
    is left over.
    """
    stay, around = taken.clone(), torch.cat([states[pivots], text])
    alike = nn.functional.normalize(states.float(), dim=1) @ nn.functional.normalize(around.float(), dim=1).T
    missing = number - int(taken.sum())
    for turn in range(around.shape[0]):
        share = missing // around.shape[0] + (turn < missing % around.shape[0])
        stay |= top(-alike[:, turn].masked_fill(stay, torch.inf), share)
    return stay
