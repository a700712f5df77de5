"""A pruning recipe fitted to attention statistics: how many visual tokens leave after which layer.

FitPrune (arXiv 2409.10197): for every layer, the attention that visual tokens receive from each other (self) and from
the text (cross), the largest over heads; tokens are deletable as long as what remains of either distribution is at
least 1 - alpha of it; the smallest alpha that meets a budget of FLOPs is found by bisection.

Deviations: the statistics come from one pass of the full model over a few samples; what tokens that left in an earlier
layer would have received counts as lost. The paper's code runs the model again under every alpha. It also deletes
between attention and MLP of a layer, we delete before the next layer. Several images of a prompt share one count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.cost.flops import plan_decoder_flops
from dyvte.errors import ConfigError, DataError
from dyvte.instrument.attention_calls import AttentionCall, watch_attention
from dyvte.instrument.hooks import Selection
from dyvte.layout import TokenLayout
from dyvte.mllm import MLLM
from dyvte.policies.attention_policy import LayerAttention
from dyvte.policies.base import Policy
from dyvte.policies.method import Calibration, Source
from dyvte.policies.pruning.fastv import AttentionPruning
from dyvte.policies.token_scores import received_head_max
from dyvte.runs.store import write_json
from dyvte.stored_files import reason_of, short

TOLERANCE = 0.01
"""The bisection on alpha ends when it is known to this."""


def self_and_cross(attention: LayerAttention, layout: TokenLayout) -> Tensor:
    """[b, 2, n] head-max attention that every position receives: mean over visual tokens, over text after the image."""
    selection = attention.selection
    groups = torch.stack([layout.visual, layout.text_status_positions], dim=1)[selection.rows]
    weights = groups.gather(2, selection.index[:, None].expand(-1, 2, -1)).float()
    if selection.valid is not None:
        weights = weights * selection.valid[:, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return received_head_max(attention.rows, weights, attention.num_heads, selection.index.shape[1])


@dataclass(frozen=True)
class Statistics:
    """Attention that visual tokens receive in the full model: n samples, L layers, V visual tokens at most.

    Attributes:
        received: [n, L, 2, V] from visual tokens and from text, see `self_and_cross`; 0 where a sample has fewer.
        visual_tokens: [n].
        text_tokens: [n].
    """

    received: Tensor
    visual_tokens: Tensor
    text_tokens: Tensor

    @classmethod
    @torch.no_grad()
    def collect(cls, mllm: MLLM, batches: Iterable[Batch]) -> Statistics:
        """Run the full model once over some prompts; those without an image are left out, and one is needed."""
        received, visual, text = [], [], []
        for batch in batches:
            rows = batch.layout.has_image.nonzero().flatten()
            if len(rows):
                received.append(_received(mllm, batch, rows).cpu())
                visual.append(batch.layout.visual.sum(1)[rows].cpu())
                text.append(batch.layout.text.sum(1)[rows].cpu())
        if not received:
            raise DataError("FitPrune.fit needs prompts with images")
        width = max(each.shape[-1] for each in received)
        padded = [torch.nn.functional.pad(each, (0, width - each.shape[-1])) for each in received]
        return cls(torch.cat(padded), torch.cat(visual), torch.cat(text))


def _received(mllm: MLLM, batch: Batch, rows: Tensor) -> Tensor:
    """`Statistics.received` of some rows of a batch."""
    layout = batch.layout
    position = torch.arange(layout.roles.shape[1], device=rows.device).expand_as(layout.roles)
    everything = Selection(torch.arange(len(position), device=rows.device), position, ~layout.padding)
    places = Selection.of(layout.visual, rows, layout.visual.sum(1)[rows].tolist())
    layers: dict[int, Tensor] = {}

    def see(layer: int, call: AttentionCall) -> None:
        scores = self_and_cross(LayerAttention(call, everything), layout)
        packed = places.pack(scores.transpose(1, 2)).transpose(1, 2)
        layers[layer] = packed if places.valid is None else packed * places.valid[:, None]

    with watch_attention(mllm, see):
        mllm.model(**batch, use_cache=False, logits_to_keep=1)
    return torch.stack([layers[layer] for layer in range(mllm.num_layers)], dim=1)


def deletable(received: Tensor, remaining: Tensor, alpha: float) -> Tensor:
    """[n, V] tokens whose loss leaves both distributions at least 1 - alpha of their mass: among the lowest in both.

    Args:
        received: [n, 2, V] of `Statistics`, in one layer.
        remaining: [n, V] tokens still there; what the others received is lost already.
        alpha: share of each distribution that may be lost.
    """
    left = received * remaining[:, None]
    ordered, order = left.masked_fill(~remaining[:, None], -1.0).sort(dim=-1, stable=True)
    lost_before = received.sum(-1) - left.sum(-1)
    lost = lost_before[..., None] + ordered.clamp(min=0).cumsum(-1)
    fits = lost <= alpha * received.sum(-1, keepdim=True) + 1e-7
    return torch.zeros_like(fits).scatter_(-1, order, fits).all(1) & remaining


def counts_for(statistics: Statistics, alpha: float) -> Tensor:
    """[n, L] share of a sample's visual tokens that is left behind every layer under `alpha`."""
    width = statistics.received.shape[-1]
    remaining = torch.arange(width) < statistics.visual_tokens[:, None]
    shares = []
    for layer in range(statistics.received.shape[1]):
        remaining = remaining & ~deletable(statistics.received[:, layer], remaining, alpha)
        shares.append(remaining.sum(1) / statistics.visual_tokens)
    return torch.stack(shares, dim=1)


