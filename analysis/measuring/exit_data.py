"""What the exits are measured on: questions, captions beside them, and another image for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from dyvte.data import Dataset, Sample, build_dataset
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError

from ..statistics.exit_summary import CAPTIONS, QUESTIONS, TEXT_ONLY

# ------------------------------------------------------------------------ data


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
        self._pool: list[Sample] | None = None

    def of(self, samples: Sequence[Sample]) -> list[Any]:
        """For each sample the image of the next one in the batch that shows another scene; None where there is none."""
        others = []
        for index, sample in enumerate(samples):
            in_order = [*samples[index + 1 :], *samples[:index]]
            found = self._first(in_order, sample) or self._first(self._two_scenes(), sample)
            others.append(None if found is None or sample.image is None else found.image)
        return others

    @staticmethod
    def _first(candidates: Sequence[Sample], sample: Sample) -> Sample | None:
        fitting = (each for each in candidates if each.image is not None and each.image_id != sample.image_id)
        return next(fitting, None)

    def _two_scenes(self) -> list[Sample]:
        """The first two scenes of the data, for batches that show one scene only."""
        if self._pool is None:
            self._pool = []
            for sample in self.dataset.readable():
                if sample.image is not None and all(sample.image_id != each.image_id for each in self._pool):
                    self._pool.append(sample)
                if len(self._pool) == 2:
                    break
        return self._pool


def part_of(sample: Sample) -> str:
    """Which part of the data a sample belongs to."""
    return TEXT_ONLY if sample.image is None else str(sample.metadata.get("part", QUESTIONS))
