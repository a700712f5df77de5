"""Visual tokens leave that add nothing to what the last token takes in, and all of them once none does.

VisiPruner (arXiv 2510.17205; code EIT-NLP/VisiPruner): o is what the last prompt token's attention gives, heads side by
side and before the output projection, and c_v the part of it that comes from visual token v. At the first layer after 6
of 32 where the cosine of o - c_v and o falls below 0.995 for some v, only tokens with |c_v| above 0.2 stay. From there
on layers are counted in which no cosine is below 0.999; behind the second, not necessarily the next one, all leave.

Deviations: the code's optional mode that hides the image from the text in the first layers is left out; layers are in
proportion to the depth; lengths |c_v| are those of the model at hand, for which 0.2 was not chosen. To meet a budget
`loud` is solved for by running the prompts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.cost.spent import measured_cost
from dyvte.errors import ConfigError
from dyvte.mllm import MLLM
from dyvte.policies.attention_policy import AttentionPolicy, LayerAttention
from dyvte.policies.base import Policy, Prefill
from dyvte.policies.decoder.stages import in_proportion
from dyvte.policies.method import Calibration, Source, largest_within

FIRST_LAYER, DEPTH = 7, 32
CALM_LAYERS = 2
"""Layers in which nothing is taken in any more, before all visual tokens leave."""
STEPS = 8
"""Halvings when `loud` is solved for; each runs the prompts."""


@dataclass
class VisiPruner(AttentionPolicy):
    """Filter once by what the last token takes in from every visual token, then wait until it takes in nothing.

    Attributes:
        loud: a cosine below it makes the filter act.
        length: tokens stay that add more than this to the last token's attention output.
        calm: a layer counts as calm if no cosine is below it.
        first_layer: first layer looked at; None is 7 of 32, in proportion.

    Example:
        >>> with dyvte.VisiPruner()(mllm) as run:
        ...     answers = mllm.generate(batch)
        >>> run.exit_layers.shape
        torch.Size([2])
    """

    name = "visipruner"
    label = "VisiPruner"
    has_published_setting = True
    source = Source("2510.17205", "EIT-NLP/VisiPruner")
    acts = "exits"

    loud: float = 0.995
    length: float = 0.2
    calm: float = 0.999
    first_layer: int | None = None

    def __post_init__(self) -> None:
        if self.first_layer is not None and self.first_layer < 0:
            raise ConfigError(f"VisiPruner: first_layer is 0 or more, got {self.first_layer}")

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """The smallest `loud`, for the latest filter, whose mean cost over the prompts is within the budget."""
        largest = largest_within(lambda late: measured_cost(calibration, cls(loud=_loud(late))), budget, steps=STEPS)
        return None if largest is None else cls(loud=_loud(largest))

    def watched_layers(self, mllm: MLLM) -> Collection[int]:
        """All from the first looked at to the last but one."""
        first = self.first_layer
        if first is None:
            first = in_proportion([FIRST_LAYER], DEPTH, mllm.num_layers)[0]
        return range(first, mllm.num_layers - 1)

    def see(self, layer: int, prefill: Prefill, attention: LayerAttention) -> None:
        """Cosine and length of every visual token's part in the last token's attention output."""
        at_last = attention.row(prefill.layout.last_prompt)
        cosine, length = value_contributions(at_last, attention.call.value[:, :, : at_last.shape[2]].float())
        key = (id(self), "seen")
        known = prefill.state.get(key)
        if known is None:
            known = prefill.state[key] = torch.ones(2, *prefill.kept.shape, device=prefill.kept.device)
        for values, found in zip(known, (cosine, length), strict=True):
            attention.selection.put_back(values, found)

    @torch.no_grad()
    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Filter, count, or let go."""
        key, seen = (id(self), "progress"), prefill.state.get((id(self), "seen"))
        if layer - 1 not in self.watched_layers(prefill.mllm) or seen is None or not prefill.sees_image:
            return
        cosine, length = seen
        # [B] calm layers so far, -1 before the filter acted
        calm_layers = prefill.state.get(key)
        if calm_layers is None:
            calm_layers = torch.full((len(cosine),), -1, device=cosine.device)
        visual = prefill.kept & prefill.layout.visual
        lowest = cosine.masked_fill(~visual, torch.inf).amin(1)
        filtering = (calm_layers < 0) & (lowest < self.loud)
        counting = (calm_layers >= 0) & (lowest >= self.calm)
        calm_layers = calm_layers + counting + filtering
        prefill.state[key] = calm_layers
        leaving = filtering[:, None] & (length <= self.length) | (calm_layers >= CALM_LAYERS)[:, None]
        prefill.drop(leaving)


def _loud(late: float) -> float:
    """Above all cosines for 0 and below all for 1; between, equal factors of the distance from 1, where they crowd."""
    return 1 - 2 * 10 ** (-8 * (1 - late)) if late > 0 else 2.0


def value_contributions(attention: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What each key adds to one query's attention output, heads side by side and before the output projection.

    With o the output and c_v the part of key v: [b, n] cosine of o - c_v and o, and [b, n] length of c_v, from the
    query's attention [b, H, n] and values [b, H_kv, n, size], H a multiple of H_kv. No c_v is stored.

    Example:
        >>> attention, values = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[[6.0, 0.0], [0.0, 8.0]]]])
        >>> [each.tolist() for each in value_contributions(attention, values)]
        [[[0.8..., 0.6...]], [[3.0, 4.0]]]
    """
    grouped = attention.unflatten(1, (values.shape[1], -1))  # [b, H_kv, heads of a group, n]
    output = grouped @ values
    along = (grouped * (output @ values.transpose(2, 3))).sum((1, 2))  # <o, c_v>
    own = (grouped.square() * values.square().sum(-1)[:, :, None]).sum((1, 2))  # |c_v|^2
    total = output.square().sum((1, 2, 3))[:, None]  # |o|^2
    left = (total - 2 * along + own).clamp(min=0)  # |o - c_v|^2
    cosine = (total - along) / (total * left).sqrt().clamp(min=torch.finfo(total.dtype).tiny)
    return cosine.clamp(-1, 1), own.sqrt()
