"""The HTML page of a report, from what was read and drawn: one file that needs nothing else.

The templates escape every text they are given. A content security policy in the page forbids it to load anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..statistics.verdicts import image_use_in_words, stages_held_in_words, verdict_in_words, verdict_word
from .cells import Cell, PageTable, RunFinding, spaced, words_cell, written
from .figures import PageFigure, course
from .findings import findings_of
from .runs import FinishedRun, known_values, settings_in
from .samples import Samples, palette

SETTINGS_ABOVE = ("model", "data", "policy", "experiment", "recipe")
"""Groups of settings that a table of settings lists first."""
SECTIONS = {
    "stages": (
        "Attention, layer by layer",
        "Where image and text look. What the answers use of it is another question, for paths that are cut.",
    ),
    "exits": ("The image leaves at exit layer k", "Every exit layer, for all questions at once."),
    "knockout": ("Paths that are cut", "What an answer loses when one group of tokens no longer looks at another."),
    "stage_table": (
        "The three stages, by attention and by cause",
        "Attention is not use: each stage is judged by both.",
    ),
    "lens": ("What patches and the prompt's end say", "Hidden states after each layer, read as words."),
    "train": ("Gates", "Small classifiers that decide after each layer whether the image is still needed."),
    "evaluate": ("Policies", "What was asked under each policy, beside fixed exits."),
    "tables": ("Methods at matched cost", "All methods on the same questions."),
    "cost": ("Measured cost", "Time and memory; these depend on the machine."),
}
"""Step -> heading of its section, and the sentence under it."""
LOOKING = "Attention says where the model looks, not what its answers use: python -m analysis.knockout asks that."
"""Stands behind a verdict on attention where no stage table gives the other half."""


def opening_sentences(runs: Sequence[FinishedRun]) -> list[str]:
    """Until which layer one model uses its image, what leaving costs, which stages hold; of the runs that are there."""
    by_step = {run.step: run for run in runs}
    sentences = image_use_in_words(by_step["exits"].summary) if "exits" in by_step else []
    if "stage_table" in by_step and (rows := by_step["stage_table"].value("/rows")):
        return [*sentences, stages_held_in_words(rows)]
    stages = by_step["stages"].value("/stages") if "stages" in by_step else None
    return [*sentences, f"{verdict_in_words(stages)} {LOOKING}"] if stages else sentences


@dataclass(frozen=True)
class MissingRun:
    """Results that the page would show if they were there: what they give, and the command that makes them.

    Attributes:
        unfinished: folders of runs that were stopped.
    """

    name: str
    gives: str
    command: str
    unfinished: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page with figures and tables.

    Attributes:
        id: its anchor.
        more: pictures that are folded away, with what opens them.
        beside: pictures of several models, side by side.
    """

    id: str
    title: str
    text: str
    pictures: list[PageFigure]
    tables: list[PageTable]
    more: list[PageFigure] = field(default_factory=list)
    beside: list[tuple[str, list[PageFigure]]] = field(default_factory=list)

    @classmethod
    def of(cls, step: str, pictures: list[PageFigure], tables: list[PageTable], **parts: Any) -> Section:
        """The section of a step, without tables that have no rows."""
        return cls(step, *SECTIONS[step], pictures, [table for table in tables if table.rows], **parts)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.pictures or self.tables or self.beside)


@dataclass(frozen=True)
class Page:
    """Everything on a page.

    Attributes:
        lead: what it is about.
        opening: what was found, in sentences.
        warnings: what a reader must know before the numbers.
        runs: of which findings, settings, versions and commands are shown.
        command: what makes this page again.
        samples: of the layer slider; None without.
        owners: run name -> model, on pages of several models.
    """

    title: str
    lead: str
    opening: list[str]
    warnings: list[str]
    sections: list[Section]
    runs: list[FinishedRun]
    missing: list[MissingRun]
    command: str
    samples: Samples | None = None
    owners: Mapping[str, str] = field(default_factory=dict)


