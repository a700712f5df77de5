"""Where each answer token looks, head by head, and which positions are sinks."""

from __future__ import annotations

import inspect
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


class _Watcher:
    """Takes the rows of the answer's queries, and sums over all queries, from each layer's attention call."""

    def __init__(self, inputs: Batch, num_answers: int, num_heads: int) -> None:
        self.layout = inputs.layout
        self.length = inputs.layout.roles.shape[1]
        self.groups = Groups.of(inputs.layout)
        self.num_heads = num_heads
        last = int(inputs.layout.last_prompt[0])
        self.answers = Block(slice(last, last + num_answers), slice(0, self.length), True)
        self.rows: dict[int, Tensor] = {}
        self.received: dict[int, Tensor] = {}

    def see(self, layer: int, call: AttentionCall) -> None:
        """Note one layer's call."""
        if call.query.shape[2] != self.length or layer in self.rows:
            raise UnsupportedError(
                f"decoder layer {layer} ran on {call.query.shape[2]} of {self.length} positions: a policy or a sweep "
                "drives the model; look at it outside of their blocks"
            )
        allowed, bias = allowed_pairs(call.mask, self.length, call.causal, call.sliding_window, call.query.device)
        geometry = Geometry.of(self.groups, allowed, bias, self.num_heads)
        rows_of = call.rows(geometry)
        self.rows[layer] = rows_of(self.answers)[0].float().cpu()
        total = call.query.new_zeros(self.length, dtype=torch.float32)
        for block in geometry.blocks:
            total[block.columns] += rows_of(block)[0].mean(0).sum(0)
        self.received[layer] = (total / self._uniform(allowed, total.device)).cpu()

    def _uniform(self, allowed: Tensor | None, device: torch.device) -> Tensor:
        """[N] what each key would receive in all if every query spread its attention evenly."""
        if allowed is None:
            pairs = torch.ones(self.length, self.length, device=device).tril()
        else:
            pairs = allowed[0].float()
        return (pairs / pairs.sum(1, keepdim=True).clamp(min=1)).sum(0).clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def token_attention(mllm: MLLM, batch: Batch, answer_ids: Tensor) -> TokenAttention:
    """Attention of every answer token, by layer and head, from one pass over a teacher-forced answer.

    Answer token j is predicted by the position before it: the last one of the prompt for j = 0, the answer's token
    j - 1 after that. Rows are softmax probabilities in float32, as in `dyvte.AttentionProbe`.

    Args:
        mllm: the model, with attention that goes through transformers' functions.
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
    watcher = _Watcher(inputs, answer_ids.shape[1], mllm.num_heads)
    with watch_attention(mllm, watcher.see):
        run_for_attention(mllm, inputs)
    if len(watcher.rows) != mllm.num_layers:
        raise UnsupportedError(
            f"{len(watcher.rows)} of {mllm.num_layers} decoder layers showed their attention: the others do not go "
            "through transformers' attention functions"
        )
    rows = pad_sequence([watcher.rows[layer] for layer in sorted(watcher.rows)], True, torch.nan)
    received = torch.stack([watcher.received[layer] for layer in sorted(watcher.received)])
    sinks = received > SINK_RATIO
    sinks[:, int(batch.layout.first_token[0])] = True
    return TokenAttention(rows, received, sinks)
