"""Teacher-forced answers behind the prompts of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from dyvte.batch import IGNORE_INDEX, Batch, padded_answers
from dyvte.instrument.hooks import Selection
from dyvte.mllm import MLLM


def greedy_answer_ids(mllm: MLLM, batch: Batch, max_new_tokens: int = 64) -> Tensor:
    """The full model's greedy answers [B, A] as `MLLM.generate_ids` gives them, -100 at padding."""
    return padded_answers(mllm.generate_ids(batch, max_new_tokens=max_new_tokens)).to(mllm.device)


def teacher_forced(mllm: MLLM, batch: Batch, answer_ids: Tensor | None) -> tuple[Batch, Tensor | None]:
    """The batch with the answers behind the prompts, and the answers [B, A]."""
    answer = batch.layout.answer
    if answer.any():
        if answer_ids is not None:
            raise ValueError("exit_sweep: the batch holds answers already; leave answer_ids out")
        counts = answer.sum(1).tolist()
        rows = torch.arange(len(counts), device=answer.device)
        chosen = Selection.of(answer, rows, counts)
        ids = batch["input_ids"].gather(1, chosen.index)
        answer_ids = ids if chosen.valid is None else ids.masked_fill(~chosen.valid, IGNORE_INDEX)
    if answer_ids is None:
        return batch, None
    if answer_ids.ndim != 2 or len(answer_ids) != len(batch["input_ids"]):
        raise ValueError(
            f"answer_ids must be [{len(batch['input_ids'])}, A] like the batch, got {tuple(answer_ids.shape)}"
        )
    answer_ids = answer_ids.to(mllm.device)
    real = answer_ids != IGNORE_INDEX
    if not real[:, :1].all():
        empty = (~real.any(1)).nonzero().flatten().tolist()
        raise ValueError(
            f"the answer of row {empty[0]} is empty" if empty else "answer_ids must be padded on the right"
        )
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError("answer_ids must be padded on the right")
    # Nothing is predicted from the last token of an answer, so it does not have to run.
    if answer.any() or answer_ids.shape[1] == 1:
        return batch, answer_ids
    # Where it ends a shorter answer it runs along, and must not be taken for an image without pixels.
    last = real & ~torch.nn.functional.pad(real[:, 1:], (0, 1))
    visual = torch.isin(answer_ids, torch.tensor(mllm.visual_token_ids, device=answer_ids.device))
    return mllm.append_answers(batch, answer_ids.masked_fill(last & visual, 0)[:, :-1]), answer_ids
