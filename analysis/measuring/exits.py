"""Everything about every exit of some samples, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from dyvte.data import Dataset, Sample
from dyvte.data.metrics import exact_match
from dyvte.errors import ConfigError
from dyvte.gates.every_exit import ExitCosts, SweptAnswers, answers_by_exit, sweep_answers, unpadded
from dyvte.instrument.attention import AttentionProbe
from dyvte.instrument.hooks import check_model
from dyvte.instrument.sweep import ENTROPIES, ExitSweep, greedy_answer_ids
from dyvte.instrument.sweep.criteria import exit_depth, kl_to_full, lucky_exit_depth, paper_labels
from dyvte.mllm import MLLM

from ..statistics.exit_summary import CAPTIONS, QUESTIONS, after_exit
from ..statistics.needs_image import known_hops
from .exit_data import OtherImages, part_of
from .token_attention import run_for_attention


@dataclass
class Measurement:
    """Turns the samples of a batch into the tables of the run."""

    mllm: MLLM
    dataset: Dataset
    max_new_tokens: int
    accuracy: bool
    branch_tokens: int | None

    def __post_init__(self) -> None:
        self.costs = ExitCosts(self.mllm)
        self.other_images = OtherImages(self.dataset)

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> dict[str, pd.DataFrame]:
        """The tables `samples`, `exits`, `tokens`, `entropy` and `entropy_swapped` of one batch."""
        swept = sweep_answers(self.mllm, samples, self.max_new_tokens, branch_tokens=self.branch_tokens)
        swept = replace(swept, sweep=swept.sweep.to("cpu"))
        sweep = swept.sweep
        exits = self._exits(samples, swept)
        elsewhere, swapped = self._with_another_image(samples)
        return {
            "samples": self._samples(samples, swept, elsewhere),
            "exits": exits,
            "tokens": token_table(samples, sweep),
            "entropy": entropy_table(samples, sweep),
            "entropy_swapped": swapped_entropy_table(samples, swapped),
        }

    def _samples(
        self,
        samples: list[Sample],
        swept: SweptAnswers,
        elsewhere: list[list[int] | None],
    ) -> pd.DataFrame:
        labels = paper_labels(swept.sweep.agree, swept.sweep.nll)
        layout, answers = swept.batch.layout, unpadded(swept.answer_ids)
        return pd.DataFrame(
            {
                "id": [sample.id for sample in samples],
                "part": [part_of(sample) for sample in samples],
                "image_id": [sample.image_id for sample in samples],
                "kind": [sample.kind for sample in samples],
                "question": [sample.question for sample in samples],
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
        flops = [count for row, sample in enumerate(samples) for count in self.costs.of(swept.batch, row, sample)]
        return pd.DataFrame(
            {
                "id": np.repeat([sample.id for sample in samples], self.mllm.num_layers + 1),
                "exit_layer": np.tile(np.arange(self.mllm.num_layers + 1), len(samples)),
                "answer": [answer for of_sample in answers for answer in of_sample],
                "correct": pd.array(correct, dtype="boolean"),
                "agree": sweep.agree.flatten().numpy(),
                "label": paper_labels(sweep.agree, sweep.nll).flatten().numpy(),
                "nll": sweep.nll.flatten().numpy(),
                "kl": kl_to_full(sweep.logits, "exit_to_full").flatten().numpy(),
                "kl_reverse": kl_to_full(sweep.logits, "full_to_exit").flatten().numpy(),
                "logit_change": logit_change(sweep.logits).flatten().numpy(),
                "flops_total": [count.total for count in flops],
                "flops_decoder": [count.decoder for count in flops],
            }
        )


def logit_change(logits: Tensor) -> Tensor:
    """Root mean square change of the logits under every exit, relative to the full model's spread.

    Args:
        logits: [B, L + 1, vocab]; tokens that the model rules out (-inf) are left out.

    Returns:
        [B, L + 1]; 0 at L.
    """
    possible = torch.isfinite(logits).all(1, keepdim=True)
    logits = torch.where(possible, logits, 0.0).double()
    number = possible.sum(-1)
    full = logits[:, -1:]
    mean = full.sum(-1, keepdim=True) / number[..., None]
    spread = torch.where(possible, full - mean, 0.0).square().sum(-1).div(number).sqrt()
    change = (logits - full).square().sum(-1).div(number).sqrt()
    return (change / spread.clamp_min(torch.finfo(torch.float32).tiny)).float()


def token_table(samples: Sequence[Sample], sweep: ExitSweep) -> pd.DataFrame:
    """One row per sample, exit layer and answer token (0 is the first; the end token is the last)."""
    valid = sweep.answer_valid[:, None].expand_as(sweep.token_agree)
    row, exit_layer, token = valid.nonzero(as_tuple=True)
    return pd.DataFrame(
        {
            "id": np.array([sample.id for sample in samples])[row.numpy()],
            "exit_layer": exit_layer.numpy(),
            "token": token.numpy(),
            "agree": sweep.token_agree[valid].numpy(),
            "nll": sweep.token_nll[valid].numpy(),
        }
    )


def entropy_table(samples: Sequence[Sample], sweep: ExitSweep) -> pd.DataFrame:
    """One row per sample, exit layer k and layer l >= k (all layers for k = L, the full model)."""
    num_layers = sweep.text_entropy.shape[2]
    exits, layers = np.nonzero(after_exit(num_layers))
    return pd.DataFrame(
        {
            "id": np.repeat([sample.id for sample in samples], len(exits)),
            "exit_layer": np.tile(exits, len(samples)),
            "layer": np.tile(layers, len(samples)),
            **{name: getattr(sweep, name)[:, exits, layers].flatten().numpy() for name in ENTROPIES},
        }
    )


def swapped_entropy_table(samples: Sequence[Sample], entropy: Tensor) -> pd.DataFrame:
    """One row per sample and layer; `entropy` [b, L] is NaN where no other image could be shown."""
    num_layers = entropy.shape[1]
    return pd.DataFrame(
        {
            "id": np.repeat([sample.id for sample in samples], num_layers),
            "layer": np.tile(np.arange(num_layers), len(samples)),
            "text_entropy": entropy.flatten().numpy(),
        }
    )


# --------------------------------------------------------------------------- command


def measurement(mllm: MLLM, dataset: Dataset, cfg: DictConfig) -> Measurement:
    """The measurement that a configuration asks for.

    Raises:
        ConfigError: a setting is out of range.
    """
    if cfg.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {cfg.max_new_tokens}: answers would be empty; give a positive number")
    if not 0 <= cfg.kl_start <= mllm.num_layers:
        raise ConfigError(f"kl_start is {cfg.kl_start}; this model has exit layers 0..{mllm.num_layers}")
    if not cfg.etas or min(cfg.etas) < 0:
        raise ConfigError(f"etas is {cfg.etas}; give one or more thresholds in nats, for instance etas=[0.003]")
    check_model(mllm)
    return Measurement(mllm, dataset, cfg.max_new_tokens, cfg.accuracy, cfg.branch_tokens)
