"""Logit lens: what the output embedding reads in a position's hidden state after each layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyvte.batch import Batch
from dyvte.errors import ConfigError, UnsupportedError
from dyvte.instrument.causal.readout import LOGITS_AT_ONCE, read_out
from dyvte.instrument.hooks import Selection, check_model, every_position, is_driven, layer_states
from dyvte.mllm import MLLM

Positions = Literal["visual", "last"]


@dataclass
class LogitLens:
    """What positions say after each layer. B samples, L layers, n positions of a sample.

    Index 0 along the layers is the decoder's input, L what leaves the last layer (the model's own prediction).

    Attributes:
        ids: [B, L + 1, n, top] the most likely tokens, the likeliest first; -1 where a row has fewer positions.
        probabilities: [B, L + 1, n, top] theirs; NaN likewise.
        answer_probability: [B, L + 1, n] probability of `answer_ids`; NaN likewise.
        answer_ids: [B] the token whose probability is followed.
        positions: [B, n] where in the prompt these are; -1 likewise.

    Example:
        >>> lens = dyvte.logit_lens(mllm, batch, positions="last")
        >>> lens.answer_probability.shape  # [B, L + 1, n]
        torch.Size([2, 13, 1])
    """

    ids: Tensor
    probabilities: Tensor
    answer_probability: Tensor
    answer_ids: Tensor
    positions: Tensor


@torch.no_grad()
def logit_lens(
    mllm: MLLM,
    batch: Batch,
    positions: Positions | Tensor = "visual",
    top: int = 5,
    *,
    answer_ids: Tensor | None = None,
    policy: Callable[[MLLM], AbstractContextManager[Any]] | None = None,
) -> LogitLens:
    """Apply the final norm and the output embedding to hidden states from every layer (nostalgebraist 2020).

    Args:
        mllm: the model.
        batch: prompts, padded on either side.
        positions: "visual" (what does this patch say?), "last" (when does the answer appear?), or bool [B, N].
        top: tokens kept for each position and layer.
        answer_ids: [B] or [B, A] (its first column is taken): the token to follow. None: the model's own next token.
        policy: for instance `dyvte.FixedExit(layer=8)`: look at the model under it. Visual tokens that have left have
            no state, so `positions` must be text.

    Raises:
        ConfigError: no such positions, or visual ones under a policy.
        UnsupportedError: a policy is active, or the layers cannot be driven.

    Example:
        >>> lens = dyvte.logit_lens(mllm, batch, positions="last")
        >>> lens.answer_probability[:, :, 0].shape  # [B, L + 1]
        torch.Size([2, 13])
    """
    if is_driven(mllm):
        raise UnsupportedError("logit_lens runs the model itself: give policy= instead of an active one")
    check_model(mllm)
    chosen = _chosen(batch, positions)
    if not 1 <= top <= mllm.lm_head.weight.shape[0]:
        raise ConfigError(f"top is {top}; give 1 to the size of the vocabulary")
    if policy is not None and (chosen & batch.layout.visual).any():
        raise ConfigError("visual positions may have left under a policy: follow text positions, or leave policy out")
    states, template = _states(mllm, batch, policy)
    everyone = torch.arange(len(chosen), device=chosen.device)
    picked = Selection.of(chosen, everyone, chosen.sum(1).tolist())
    last = batch.layout.last_prompt
    if answer_ids is None:
        final = read_out(mllm, batch, states[-1][everyone, last][:, None], template)
        answer_ids = final[:, 0].argmax(-1)
    token = (answer_ids if answer_ids.ndim == 1 else answer_ids[:, 0]).to(chosen.device)

    ids, probabilities, followed = [], [], []
    for each in states:
        packed = picked.pack(each)
        at_once = max(1, LOGITS_AT_ONCE // (len(packed) * mllm.lm_head.weight.shape[0]))
        parts = [read_out(mllm, batch, part, template).softmax(-1) for part in packed.split(at_once, dim=1)]
        best = [part.topk(top, dim=-1) for part in parts]
        ids.append(torch.cat([each.indices for each in best], 1))
        probabilities.append(torch.cat([each.values for each in best], 1))
        followed.append(torch.cat([part[everyone, :, token] for part in parts], 1))
    found = LogitLens(
        ids=torch.stack(ids, 1),
        probabilities=torch.stack(probabilities, 1),
        answer_probability=torch.stack(followed, 1),
        answer_ids=token,
        positions=picked.index.clone(),
    )
    if picked.valid is not None:
        absent = ~picked.valid
        found.ids.masked_fill_(absent[:, None, :, None], -1)
        found.probabilities.masked_fill_(absent[:, None, :, None], torch.nan)
        found.answer_probability.masked_fill_(absent[:, None], torch.nan)
        found.positions.masked_fill_(absent, -1)
    return found


def _chosen(batch: Batch, positions: Positions | Tensor) -> Tensor:
    layout = batch.layout
    if isinstance(positions, Tensor):
        if positions.shape != layout.roles.shape:
            raise ConfigError(f"positions is {tuple(positions.shape)}, the prompts are {tuple(layout.roles.shape)}")
        chosen = positions.to(layout.roles.device).bool() & ~layout.padding
    elif positions == "visual":
        chosen = layout.visual
    elif positions == "last":
        chosen = torch.arange(layout.roles.shape[1], device=layout.roles.device) == layout.last_prompt[:, None]
    else:
        raise ConfigError(f"positions is {positions!r}; give 'visual', 'last' or a mask [B, N]")
    if not chosen.any():
        raise ConfigError(
            "no position to look at: the batch shows no image" if positions == "visual" else "no position"
        )
    return chosen


def _states(
    mllm: MLLM, batch: Batch, policy: Callable[[MLLM], AbstractContextManager[Any]] | None
) -> tuple[list[Tensor], Any]:
    """Hidden states [B, N, d] before the first layer and after each; and what a layer returned."""
    states: list[Tensor] = []
    template: list[Any] = []

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(layer_states(mllm, args[0] if args else kwargs["hidden_states"]).clone())

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        states.append(layer_states(mllm, output).clone())
        template[:] = [output]

    with ExitStack() as stack:
        stack.enter_context(every_position(mllm))
        stack.enter_context(mllm.layers[0].register_forward_pre_hook(enters, with_kwargs=True))
        for layer in mllm.layers:
            stack.enter_context(layer.register_forward_hook(leaves))
        if policy is not None:
            stack.enter_context(policy(mllm))
        mllm.model(**batch.without_cache(mllm.model))
    return states, template[0]
