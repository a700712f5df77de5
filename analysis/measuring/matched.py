"""Settings at which every method costs the same.

The budget is the mean decoder FLOPs of the prefill over the full model's, over some calibration prompts. Methods with a
share of tokens to keep have it solved for; exits by gates have their threshold chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.cost.flops import plan_decoder_flops, prefill_flops
from dyvte.errors import ConfigError
from dyvte.gates.metrics import at_exit, first_exit
from dyvte.gates.module import Gates
from dyvte.instrument.sweep import exit_sweep, greedy_answer_ids
from dyvte.instrument.sweep.criteria import kl_to_full
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.compose import Compose
from dyvte.policies.exits.dynamic_exit import DynamicExit, exit_probabilities
from dyvte.policies.exits.vtw import VTW
from dyvte.policies.merging.tome import ToMe
from dyvte.policies.pruning.divprune import DivPrune
from dyvte.policies.pruning.drop import RandomDrop, UniformDrop
from dyvte.policies.pruning.fastv import FastV
from dyvte.policies.pruning.fitprune import FitPrune, Statistics, fit_recipe
from dyvte.policies.pruning.pyramid_drop import PyramidDrop

FASTV_LAYER = 2
STEPS = 30
"""Halvings when a share or a threshold is solved for."""


def largest_within(cost: Callable[[float], float], budget: float, low: float = 0.0, high: float = 1.0) -> float | None:
    """The largest x in [low, high] whose cost, growing with x, is within the budget; None if there is none."""
    if cost(low) > budget:
        return None
    if cost(high) <= budget:
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


@dataclass
class Calibration:
    """Prompts that settings are chosen on, and what they cost.

    Attributes:
        mllm: the model.
        batches: prompts; those without an image cost the same under every setting.
        asked: the prompts that will be asked, where they are known. Gates treat every prompt differently, so their
            threshold is chosen for the mean cost over these (answers play no part in it).
    """

    mllm: MLLM
    batches: Sequence[Batch]
    asked: Calibration | None = None

    @cached_property
    def lengths(self) -> Tensor:
        """[n, 2] text and visual tokens of every prompt."""
        return torch.cat([torch.stack([b.layout.text.sum(1), b.layout.visual.sum(1)], dim=1) for b in self.batches])

    @cached_property
    def statistics(self) -> Statistics:
        """Attention that visual tokens receive."""
        return Statistics.collect(self.mllm, self.batches)

    @cached_property
    def divergence(self) -> Tensor:
        """[L + 1] mean KL of every exit to the full model."""
        return torch.cat([kl_to_full(exit_sweep(self.mllm, b, entropy=False).logits) for b in self.batches]).mean(0)

    def agreement(self, max_new_tokens: int) -> Tensor:
        """[L + 1] share of the prompts that every exit answers as the full model does, in so many tokens at most."""
        same = []
        for batch in self.batches:
            answers = greedy_answer_ids(self.mllm, batch, max_new_tokens)
            same.append(exit_sweep(self.mllm, batch, answers, entropy=False).up_to_ties().agree)
        return torch.cat(same).double().mean(0)

    @cached_property
    def full(self) -> float:
        """Decoder FLOPs of the full model, summed over the prompts."""
        return self._flops([1.0] * self.mllm.num_layers)

    @cached_property
    def outside(self) -> float:
        """Operations of a prefill outside of the decoder (vision tower, vocabulary), a prompt."""
        return _outside(self, None)

    def cost(self, shares: Sequence[float]) -> float:
        """Cost of letting layer l see the share `shares[l]` of the visual tokens."""
        return self._flops(shares) / self.full

    def exit_costs(self, shares: Sequence[float]) -> Tensor:
        """[n, L + 1] cost of every exit for every prompt, where layers before it see `shares` of the visual tokens."""
        layers = self.mllm.num_layers
        mean = self.full / len(self.lengths)
        until = [[*shares[:k], *[0.0] * (layers - k)] for k in range(layers + 1)]
        rows = [
            [plan_decoder_flops(self.mllm, _layer_lengths(text, visual, each)) for each in until]
            for text, visual in self.lengths.tolist()
        ]
        return torch.tensor(rows, dtype=torch.float64) / mean

    def _flops(self, shares: Sequence[float]) -> float:
        return float(sum(plan_decoder_flops(self.mllm, _layer_lengths(t, v, shares)) for t, v in self.lengths.tolist()))


def _layer_lengths(text: int, visual: int, shares: Sequence[float]) -> list[int]:
    return [text + int(visual * share + 0.5) for share in shares]


def _outside(calibration: Calibration, policy: Policy | None) -> float:
    batch = calibration.batches[0]
    with nullcontext() if policy is None else policy(calibration.mllm):
        count = prefill_flops(calibration.mllm, batch)
    return (count.total - count.decoder) / len(batch["input_ids"])


def deciding_cost(calibration: Calibration, policy: Policy) -> float:
    """What a policy computes to choose tokens or layers (scores, gates), over the full model's decoder FLOPs."""
    return (_outside(calibration, policy) - calibration.outside) * len(calibration.lengths) / calibration.full


# ---------------------------------------------------------------------------- methods


