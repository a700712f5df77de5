"""What exits are measured on (questions, captions, other images), and everything about every exit as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from dyvte.data import Dataset, Sample, build_dataset
from dyvte.data.metrics import exact_match
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError
from dyvte.gates.every_exit import PromptCosts, SweptAnswers, answers_by_exit, sweep_answers, unpadded
from dyvte.instrument.attention import AttentionProbe
from dyvte.instrument.hooks import check_model
from dyvte.instrument.sweep import ENTROPIES, greedy_answer_ids
from dyvte.instrument.sweep.criteria import exit_depth, kl_to_full, lucky_exit_depth, paper_labels
from dyvte.mllm import MLLM

from ..statistics.bands import long_table
from ..statistics.exit_summary import CAPTIONS, QUESTIONS, TEXT_ONLY, after_exit
from ..statistics.needs_image import known_hops
from .runs import columns_of
from .token_attention import run_for_attention


class WithCaptions(Dataset):
    """The questions of the built-in task, followed by captions of its first images."""

    def __init__(self, questions: ShapesDataset, captions: ShapesDataset) -> None:
        self.parts = (questions, captions)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Sample:
        questions, captions = self.parts
        if index < len(questions):
            return questions[index]
        sample = captions[index - len(questions)]
        return replace(sample, id=f"{sample.id}-caption", metadata={**sample.metadata, "part": CAPTIONS})

    @property
    def fingerprint(self) -> str:
        """Of both parts."""
        return "+".join(part.fingerprint for part in self.parts)


def questions_and_captions(cfg: DictConfig) -> Dataset:
    """The data of the run."""
    dataset = build_dataset(cfg.data)
    if cfg.captions < 0:
        raise ConfigError(f"captions is {cfg.captions}; give a number of images, or 0 for none")
    if not isinstance(dataset, ShapesDataset) or not cfg.captions:
        return dataset
    captions = ShapesDataset(cfg.data.split, cfg.captions, cfg.data.seed, kinds=["caption"])
    return WithCaptions(dataset, captions)


class OtherImages:
    """Another scene's image for every sample: does the answer need this image, or would any do?"""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def of(self, samples: Sequence[Sample]) -> list[Any]:
        """For each sample the image of the next one in the batch that shows another scene; None where there is none."""
        others = []
        for index, sample in enumerate(samples):
            in_order = [*samples[index + 1 :], *samples[:index]]
            found = self._first(in_order, sample) or self._first(self._two_scenes, sample)
            others.append(None if found is None or sample.image is None else found.image)
        return others

    @staticmethod
    def _first(candidates: Sequence[Sample], sample: Sample) -> Sample | None:
        fitting = (each for each in candidates if each.image is not None and each.image_id != sample.image_id)
        return next(fitting, None)

    @cached_property
    def _two_scenes(self) -> list[Sample]:
        """The first two scenes of the data, for batches that show one scene only."""
        found: dict[str, Sample] = {}
        for sample in self.dataset.readable():
            if sample.image is not None:
                found.setdefault(sample.image_id, sample)
            if len(found) == 2:
                break
        return list(found.values())


def part_of(sample: Sample) -> str:
    """Which part of the data a sample belongs to."""
    return TEXT_ONLY if sample.image is None else str(sample.metadata.get("part", QUESTIONS))