OPENING_STEPS = ("exits", "knockout", "stage_table", "stages")
"""Whose first figure a page opens with: the first of these that has one."""


def take_first_figure(sections: Sequence[Section]) -> tuple[PageFigure | None, list[Section]]:
    """The figure that a page opens with, and its sections without it; sections that show nothing are left out."""
    found = [section for section in sections if not section.empty]
    with_figures = {section.id: section for section in found if section.pictures}
    chosen = next((with_figures[step] for step in OPENING_STEPS if step in with_figures), None)
    if chosen is None:
        return None, found
    rest = [replace(each, pictures=each.pictures[1:]) if each is chosen else each for each in found]
    return chosen.pictures[0], [section for section in rest if not section.empty]


def render_page(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"verdict": verdict_word, "exact": exact}
    samples, findings = page.samples, findings_of(page.runs)
    figure, sections = take_first_figure(page.sections)
    return environment.get_template("report.html").render(
        page=page,
        figure=figure,
        sections=sections,
        findings=[_finding(each) for each in findings],
        slider={"palette": palette(), "records": samples.records} if samples and samples.records else None,
        sample_table=sample_table(samples) if samples and samples.records else None,
        sources=sources_table(page.runs),
        versions=versions_table(page.runs),
        settings=[settings_table(run) for run in page.runs if run.config],
        commands=commands_of(page),
        verdicts=verdict_table(findings, page.owners),
    )


def exact(value: float | str | None) -> str:
    """A number to its last digit, for whoever reads the page by program."""
    return "" if value is None else str(value) if isinstance(value, str) else repr(value)


def verdict_table(findings: Sequence[RunFinding], owners: Mapping[str, str]) -> PageTable:
    """The page at a glance: the verdicts, of one model with reasons, of several (run name -> owner) a column each."""
    models = list(dict.fromkeys(owners.values()))
    by_title: dict[str, dict[str, Cell]] = {}
    for each in findings:
        if each.verdict is not None:
            value = str(each.run.value(each.verdict))
            cell = Cell(verdict_word(value), value, each.run.name, each.verdict)
            cells = by_title.setdefault(each.title, {})
            cells[owners.get(each.run.name, "")] = cell
            if not owners:
                stages = each.run.value("/stages") if each.verdict == "/stages/verdict" else None
                cells["why"] = words_cell(verdict_in_words(stages) if stages else "; ".join(each.reasons))
    columns = models or ["", "why"]
    rows = [[words_cell(title), *(cells.get(each, Cell("–")) for each in columns)] for title, cells in by_title.items()]
    return PageTable("Verdicts", ["finding", *(models or ["verdict", "why"])], rows)


def _finding(finding: RunFinding) -> dict[str, Any]:
    run = finding.run
    columns = ["effect", "estimate", *(["interval"] if any(row[2].text for row in finding.effects) else [])]
    return {
        "run": run.name,
        "title": finding.title,
        "verdict": finding.verdict and run.value(finding.verdict),
        "key": finding.verdict,
        "reasons": list(finding.reasons),
        "effects": PageTable("Effects", columns, [row[: len(columns)] for row in finding.effects]),
        "size": size_of(run),
        "curve": small_curve(run.value(finding.curve)) if finding.curve else None,
    }


CURVE_WIDTH, CURVE_HEIGHT = 240, 56
"""Of the small figure of a finding, in the units of its drawing."""


def small_curve(values: Sequence[float | None] | None) -> dict[str, Any] | None:
    """A curve as the points of a small line, from its smallest to its largest value; None where two are not known."""
    known = known_values(values or ())
    if len(known) < 2:
        return None
    low, high = min(value for _, value in known), max(value for _, value in known)
    across, up = CURVE_WIDTH / known[-1][0], CURVE_HEIGHT / ((high - low) or 1.0)
    points = " ".join(f"{index * across:.1f},{CURVE_HEIGHT - (value - low) * up:.1f}" for index, value in known)
    words = course("Curve", list(values or ()))
    return {"points": points, "width": CURVE_WIDTH, "height": CURVE_HEIGHT, "words": words}


