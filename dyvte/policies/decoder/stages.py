"""Shared by the methods: the layers of a paper in a decoder of another depth, and what projections gave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dyvte.errors import ConfigError, UnsupportedError
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.scorer import ScorerPolicy


def in_proportion(layers: Sequence[int], depth: int, num_layers: int) -> list[int]:
    """Layers of a decoder of `depth` layers in one of `num_layers`: rounded, 1 at the least, each after the one before.

    Example:
        >>> in_proportion([3, 7, 16], 32, 32), in_proportion([3, 7, 16], 32, 12)
        ([3, 7, 16], [1, 3, 6])
    """
    found: list[int] = []
    for layer in layers:
        found.append(max(round(layer * num_layers / depth), found[-1] + 1 if found else 1))
    return found


@dataclass
class StagedScorer(ScorerPolicy):
    """A method that prunes before some decoder layers, after a look at the layer before each.

    Attributes:
        layers: the layers before which tokens leave; None takes the paper's, in proportion to the depth.
    """

    paper_layers: ClassVar[tuple[int, ...]] = ()
    depth: ClassVar[int] = 32
    """Decoder layers of the model that `paper_layers` are of."""

    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, int) and len(self.paper_layers) > 1:
            raise ConfigError(f"{type(self).__name__}: keep is a share 0..1 from which several follow, got {self.keep}")

    def layers_of(self, mllm: MLLM) -> list[int]:
        """The layers before which tokens leave in this model."""
        if self.layers is None:
            return in_proportion(self.paper_layers, self.depth, mllm.num_layers)
        return list(self.layers)

    def budgets(self) -> list[float]:
        """What each stage leaves of an image."""
        return [self.keep]

    def stages(self, mllm: MLLM) -> dict[int, float]:
        """The layers with their budgets."""
        return dict(zip(self.layers_of(mllm), self.budgets(), strict=True))

    def check(self, mllm: MLLM) -> None:
        """Refuse layers that have none before them, or are not as many as the method has stages."""
        layers = self.layers_of(mllm)
        if len(layers) != len(self.budgets()) or sorted({0, *layers})[1:] != layers:
            raise ConfigError(
                f"{type(self).__name__}: layers are {len(self.budgets())} in ascending order, from 1, got {layers}"
            )
        super().check(mllm)


@contextmanager
def keep_projections(policy: Policy, mllm: MLLM, run: PolicyRun, layers: Iterable[int], *names: str) -> Iterator[None]:
    """Within the block what `q_proj` or `k_proj` of some layers gave is put where `projected` finds it."""
    name_of = {projection_of(mllm, layer, name): name for layer in layers for name in names}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        prefill, key = run.prefill, (id(policy), name_of.get(module))  # none of a deep copy
        if module in name_of and prefill is not None and prefill.running is not None:
            if (known := prefill.state.get(key)) is None:
                known = prefill.state[key] = output.new_zeros(*prefill.kept.shape, output.shape[-1])
            prefill.running.put_back(known, output.detach())

    with ExitStack() as stack:
        for projection in name_of:
            stack.enter_context(projection.register_forward_hook(keep))
        yield


def projected(policy: Policy, prefill: Prefill, layer: int, name: str, normed: bool = True) -> Tensor:
    """[B, heads, N, head size] queries or keys of a layer that has run, before rotary positions.

    `normed` is after the norm that some families apply to every head.
    """
    attention: Any = prefill.mllm.attention_of(layer)
    heads: Tensor = prefill.state.pop((id(policy), name)).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    norm = getattr(attention, name.replace("proj", "norm"), None) if normed else None
    return (heads if norm is None else norm(heads)).float()


def projection_of(mllm: MLLM, layer: int, name: str) -> nn.Module:
    """A projection of a layer's attention; refused where queries, keys and values are projected at once."""
    found = getattr(mllm.attention_of(layer), name, None)
    if not isinstance(found, nn.Module):
        kind = type(mllm.attention_of(layer)).__name__
        raise UnsupportedError(f"decoder layer {layer} ({kind}) has no {name} of its own to look at")
    return found