@dataclass
class Measurement:
    """Turns the samples of a batch into the tables of the run."""

    mllm: MLLM
    dataset: Dataset
    max_new_tokens: int
    accuracy: bool
    branch_tokens: int | None

    def __post_init__(self) -> None:
        self.costs = PromptCosts(self.mllm)
        self.other_images = OtherImages(self.dataset)

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> dict[str, pd.DataFrame]:
        """The tables `samples`, `exits`, `tokens`, `entropy` and `entropy_swapped` of one batch."""
        swept = sweep_answers(self.mllm, samples, self.max_new_tokens, branch_tokens=self.branch_tokens)
        swept = replace(swept, sweep=swept.sweep.to("cpu"))
        sweep, ids = swept.sweep, columns_of(samples, "id")
        exits = self._exits(samples, swept)
        elsewhere, swapped = self._with_another_image(samples)
        tokens = long_table(ids, {"agree": sweep.token_agree, "nll": sweep.token_nll}, "exit_layer", "token")
        answered = sweep.answer_valid[:, None].expand_as(sweep.token_agree).flatten().numpy()
        entropy = long_table(ids, {name: getattr(sweep, name) for name in ENTROPIES}, "exit_layer", "layer")
        return {
            "samples": self._samples(samples, swept, elsewhere),
            "exits": exits,
            "tokens": tokens[answered],
            "entropy": entropy[after_exit(self.mllm.num_layers)[entropy["exit_layer"], entropy["layer"]]],
            "entropy_swapped": long_table(ids, {"text_entropy": swapped}, "layer"),
        }

    def _samples(self, samples: list[Sample], swept: SweptAnswers, elsewhere: list[list[int] | None]) -> pd.DataFrame:
        labels = paper_labels(swept.sweep.agree, swept.sweep.nll)
        layout, answers = swept.batch.layout, unpadded(swept.answer_ids)
        return pd.DataFrame(
            {
                **columns_of(samples, "id", "image_id", "kind", "question"),
                "part": [part_of(sample) for sample in samples],
                "reference": [sample.answer for sample in samples],
                "answer": swept.answers,
                "answer_tokens": [len(ids) for ids in answers],
                "visual_tokens": layout.visual.sum(1).tolist(),
                "text_tokens": layout.text.sum(1).tolist(),
                # look-ups in the image, where the data say
                "hops": pd.array([known_hops(sample.metadata) for sample in samples], dtype="Int64"),
                # another scene's image changes the answer; null where there is no image, or no other
                "needs_image": pd.array(
                    [None if other is None else other != ids for other, ids in zip(elsewhere, answers, strict=True)],
                    dtype="boolean",
                ),
                "exit_depth": exit_depth(labels).tolist(),
                "lucky_exit_depth": lucky_exit_depth(labels).tolist(),
            }
        )

    def _with_another_image(self, samples: list[Sample]) -> tuple[list[list[int] | None], Tensor]:
        """Answer ids and text entropy [b, L] of each sample with another scene's image in place of its own.

        None and NaN for a sample without an image, or where there is no other.
        """
        images = self.other_images.of(samples)
        asked = [row for row, image in enumerate(images) if image is not None and part_of(samples[row]) == QUESTIONS]
        answers: list[list[int] | None] = [None] * len(samples)
        entropy = torch.full((len(samples), self.mllm.num_layers), torch.nan)
        if asked:
            batch = self.mllm.encode([images[row] for row in asked], [samples[row].question for row in asked])
            for row, ids in zip(asked, unpadded(greedy_answer_ids(self.mllm, batch, self.max_new_tokens)), strict=True):
                answers[row] = ids
            with AttentionProbe(self.mllm) as probe:
                run_for_attention(self.mllm, batch)
            entropy[asked] = probe.stats.text_entropy.nanmean(-1).float().cpu()
        return answers, entropy

    def _exits(self, samples: list[Sample], swept: SweptAnswers) -> pd.DataFrame:
        """One row per sample and exit layer, exit layers ascending."""
        sweep = swept.sweep
        asked = [
            row
            for row, sample in enumerate(samples)
            if self.accuracy and sample.answer is not None and part_of(sample) != CAPTIONS
        ]
        answers = answers_by_exit(self.mllm, swept, self.max_new_tokens, asked)
        correct: list[bool | None] = []
        for sample, of_sample in zip(samples, answers, strict=True):
            known = [answer for answer in of_sample if answer is not None]
            if not self.accuracy or sample.answer is None or len(known) < len(of_sample):
                # Those that agree with the full model would alone flatter the early exits.
                correct += [None] * len(of_sample)
            else:
                correct += [exact_match(answer, sample.answer) for answer in known]
        values = {
            "agree": sweep.agree,
            "label": paper_labels(sweep.agree, sweep.nll),
            "nll": sweep.nll,
            "kl": kl_to_full(sweep.logits, "exit_to_full"),
            "kl_reverse": kl_to_full(sweep.logits, "full_to_exit"),
            "logit_change": logit_change(sweep.logits),
        }
        flops = [count for row, sample in enumerate(samples) for count in self.costs.of(swept.batch, row, sample)]
        return long_table(columns_of(samples, "id"), values, "exit_layer").assign(
            answer=np.array([answer for of_sample in answers for answer in of_sample], dtype=object),
            correct=pd.array(correct, dtype="boolean"),
            flops_total=[count.total for count in flops],
            flops_decoder=[count.decoder for count in flops],
        )


def logit_change(logits: Tensor) -> Tensor:
    """[B, L + 1] root mean square change of the logits under every exit, relative to the full model's spread.

    Of `logits` [B, L + 1, vocab] those of tokens that the model rules out (-inf) are left out.
    """
    possible = torch.isfinite(logits).all(1, keepdim=True)
    logits = torch.where(possible, logits, 0.0).double()
    number = possible.sum(-1)
    full = logits[:, -1:]
    mean = full.sum(-1, keepdim=True) / number[..., None]
    spread = torch.where(possible, full - mean, 0.0).square().sum(-1).div(number).sqrt()
    change = (logits - full).square().sum(-1).div(number).sqrt()
    return (change / spread.clamp_min(torch.finfo(torch.float32).tiny)).float()


def measurement(mllm: MLLM, dataset: Dataset, cfg: DictConfig) -> Measurement:
    """The measurement that a configuration asks for."""
    if cfg.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {cfg.max_new_tokens}: answers would be empty; give a positive number")
    if not 0 <= cfg.kl_start <= mllm.num_layers:
        raise ConfigError(f"kl_start is {cfg.kl_start}; this model has exit layers 0..{mllm.num_layers}")
    if not cfg.etas or min(cfg.etas) < 0:
        raise ConfigError(f"etas is {cfg.etas}; give one or more thresholds in nats, for instance etas=[0.003]")
    check_model(mllm)
    return Measurement(mllm, dataset, cfg.max_new_tokens, cfg.accuracy, cfg.branch_tokens)
