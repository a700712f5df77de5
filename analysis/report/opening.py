"""What a report opens with: what the model does with its image, in a few sentences, and one figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..statistics.verdicts import verdict_in_words, verdict_word
from .cells import written
from .figures import PageFigure
from .runs import FinishedRun

STOPS = "/findings/contribution_stops"


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
    """Until which layer one model uses its image, what leaving costs, which stages hold; of the runs that are there.

    Nothing is computed here but the share of the FLOPs of an exit.
    """
    by_step = {run.step: run for run in runs}
    sentences = list(_use(by_step["exits"])) if "exits" in by_step else []
    if "stage_table" in by_step and by_step["stage_table"].value("/rows"):
        return [*sentences, _stages_held(by_step["stage_table"])]
    stages = by_step["stages"].value("/stages") if "stages" in by_step else None
    return [*sentences, verdict_in_words(stages)] if stages else sentences


def _use(run: FinishedRun) -> Iterator[str]:
    last, verdict = run.summary["num_layers"], run.value(f"{STOPS}/verdict")
    layer = run.value(f"{STOPS}/exit_layer")
    flops = run.value("/flops_decoder") or []
    if verdict == "found" and layer is not None:
        sentence = f"The image is used by the first {layer} of {last} layers: without it in the later ones"
        kept = written(run.value(f"/agreement/{layer}"), "share")
        cost = written(flops[layer] / flops[last], "share") if len(flops) > last else "–"
        yield f"{sentence} {kept} of the answers stay, at {cost} of the decoder's FLOPs in the prefill."
    elif verdict is not None:
        reasons = run.value(f"{STOPS}/reasons") or []
        why = f" ({reasons[0]})" if reasons else ""
        yield f"Whether the image stops being used at some layer: {verdict_word(verdict)}{why}."
    blind = written(run.value("/agreement/0"), "share")
    yield f"If the decoder sees no image at all, {blind} of the answers stay the same."


def _stages_held(run: FinishedRun) -> str:
    """The stages of the table's first split by attention and by cause."""
    rows = run.value("/rows")
    first = [row for row in rows if row["split"] == rows[0]["split"]]

    def judged(key: str) -> str:
        return "; ".join(f"{row['stage']} {verdict_word(row[key])}" for row in first)

    return f"Stages by attention: {judged('by_attention')}. By cause: {judged('by_cause')}."