def plan(mllm: MLLM, statistics: Statistics, keep: Sequence[float]) -> float:
    """Decoder FLOPs of a recipe over those of the full model, at the mean prompt of the statistics."""
    text, visual = float(statistics.text_tokens.double().mean()), float(statistics.visual_tokens.double().mean())
    lengths = [round(text + visual * share) for share in keep]
    full = plan_decoder_flops(mllm, [round(text + visual)] * len(keep))
    return plan_decoder_flops(mllm, lengths) / full


@dataclass(frozen=True)
class Recipe:
    """Which share of the visual tokens every layer sees.

    Attributes:
        keep: L shares, the first 1.
        alpha: what the bisection ended with.
        budget: what was asked for, decoder FLOPs over the full model's.
        cost: what the recipe comes to at the mean prompt.
        num_samples: prompts that the statistics are of.
    """

    keep: list[float]
    alpha: float
    budget: float
    cost: float
    num_samples: int

    def __post_init__(self) -> None:
        if not isinstance(self.keep, list) or not self.keep or not all(map(_is_share, self.keep)):
            raise ConfigError(f"FitPrune: recipe.keep must be a list of shares from 0 to 1, got {short(self.keep)}")
        if self.keep[0] != 1 or any(later > earlier for earlier, later in pairwise(self.keep)):
            raise ConfigError(f"FitPrune: recipe.keep must start with 1 and never rise, got {short(self.keep)}")
        for name in ("alpha", "budget", "cost", "num_samples"):
            if not _is_share(getattr(self, name), math.inf):
                raise ConfigError(f"FitPrune: recipe.{name} must be a number, got {short(getattr(self, name))}")

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what `save` wrote, or the `calibration.json` that a command wrote.

        Raises:
            ConfigError: the file is missing or holds something else.
        """
        try:
            content = json.loads(Path(path).read_text())
            return cls.of(content.get("found", {}).get("recipe", content))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{path} is no FitPrune recipe ({reason_of(error)}); write one with FitPrune.fit(...).recipe.save(path)"
            ) from error

    @classmethod
    def of(cls, content: Any) -> Recipe:
        """From its fields, refusing missing, unknown and wrong ones."""
        names = [each.name for each in fields(cls)]
        if not isinstance(content, Mapping) or sorted(map(str, content)) != sorted(names):
            raise ConfigError(f"a FitPrune recipe has {', '.join(names)}, not {short(content)}")
        return cls(**content)


def _is_share(value: Any, most: float = 1) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most


def fit_recipe(
    mllm: MLLM, statistics: Statistics, budget: float, cost_of: Callable[[Sequence[float]], float] | None = None
) -> Recipe:
    """The recipe of the smallest alpha whose cost, over the full model's, is within the budget.

    Deletion stops at the first layer behind which the budget holds without any more of it. `cost_of` says what the
    shares of tokens that the layers see cost, by default `plan`.
    """
    if not 0 < budget <= 1:
        raise ConfigError(f"FitPrune: budget is decoder FLOPs over the full model's, above 0 and up to 1, got {budget}")

    cost_of = cost_of or partial(plan, mllm, statistics)

    def recipe_of(alpha: float) -> Recipe | None:
        shares = counts_for(statistics, alpha).double().mean(0).tolist()
        keep = [1.0] * mllm.num_layers
        for layer in range(mllm.num_layers):
            cost = cost_of(keep)
            if cost <= budget:
                return Recipe(keep, alpha, budget, cost, len(statistics.received))
            if layer + 1 < mllm.num_layers:
                keep[layer + 1 :] = [shares[layer]] * (mllm.num_layers - layer - 1)
        return None

    low, high, best = 0.0, 1.0, recipe_of(1.0)
    if best is None:
        least = cost_of([1.0, *[0.0] * (mllm.num_layers - 1)])
        raise ConfigError(f"FitPrune: a budget of {budget:g} cannot be met; one layer with the image costs {least:.3f}")
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        recipe = recipe_of(middle)
        if recipe is None:
            low = middle
        else:
            high, best = middle, recipe
    return best


@dataclass
class FitPrune(AttentionPruning):
    """Prune visual tokens after a fitted recipe.

    After every layer the visual tokens with the lowest product of self- and cross-attention leave, as many as the
    recipe says.

    Attributes:
        recipe: a recipe, its fields, or a JSON file with one.

    Example:
        >>> policy = dyvte.FitPrune.fit(mllm, [batch], budget=0.6)
        >>> round(sum(policy.shares(mllm)) / mllm.num_layers, 1) < 1
        True
    """

    name = "fitprune"
    label = "FitPrune"
    source = Source("2409.10197", "ywh187/FitPrune")
    needs = ("calibration prompts",)

    recipe: Recipe | Mapping[str, Any] | str | Path
    _keep: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.recipe, Mapping):
            self.recipe = Recipe.of(self.recipe)
        elif not isinstance(self.recipe, Recipe):
            self.recipe = Recipe.load(self.recipe)
        self._keep = list(self.recipe.keep)

    @classmethod
    def fit(cls, mllm: MLLM, batches: Iterable[Batch], budget: float) -> FitPrune:
        """Fit a recipe to some prompts (the paper uses a small batch).

        Args:
            mllm: the model.
            batches: prompts with images.
            budget: decoder FLOPs of the pruned prefill over the full model's.

        Raises:
            DataError: no prompt shows an image.
            ConfigError: the budget cannot be met.
        """
        return cls(fit_recipe(mllm, Statistics.collect(mllm, batches), budget))

    def check(self, mllm: MLLM) -> None:
        """Refuse a recipe for another number of layers."""
        if len(self._keep) != mllm.num_layers:
            raise ConfigError(f"FitPrune: the recipe is for {len(self._keep)} layers, this model has {mllm.num_layers}")

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """The recipe of the smallest alpha within the budget."""
        mllm = calibration.mllm
        try:
            return cls(fit_recipe(mllm, Statistics.collect(mllm, calibration.batches), budget, calibration.cost))
        except ConfigError:  # less than one layer with the image costs
            return None

    def left_before(self, num_layers: int) -> dict[int, float]:
        """The recipe's shares, where they fall."""
        keep = self._keep
        return {layer: keep[layer] for layer in range(1, num_layers) if keep[layer] < keep[layer - 1]}

    def rank_by(self, layout: TokenLayout, attention: LayerAttention) -> Tensor:
        """Product of self- and cross-attention."""
        return self_and_cross(attention, layout).prod(1)
