"""Several policies at once, where that makes sense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations

from torch import nn

from dyvte.errors import UnsupportedError
from dyvte.layout import TokenLayout
from dyvte.mllm import MLLM, as_mllm
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.exits.dynamic_exit import DynamicExit
from dyvte.policies.exits.fixed_exit import FixedExit
from dyvte.policies.merging.pooling import AveragePool
from dyvte.policies.merging.tome import ToMe
from dyvte.policies.pruning.divprune import DivPrune
from dyvte.policies.pruning.drop import UniformDrop
from dyvte.policies.pruning.fastv import FastV
from dyvte.policies.pruning.fitprune import FitPrune
from dyvte.policies.pruning.pyramid_drop import PyramidDrop

EXITS = (FixedExit, DynamicExit)
THINNING = (FastV, PyramidDrop, DivPrune, ToMe, FitPrune, UniformDrop, AveragePool)
"""Policies that leave some of the visual tokens, of which one may run with others."""


@dataclass
class Compose(Policy):
    """Run several policies together: `Compose([FastV(layer=2, keep=0.5), DynamicExit(gates)])`.

    At every layer the first decides first and the later ones on what is left. Policies of your own compose with all.

    Attributes:
        policies: two or more.
    """

    policies: Sequence[Policy]

    def __post_init__(self) -> None:
        nested = [each.policies if isinstance(each, Compose) else [each] for each in self.policies]
        self.policies = [policy for group in nested for policy in group]
        if len(self.policies) < 2:
            raise ValueError(f"Compose needs two policies or more, got {len(self.policies)}")
        for first, second in combinations(self.policies, 2):
            reason = senseless(first, second)
            if reason:
                names = f"{type(first).__name__} and {type(second).__name__}"
                raise UnsupportedError(f"{names} do not compose: {reason}")

    def check(self, mllm: MLLM) -> None:
        """Refuse a model that one of them does not fit, and a policy that an exit before it leaves nothing to do."""
        for policy in self.policies:
            policy.check(mllm)
        exits = [policy.layer for policy in self.policies if isinstance(policy, FixedExit)]
        for policy in self.policies:
            start = getattr(policy, "layer", None)
            if exits and isinstance(policy, THINNING) and start is not None and start >= exits[0]:
                raise UnsupportedError(
                    f"{type(policy).__name__} starts at layer {start}, when the exit at layer {exits[0]} has taken all "
                    "visual tokens out"
                )

    @contextmanager
    def __call__(self, model: MLLM | nn.Module, layout: TokenLayout | None = None) -> Iterator[PolicyRun]:
        """As `Policy.__call__`."""
        mllm = as_mllm(model)
        self.check(mllm)
        with ExitStack() as stack:
            runs = [stack.enter_context(policy(mllm, layout)) for policy in self.policies]
            yield runs[0]

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Each policy is called by itself."""


def senseless(first: Policy, second: Policy) -> str | None:
    """Why two policies should not run together, None if they may."""
    if isinstance(first, EXITS) and isinstance(second, EXITS):
        return "the earlier of two exits decides alone (a latest layer for gates is DynamicExit's max_layer)"
    pair = [each for each in (first, second) if isinstance(each, THINNING)]
    if len(pair) == 2:
        if any(isinstance(each, FitPrune) for each in pair):
            return "a FitPrune recipe is fitted to attention over all visual tokens"
        if type(first) is type(second):
            return "one with another setting does the same"
        if any(isinstance(each, (AveragePool, UniformDrop)) for each in pair):
            grid = [each for each in pair if isinstance(each, (AveragePool, UniformDrop))]
            if len(grid) == 2:
                return "both go by the places of the full visual grid"
    return None
