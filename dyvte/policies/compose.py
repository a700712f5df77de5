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
from dyvte.policies.exits.fixed_exit import FixedExit


@dataclass
class Compose(Policy):
    """Run several policies together: `Compose([FastV(layer=2, keep=0.5), DynamicExit(gates)])`.

    At every layer the first decides first and the later ones on what is left. Policies of your own compose with all.

    Attributes:
        policies: two or more.

    Example:
        >>> policy = dyvte.Compose([dyvte.FastV(layer=2, keep=0.5), dyvte.FixedExit(layer=8)])
        >>> with policy(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> run.exit_layers.tolist()
        [8, 8]
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
        exits = [max(policy.layers) for policy in self.policies if isinstance(policy, FixedExit)]
        for policy in self.policies:
            start = getattr(policy, "layer", None)
            if exits and policy.acts == "thins" and start is not None and start >= exits[0]:
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
    if first.acts == second.acts == "exits":
        return "the earlier of two exits decides alone (a latest layer for gates is DynamicExit's max_layer)"
    if first.acts == second.acts == "thins":
        if any("calibration prompts" in each.needs for each in (first, second)):
            return "a recipe that was calibrated by itself is fitted to all visual tokens"
        if type(first) is type(second):
            return "one with another setting does the same"
        if first.by_place and second.by_place:
            return "both go by the places of the full visual grid"
    return None
