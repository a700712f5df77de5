"""Layers without their attention: how much of it is redundant.

Efficient Attention Skipping (arXiv 2403.15226) leaves out the attention of layers that matter least.

Deviations: the model is left as it is otherwise (the paper's adapter takes training), and redundancy is the divergence
of the next token's distribution from the full model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.errors import ConfigError, DataError, UnsupportedError
from dyvte.instrument.hooks import LayerCall, drive_layers, is_driven, output_states, override_method, with_states
from dyvte.instrument.sweep.criteria import kl_to_full
from dyvte.mllm import MLLM
from dyvte.model_parts import cache_among
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.method import Source


@dataclass
class SkipAttention(Policy):
    """Leave out the attention of some layers: their residual stream goes to the MLP unchanged.

    These layers store one number a position in the KV cache, by which it keeps count of positions, and no keys.

    Attributes:
        layers: decoder layers, 0-based.

    Example:
        >>> with dyvte.SkipAttention(layers=[9, 10])(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "skip_attention"
    label = "skipped attention"
    source = Source("2403.15226", "DoubtedSteam/EAS")
    meets_budgets = False

    layers: Sequence[int]

    def check(self, mllm: MLLM) -> None:
        """Refuse layers that the model does not have."""
        if self.layers is None:
            raise ConfigError("SkipAttention: name the layers: policy.layers=[4,7]")
        for layer in self.layers:
            self.check_layer(layer, mllm)

    def hooks(self, mllm: MLLM, run: PolicyRun) -> AbstractContextManager[None]:
        """Skip the attention."""
        return skipped_attention(mllm, self.layers)

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """No token leaves."""


@contextmanager
def skipped_attention(mllm: MLLM, layers: Iterable[int]) -> Iterator[None]:
    """Within the block, the attention of some layers adds nothing."""
    with ExitStack() as stack:
        for layer in set(layers):
            module: Any = mllm.attention_of(layer)
            stack.enter_context(override_method(module, "forward", _nothing(module)))
        yield


def _nothing(module: Any) -> Any:
    names = list(inspect.signature(module.forward).parameters)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        hidden = inputs["hidden_states"]
        cache = cache_among(inputs)
        if cache is not None:
            count = hidden.new_zeros(len(hidden), 1, hidden.shape[1], 1)
            cache.update(count, count, module.layer_idx)
        return torch.zeros_like(hidden), None

    return forward


@torch.no_grad()
def attention_redundancy(mllm: MLLM, batches: Iterable[Batch], skipped: Sequence[int] = ()) -> pd.DataFrame:
    """What leaving out each layer's attention does to the next token at the end of the prompt, one pass a batch.

    A model without layer i's attention shares the layers before i with the full model: it branches off there and rides
    along.

    Args:
        mllm: the model.
        batches: prompts.
        skipped: layers whose attention is left out already.

    Returns:
        One row for each other layer: `layer`, `kl` (mean KL to the full model, which skips nothing, in nats) and
        `agreement` (share of prompts whose most likely next token stays).

    Raises:
        DataError: no prompts.
        UnsupportedError: a policy or a sweep is active.
    """
    if is_driven(mllm):
        raise UnsupportedError("attention_redundancy runs the model itself: call it outside of any policy")
    candidates = [layer for layer in mllm.attention_layers if layer not in skipped]
    kl, agree = [], []
    for batch in batches:
        logits = _sweep(mllm, batch, candidates, skipped)  # [B, candidates + 1, vocab], the full model last
        kl.append(kl_to_full(logits)[:, :-1])
        agree.append((logits.argmax(-1) == logits[:, -1:].argmax(-1))[:, :-1])
    if not kl:
        raise DataError("attention_redundancy needs at least one batch of prompts")
    return pd.DataFrame(
        {
            "layer": candidates,
            "kl": torch.cat(kl).double().mean(0).tolist(),
            "agreement": torch.cat(agree).double().mean(0).tolist(),
        }
    )


def greedy_skip_list(mllm: MLLM, batches: Sequence[Batch], budget: float, most: int | None = None) -> pd.DataFrame:
    """Leave out attention layer by layer, each time the one that costs least on top of those left out before.

    Args:
        mllm: the model.
        batches: prompts, gone through once a step.
        budget: largest mean KL to the full model, in nats.
        most: largest number of layers; all by default.

    Returns:
        One row a step within the budget: `layer`, and `kl` and `agreement` with all layers so far left out.
    """
    steps: list[dict[str, Any]] = []
    while len(steps) < (len(mllm.attention_layers) if most is None else most):
        table = attention_redundancy(mllm, batches, [step["layer"] for step in steps])
        best = table.sort_values("kl", kind="stable").iloc[0]
        if best["kl"] > budget:
            break
        steps.append({"layer": int(best["layer"]), "kl": float(best["kl"]), "agreement": float(best["agreement"])})
    return pd.DataFrame(steps, columns=["layer", "kl", "agreement"])


def _sweep(mllm: MLLM, batch: Batch, candidates: Sequence[int], skipped: Sequence[int]) -> Tensor:
    """Logits [B, candidates + 1, vocab] at the prompt's end, without each candidate's attention; the full model last.

    `base` is the model without the attention of `skipped`, from which branches leave.
    """
    branches: list[Tensor] = []
    base = full = torch.empty(0)

    def run_layer(call: LayerCall) -> Any:
        nonlocal base, full
        if call.index == 0:
            base = full = call.hidden
        elif call.hidden is not full:  # DeepStack adds visual features between layers
            added = call.hidden - full
            base = base + added
            branches[:] = [states + added for states in branches]

        def without_attention(states: Tensor) -> Tensor:
            with skipped_attention(mllm, [call.index]):
                return output_states(call.run(states, past_key_values=None))

        output = call.run(past_key_values=None)  # the full model
        if call.index in skipped:
            branches[:] = [without_attention(states) for states in branches]
            base = without_attention(base)
        else:
            leaving = without_attention(base)
            branches[:] = [output_states(call.run(states, past_key_values=None)) for states in branches]
            branches.append(leaving)
            base = output_states(call.run(base, past_key_values=None)) if skipped else output_states(output)
        full = output_states(output)
        if call.index < mllm.num_layers - 1:
            return output
        # All of them go through the model's own norm and head as one batch.
        return with_states(output, torch.cat([*branches, full]))

    with drive_layers(mllm, run_layer):
        logits = mllm.model(**{**batch, "use_cache": False}).logits
    logits = logits.unflatten(0, (len(candidates) + 1, -1)).transpose(0, 1)
    at_end = batch.layout.last_prompt[:, None, None, None].expand(-1, logits.shape[1], 1, logits.shape[3])
    return logits.gather(2, at_end)[:, :, 0]
