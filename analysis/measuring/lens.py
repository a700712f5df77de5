"""What hidden states say under the logit lens, as tables: at the end of the prompt, and at every patch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.data import Sample
from dyvte.instrument.causal import logit_lens
from dyvte.mllm import MLLM
from dyvte.policies.exits.fixed_exit import FixedExit
from dyvte.testbed.world import ATTRIBUTES, IMAGE_SIZE, VALUES, patch_labels, scene_of

from ..statistics.bands import long_table
from .runs import columns_of


def word_ids(mllm: MLLM, word: str) -> set[int]:
    """The first token of a word, at the start of a text and behind a space."""
    written = (mllm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f" {word}"))
    return {ids[0] for ids in written if ids}


@dataclass
class LensMeasurement:
    """Turns the samples of a batch into the tables `answers` and, where the generator tells, `patches`.

    `answers` has a row a sample, layer (0 = the decoder's input) and exit: the probability of the model's answer at the
    end of the prompt, and whether it is the likeliest token. `patches` has a row an image, layer and attribute: the
    share of the patches that show an object whose likeliest token names it, and the same for the objects of other
    patches (`control`: names of the same words at random places).
    """

    mllm: MLLM
    exit_layer: int | None
    seed: int

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> dict[str, pd.DataFrame]:
        """The tables of one batch."""
        batch = self.mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
        tables = {"answers": self._answers(samples, batch)}
        if (patches := self._patches(samples, batch)) is not None:
            tables["patches"] = patches
        return tables

    def _answers(self, samples: list[Sample], batch: Batch) -> pd.DataFrame:
        plain = logit_lens(self.mllm, batch, "last", top=1)
        lenses = {self.mllm.num_layers: plain}
        if self.exit_layer is not None:
            policy = FixedExit(layer=self.exit_layer)
            lenses[self.exit_layer] = logit_lens(
                self.mllm, batch, "last", top=1, answer_ids=plain.answer_ids, policy=policy
            )
        tables = []
        for exit_layer, lens in lenses.items():
            likeliest = lens.ids[:, :, 0, 0] == lens.answer_ids[:, None]
            values = {"answer_probability": lens.answer_probability[:, :, 0].cpu(), "is_answer": likeliest.cpu()}
            table = long_table(columns_of(samples, "id", "image_id", "kind"), values, "layer")
            tables.append(table.assign(exit_layer=exit_layer))
        return pd.concat(tables, ignore_index=True)

    def _patches(self, samples: list[Sample], batch: Batch) -> pd.DataFrame | None:
        first = {sample.image_id: row for row, sample in reversed(list(enumerate(samples)))}
        scenes = {row: scene for image, row in first.items() if (scene := scene_of(image)) is not None}
        if not scenes:
            return None
        rows = sorted(scenes)
        some = batch[rows]
        tokens = logit_lens(self.mllm, some, "visual", top=1).ids[..., 0].cpu()  # [images, L + 1, V]
        side = int(tokens.shape[2] ** 0.5)
        if side * side != tokens.shape[2] or IMAGE_SIZE % side:
            return None  # this model's visual tokens are not a grid over the world's canvas
        ids = {a: [word_ids(self.mllm, value) for value in values] for a, values in VALUES.items()}
        rng = np.random.default_rng([self.seed, *(int(c) for c in samples[0].id.encode()[-8:])])
        table = []
        for number, row in enumerate(rows):
            labels = patch_labels(scenes[row], IMAGE_SIZE // side)
            shown = np.flatnonzero(labels["color"] > 0)
            for attribute in ATTRIBUTES:
                truth = labels[attribute][shown] - 1
                for layer, said in enumerate(tokens[number][:, shown].tolist()):
                    table.append(
                        {
                            **{"image_id": samples[row].image_id, "layer": layer, "attribute": attribute},
                            "share": _named(said, truth, ids[attribute]),
                            "control": _named(said, rng.permutation(truth), ids[attribute]),
                        }
                    )
        return pd.DataFrame(table)


def _named(said: list[int], truth: np.ndarray, ids: list[set[int]]) -> float:
    return float(np.mean([token in ids[value] for token, value in zip(said, truth.tolist(), strict=True)]))


@torch.no_grad()
def patch_words(mllm: MLLM, sample: Sample) -> tuple[list[list[str]], Tensor]:
    """The likeliest word [L + 1][V] of every patch of one image after each layer, and its probability [L + 1, V]."""
    lens = logit_lens(mllm, mllm.encode([sample.image], [sample.question]), "visual", top=1)
    words = [[mllm.tokenizer.decode([token]).strip() for token in layer] for layer in lens.ids[0, ..., 0].tolist()]
    return words, lens.probabilities[0, ..., 0].cpu()
