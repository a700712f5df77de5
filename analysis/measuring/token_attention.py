"""Where each answer token looks, head by head, and which positions are sinks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dyvte.batch import Batch
from dyvte.errors import UnsupportedError
from dyvte.instrument.attention_calls import AttentionCall, watch_attention
from dyvte.instrument.role_attention import Block, Geometry, Groups, allowed_pairs
from dyvte.instrument.sweep.answers import teacher_forced
from dyvte.mllm import MLLM

SINK_RATIO = 10.0
"""A position that receives so many times what uniform attention would give it is a sink.

The first position is one in any case (attention sinks: Xiao et al. 2024, arXiv 2309.17453; visual ones: Kang et al.
2025, arXiv 2503.03321, who tell them by their hidden states).
"""


def run_for_attention(mllm: MLLM, batch: Batch) -> None:
    """Run the model for the sake of its attention: no cache, and logits of no more than the last position."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(type(mllm.model).forward).parameters:
        options["logits_to_keep"] = 1
    mllm.model(**batch, **options)


@dataclass(frozen=True)
class TokenAttention:
    """Attention of one question, on the CPU in float32. L layers, H heads, A answer tokens, N positions.

    Positions are those of the prompt and of the answer without its last token, which predicts nothing.

    Attributes:
        rows: [L, H, A, N] attention of the query that predicts each answer token; NaN where a layer has fewer heads.
        received: [L, N] what a position receives from the mean query, mean over heads, over what attention spread
            evenly over all allowed keys would give it; 1 is what chance gives.
        sinks: [L, N] the first position, and every one that receives more than `SINK_RATIO` times uniform attention.
    """

    rows: Tensor
    received: Tensor
    sinks: Tensor


@torch.no_grad()
def watch_rows(mllm: MLLM, batch: Batch, see: Callable[[int, Geometry, Callable[[Block], Tensor]], None]) -> None:
    """Run the model and show `see` every decoder layer: its number, what it allows, and what makes rows of attention.

    Raises:
        UnsupportedError: the attention cannot be followed, or a policy is on.
    """
    groups, length = Groups.of(batch.layout), batch.layout.roles.shape[1]

    def see_call(layer: int, call: AttentionCall) -> None:
        if call.query.shape[2] != length:
            raise UnsupportedError(
                f"decoder layer {layer} ran on {call.query.shape[2]} of {length} positions: a policy or a sweep drives "
                "the model; look at it outside of their blocks"
            )
        allowed, bias = allowed_pairs(call.mask, length, call.causal, call.sliding_window, call.query.device)
        geometry = Geometry.of(groups, allowed, bias, mllm.num_heads)
        see(layer, geometry, call.rows(geometry))

    with watch_attention(mllm, see_call):
        run_for_attention(mllm, batch)


def token_attention(mllm: MLLM, batch: Batch, answer_ids: Tensor) -> TokenAttention:
    """Attention of every answer token, by layer and head, from one pass over a teacher-forced answer.

    Answer token j is predicted by the position before it: the last one of the prompt for j = 0, the answer's token
    j - 1 after that. Rows are softmax probabilities in float32, as in `dyvte.AttentionProbe`.

    Args:
        batch: a single prompt without padding.
        answer_ids: [1, A] the answer, end token included.

    Raises:
        ValueError: several prompts, or padding.
        UnsupportedError: the attention cannot be followed, or a policy is on.

    Example:
        >>> found = token_attention(mllm, batch, greedy_answer_ids(mllm, batch))  # doctest: +SKIP
        >>> found.rows[3].mean(0)[0]  # layer 3, mean over heads, the answer's first token: [N]  # doctest: +SKIP
    """
    if len(batch["input_ids"]) != 1 or batch.layout.padding.any():
        raise ValueError("token_attention() needs a batch of one prompt without padding")
    inputs, _ = teacher_forced(mllm, batch, answer_ids)
    length, last = inputs.layout.roles.shape[1], int(inputs.layout.last_prompt[0])
    predicting = Block(slice(last, last + answer_ids.shape[1]), slice(0, length), True)
    answer_rows: dict[int, Tensor] = {}
    over_uniform: dict[int, Tensor] = {}

    def see(layer: int, geometry: Geometry, rows_of: Callable[[Block], Tensor]) -> None:
        if layer in answer_rows:
            raise UnsupportedError(f"decoder layer {layer} attends more than once in a pass: a sweep drives the model")
        rows = rows_of(predicting)[0].float()
        answer_rows[layer] = rows.cpu()
        total = rows.new_zeros(length)
        for block in geometry.blocks:
            total[block.columns] += rows_of(block)[0].mean(0).sum(0)
        over_uniform[layer] = (total / _uniform(geometry.allowed, length, total.device)).cpu()

    watch_rows(mllm, inputs, see)
    if len(answer_rows) != mllm.num_layers:
        raise UnsupportedError(
            f"{len(answer_rows)} of {mllm.num_layers} decoder layers showed their attention: the others do not go "
            "through transformers' attention functions"
        )
    rows = pad_sequence([answer_rows[layer] for layer in range(mllm.num_layers)], True, torch.nan)
    received = torch.stack([over_uniform[layer] for layer in range(mllm.num_layers)])
    sinks = received > SINK_RATIO
    sinks[:, int(batch.layout.first_token[0])] = True
    return TokenAttention(rows, received, sinks)


def _uniform(allowed: Tensor | None, length: int, device: torch.device) -> Tensor:
    """[N] what each key would receive in all if every query spread its attention evenly."""
    pairs = torch.ones(length, length, device=device).tril() if allowed is None else allowed[0].float()
    return (pairs / pairs.sum(1, keepdim=True).clamp(min=1)).sum(0).clamp(min=torch.finfo(torch.float32).tiny)