def size_of(run: FinishedRun) -> str:
    """How much a run has seen."""
    found = run.summary | (run.value("/cause") or {})  # of a stage table: the questions that were cut
    questions = found.get("num_questions") or found.get("num_samples")
    images = found.get("num_images")
    return f"n = {questions:,} question{'s' * (questions != 1)}" + (f" on {images:,} images" if images else "")


def sample_table(samples: Samples) -> PageTable:
    """The samples in words, for those who do not use the slider."""
    rows = []
    for record in samples.records:
        most = max(range(len(record["mass"])), key=record["mass"].__getitem__)
        question = f"{record['question']} ({record['part']})" if record["part"] else record["question"]
        words = (question, spaced(record["kind"]), record["answer"], record["reference"])
        rows.append(
            [
                *map(words_cell, words),
                Cell(written(record["exit_layer"], "layer"), record["exit_layer"]),
                words_cell(record["exit_answer"]),
                Cell(written(record["exit_depth"], "layer"), record["exit_depth"]),
                Cell(f"{most} ({written(record['mass'][most], 'share')})", most),
            ]
        )
    columns = ["question", "kind", "answer", "reference", "exit layer", "answer with exit", "exit depth"]
    note = (
        "Exit layer: where the gates took the image out. Exit depth: the first exit layer from which answer and "
        "cross-entropy stay. Last column: layer with most attention on the image, and how much of it."
    )
    return PageTable("The samples", [*columns, "looks most in layer"], rows, note)


def sources_table(runs: Sequence[FinishedRun]) -> PageTable:
    """Where the runs lie, and what they were made of."""
    rows = []
    for run in runs:
        date = datetime.fromtimestamp((run.path / "summary.json").stat().st_mtime, UTC)
        counts = [run.value(f"/{key}") for key in ("num_samples", "num_failed", "seconds")]
        row = [run.name, run.path, f"{date:%Y-%m-%d %H:%M} UTC", *counts, run.weights, run.data]
        rows.append([words_cell(each) for each in row])
    columns = ["run", "folder", "finished", "samples", "left out", "seconds", "weights", "data"]
    note = "Weights and data: digests of what was loaded. Equal digests: the same model, the same questions."
    return PageTable("Runs", columns, rows, note)


def versions_table(runs: Sequence[FinishedRun]) -> PageTable:
    """One row a package; a column for each set of versions that runs were made with."""
    sets: dict[str, tuple[Mapping[str, str], list[str]]] = {}
    for run in runs:
        found = run.value("/versions") or {}
        sets.setdefault(repr(found), (found, []))[1].append(run.name)
    packages = dict.fromkeys(package for found, _ in sets.values() for package in found)
    columns = [", ".join(names) for _, names in sets.values()] if len(sets) > 1 else ["all runs"]
    rows = [[words_cell(each), *(words_cell(found.get(each)) for found, _ in sets.values())] for each in packages]
    return PageTable("Versions", ["package", *columns], rows)


def settings_table(run: FinishedRun) -> PageTable:
    """Every setting of a run, the groups that choose model and data first."""
    order = sorted(run.config, key=lambda key: (key not in SETTINGS_ABOVE, isinstance(run.config[key], dict)))
    settings = settings_in({key: run.config[key] for key in order})
    rows = [[words_cell(name), words_cell("null" if value is None else str(value))] for name, value in settings]
    return PageTable(f"Settings of {run.name}", ["setting", "value"], rows)


def commands_of(page: Page) -> list[str]:
    """What makes the runs of a page, and the page, again."""
    unknown = "# {0.name}: its overrides were not recorded, {0.path}/config.yaml holds its settings"
    return [*(run.command or unknown.format(run) for run in page.runs), page.command]
