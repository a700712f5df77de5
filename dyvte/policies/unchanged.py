"""The model as it is: what every method is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dyvte.layout import TokenLayout
from dyvte.mllm import MLLM, as_mllm
from dyvte.model_parts import cache_among
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.method import Calibration, Source


@dataclass
class Unchanged(Policy):
    """Take nothing out, and drive no layer: models that no other policy can run on are not refused.

    Example:
        >>> with dyvte.Unchanged()(mllm):
        ...     same = mllm(**batch).logits
        >>> torch.equal(same, mllm(**batch).logits)
        True
    """

    name = "none"
    label = "full model"
    source = Source()

    @contextmanager
    def __call__(self, model: MLLM | nn.Module, layout: TokenLayout | None = None) -> Iterator[PolicyRun]:
        """As `Policy.__call__`; the run has exit layers and no prefill."""
        mllm = as_mllm(model)
        run = _Watched(mllm)
        with mllm.model.register_forward_pre_hook(run.note, with_kwargs=True):
            yield run

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """No token leaves."""

    def shares(self, mllm: MLLM) -> list[float]:
        """All of them, in every layer."""
        return [1.0] * mllm.num_layers

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """Whatever the budget."""
        return cls()


class _Watched(PolicyRun):
    """Notes the ids of the last prefill."""

    def __init__(self, mllm: MLLM) -> None:
        super().__init__()
        self._mllm = mllm
        self._inputs: dict[str, Any] = {}

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the ids of a call that starts a prompt."""
        if module is self._mllm.model:
            inputs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
            cache = cache_among(inputs)
            if cache is None or cache.get_seq_length() == 0:
                self._inputs = {name: inputs.get(name) for name in ("input_ids", "attention_mask")}

    @property
    def exit_layers(self) -> Tensor:
        """[B] L for rows with an image, 0 for others."""
        if self._inputs.get("input_ids") is None:
            raise RuntimeError("no prefill has run under this policy yet")
        return self._mllm.layout(**self._inputs).has_image * self._mllm.num_layers
