"""What a report opens with: what the model does with its image, in a few sentences, and one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..statistics.verdicts import image_use_in_words, stages_held_in_words, verdict_in_words
from .figures import PageFigure
from .runs import FinishedRun

LOOKING = "Attention says where the model looks, not what its answers use: python -m analysis.knockout asks that."
"""Stands behind a verdict on attention where no stage table gives the other half."""


@dataclass(frozen=True)
class Opening:
    """The top of a page.

    Attributes:
        sentences: of all models.
        figure: the one that shows most of it; None where no run has left one.
    """

    sentences: Sequence[str] = ()
    figure: PageFigure | None = None


def opening_sentences(runs: Sequence[FinishedRun]) -> list[str]:
    """Until which layer one model uses its image, what leaving costs, which stages hold; of the runs that are there."""
    by_step = {run.step: run for run in runs}
    sentences = image_use_in_words(by_step["exits"].summary) if "exits" in by_step else []
    if "stage_table" in by_step and (rows := by_step["stage_table"].value("/rows")):
        return [*sentences, stages_held_in_words(rows)]
    stages = by_step["stages"].value("/stages") if "stages" in by_step else None
    return [*sentences, f"{verdict_in_words(stages)} {LOOKING}"] if stages else sentences
