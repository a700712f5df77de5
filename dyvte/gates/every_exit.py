"""The model's own answers under every exit, as the label set and `analysis.exits` take them: one path for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dyvte.batch import IGNORE_INDEX, Batch
from dyvte.cost.exit_flops import exit_flops
from dyvte.data.base import Sample, image_numbers
from dyvte.errors import ModelError
from dyvte.instrument.sweep import ExitSweep, exit_sweep, greedy_answer_ids
from dyvte.mllm import MLLM
from dyvte.policies.exits.fixed_exit import FixedExit


@dataclass(frozen=True)
class SweptAnswers:
    """b samples, answered greedily by the full model, and these answers under every exit.

    Attributes:
        batch: the prompts.
        answer_ids: [b, A], -100 at padding.
        answers: b texts.
        sweep: how every exit scores them, up to ties.
    """

    batch: Batch
    answer_ids: Tensor
    answers: list[str]
    sweep: ExitSweep


def sweep_answers(mllm: MLLM, samples: Sequence[Sample], max_new_tokens: int, **settings: Any) -> SweptAnswers:
    """Answer some samples greedily, and score the answers under every exit in one pass (`settings` of `exit_sweep`)."""
    batch = mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
    answer_ids = greedy_answer_ids(mllm, batch, max_new_tokens)
    try:
        sweep = exit_sweep(mllm, batch, answer_ids, shared_image=image_numbers(samples), **settings)
    except ModelError as error:
        raise ModelError(
            f"{error} (questions {samples[0].id} to {samples[-1].id}, in this order; half precision may overflow: "
            "try model.dtype=float32 or bfloat16)"
        ) from error
    return SweptAnswers(batch, answer_ids, mllm.decode(unpadded(answer_ids)), sweep.up_to_ties())


def answers_by_exit(
    mllm: MLLM, swept: SweptAnswers, max_new_tokens: int, rows: Sequence[int] | None = None
) -> list[list[str | None]]:
    """The texts [b][L + 1] of every sample's answer under every exit; only those that disagree are generated.

    They are generated in batches as large as the given one, whose rows leave at their own layers; no image is
    prepared again. With `rows`, other samples have None where an exit disagrees.
    """
    agree = swept.sweep.agree.tolist()
    texts: list[list[str | None]] = [
        [answer if same else None for same in of_row] for answer, of_row in zip(swept.answers, agree, strict=True)
    ]
    asked = range(len(texts)) if rows is None else rows
    # by layer: neighbours leave at neighbouring layers, so that fewer layers run in two groups
    missing = sorted((layer, row) for row in asked for layer, text in enumerate(texts[row]) if text is None)
    for start in range(0, len(missing), len(texts)):
        layers, of_rows = zip(*missing[start : start + len(texts)], strict=True)
        with FixedExit(layers)(mllm):
            generated = mllm.generate(swept.batch[list(of_rows)], max_new_tokens=max_new_tokens)
        for layer, row, text in zip(layers, of_rows, generated, strict=True):
            texts[row][layer] = text
    return texts


@dataclass
class PromptCosts:
    """What `count` gives for a prompt, by default operations under every exit k = 0..L.

    It is counted once for every number of text and visual tokens, and for whatever else it depends on.
    """

    mllm: MLLM
    count: Callable[[MLLM, Batch], Any] = exit_flops
    counted: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def of(self, batch: Batch, row: int, sample: Sample, *depends: int) -> Any:
        """What a sample, a row of a batch, costs."""
        key = int(batch.layout.text[row].sum()), int(batch.layout.visual[row].sum()), *depends
        if key not in self.counted:
            alone = self.mllm.encode([sample.image], [sample.question])  # in a batch it may be padded
            self.counted[key] = self.count(self.mllm, alone)
        return self.counted[key]


def unpadded(answer_ids: Tensor) -> list[list[int]]:
    """Answer ids [b, A] without their padding."""
    return [[token for token in row if token != IGNORE_INDEX] for row in answer_ids.tolist()]