def _share_before(make: Callable[[float], Policy]) -> Callable[[Calibration, float], Policy | None]:
    """A method that keeps a share of the tokens before the decoder."""

    def match(calibration: Calibration, budget: float) -> Policy | None:
        share = largest_within(lambda x: calibration.cost([x] * calibration.mllm.num_layers), budget)
        return None if share is None else make(share)

    return match


def _fastv_shares(share: float, num_layers: int) -> list[float]:
    return [1.0] * FASTV_LAYER + [share] * (num_layers - FASTV_LAYER)


def fastv(calibration: Calibration, budget: float) -> Policy | None:
    """FastV after its published layer 2."""
    layers = calibration.mllm.num_layers
    share = largest_within(lambda x: calibration.cost(_fastv_shares(x, layers)), budget)
    return None if share is None else FastV(FASTV_LAYER, share)


def pyramid_drop(calibration: Calibration, budget: float) -> Policy | None:
    """PyramidDrop in four stages."""
    layers = calibration.mllm.num_layers
    ends = PyramidDrop().stage_ends(layers)

    def shares(keep: float) -> list[float]:
        return [keep ** sum(end <= layer for end in ends) for layer in range(layers)]

    share = largest_within(lambda x: calibration.cost(shares(x)), budget)
    return None if share is None else PyramidDrop(keep=share)


def fitprune(calibration: Calibration, budget: float) -> Policy | None:
    """FitPrune's recipe for the budget."""
    try:
        return FitPrune(fit_recipe(calibration.mllm, calibration.statistics, budget))
    except ConfigError:  # less than one layer with the image costs
        return None


def kl_layers(divergence: Sequence[float]) -> list[int]:
    """The exits that VTW chooses under one eta or another: layers with a smaller divergence than all before them."""
    return [k for k, each in enumerate(divergence) if all(each < earlier for earlier in divergence[:k])]


def vtw(calibration: Calibration, budget: float) -> Policy | None:
    """VTW with the smallest eta whose layer is within the budget."""
    layers = calibration.mllm.num_layers
    choices = kl_layers(calibration.divergence.tolist())
    within = [k for k in choices if calibration.cost([1.0] * k + [0.0] * (layers - k)) <= budget]
    return VTW(within[-1]) if within else None


def dynamic_exit(gates: Gates) -> Callable[[Calibration, float], Policy | None]:
    """Gates with one threshold for all layers."""

    def match(calibration: Calibration, budget: float) -> Policy | None:
        shares = [1.0] * calibration.mllm.num_layers
        threshold = _threshold(calibration, budget, gates, shares, None)
        return None if threshold is None else DynamicExit(gates, threshold)

    return match


def fastv_dynamic_exit(gates: Gates) -> Callable[[Calibration, float], Policy | None]:
    """FastV saves the first half of what the budget asks for, gates with one threshold the rest."""

    def match(calibration: Calibration, budget: float) -> Policy | None:
        thinning = fastv(calibration, (1 + budget) / 2)
        if not isinstance(thinning, FastV):
            return None
        shares = _fastv_shares(thinning.keep, calibration.mllm.num_layers)
        threshold = _threshold(calibration, budget, gates, shares, thinning)
        if threshold is None:
            return None
        return Compose([thinning, DynamicExit(gates, threshold, min_layer=FASTV_LAYER + 1)])

    return match


def _threshold(
    calibration: Calibration, budget: float, gates: Gates, shares: Sequence[float], thinning: Policy | None
) -> float | None:
    """The largest threshold within the budget: what the gates say does not depend on it, so one pass is enough."""
    calibration = calibration.asked or calibration
    first = 1 if thinning is None else FASTV_LAYER + 1
    never = DynamicExit(gates, threshold=2.0, min_layer=first)
    policy = never if thinning is None else Compose([thinning, never])
    said = []
    for batch in calibration.batches:
        with policy(calibration.mllm) as run, torch.no_grad():
            calibration.mllm.model(**batch, logits_to_keep=1)
            found = exit_probabilities(run)
        nothing = torch.zeros(len(batch["input_ids"]))
        said.append(torch.stack([found.get(k, nothing).cpu() for k in range(1, calibration.mllm.num_layers)], dim=1))
    probability, costs = torch.cat(said), calibration.exit_costs(shares)

    def cost(threshold: float) -> float:
        exits = first_exit(probability, [threshold] * len(gates), first)
        return float(at_exit(costs, exits).mean())

    return largest_within(cost, budget, low=-1e-6, high=1.0)


def methods(gates: Gates | None) -> dict[str, Callable[[Calibration, float], Policy | None]]:
    """Every method by name: what makes its policy for a budget (None where it cannot meet it)."""
    found: dict[str, Callable[[Calibration, float], Policy | None]] = {
        "vtw": vtw,
        "fastv": fastv,
        "pyramid_drop": pyramid_drop,
        "tome": _share_before(lambda share: ToMe(keep=max(share, 1e-6))),
        "fitprune": fitprune,
        "divprune": _share_before(DivPrune),
        "uniform": _share_before(UniformDrop),
        "random": _share_before(RandomDrop),
        "random_stratified": _share_before(lambda share: RandomDrop(share, stratified=True)),
    }
    if gates is not None:
        found |= {"dynamic_exit": dynamic_exit(gates), "fastv_dynamic_exit": fastv_dynamic_exit(gates)}
    return found
