"""The HTML page of a report, from what was read and drawn: one file that needs nothing else.

The templates escape every text they are given. A content security policy in the page forbids it to load anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .figures import Picture
from .findings import Finding, interval_text, written
from .runs import Run, command_of, leaves
from .samples import Samples, palette
from .tables import Cell, Table, words

VERDICTS = {
    "three_stage": "found",
    "found": "found",
    "other": "not found",
    "not_found": "not found",
    "undetermined": "undetermined",
}
SETTINGS_ABOVE = ("model", "data", "policy", "experiment", "recipe")
"""Groups of settings that a table of settings lists first."""


@dataclass(frozen=True)
class Missing:
    """Results that the page would show if they were there.

    Attributes:
        name: of the step.
        gives: what it would add.
        command: what makes them.
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
        title: its heading.
        text: a sentence or two under it.
        pictures, tables: in this order.
        more: pictures that are folded away, with what opens them.
        beside: pictures of several models, side by side.
    """

    id: str
    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    more: list[Picture] = field(default_factory=list)
    beside: list[tuple[str, list[Picture]]] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """Everything on a page.

    Attributes:
        title: its heading.
        lead: what it is about, in a sentence or two.
        warnings: what a reader must know before the numbers.
        findings: verdicts and effects; `owner` of a run's name says whose, on pages of several models.
        owners: run name -> model.
        verdicts: on pages of several models, a row a question and a column a model; None on others.
        samples: of the layer slider; None without.
        sections: figures and tables.
        runs: all runs, for settings, versions and commands.
        missing: what is not there.
        command: what makes this page again.
    """

    title: str
    lead: str
    warnings: list[str]
    findings: list[Finding]
    owners: Mapping[str, str]
    samples: Samples | None
    sections: list[Section]
    runs: list[Run]
    missing: list[Missing]
    command: str
    verdicts: Table | None = None


def render(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"verdict": verdict, "rounded": rounded}
    samples = page.samples
    return environment.get_template("report.html").render(
        page=page,
        findings=[_finding(each) for each in page.findings],
        slider={"palette": palette(), "records": samples.records} if samples and samples.records else None,
        sample_table=sample_table(samples) if samples and samples.records else None,
        sources=[_source(run) for run in page.runs],
        versions=versions(page.runs),
    )


def verdict(name: str) -> str:
    """`found`, `not found` or `undetermined`."""
    return VERDICTS.get(name, name.replace("_", " "))


def rounded(value: float | str | None) -> str:
    """A number to its last digit, for whoever reads the page by program."""
    return "" if value is None else str(value) if isinstance(value, str) else repr(value)


def verdict_table(findings: Sequence[Finding], owners: Mapping[str, str]) -> Table:
    """What was found for which model.

    Args:
        findings: of all models; those without a verdict are left out.
        owners: run name -> model.
    """
    models = list(dict.fromkeys(owners.values()))
    by_title: dict[str, dict[str, Cell]] = {}
    for each in findings:
        if each.verdict is not None:
            value = str(each.run.value(each.verdict))
            cell = Cell(verdict(value), value, each.run.name, each.verdict)
            by_title.setdefault(each.title, {})[owners[each.run.name]] = cell
    rows = [[words(title), *(cells.get(model, Cell("–")) for model in models)] for title, cells in by_title.items()]
    return Table("Verdicts", ["finding", *models], rows)


def _finding(finding: Finding) -> dict[str, Any]:
    run = finding.run
    effects = []
    for effect in finding.effects:
        limits = None if effect.limits is None else [run.value(each) for each in effect.limits]
        if limits is not None and all(each is None for each in limits):
            limits = None
        effects.append(
            {
                "label": effect.label,
                "key": effect.estimate,
                "value": run.value(effect.estimate),
                "text": written(run.value(effect.estimate), effect.unit),
                "limits": None if limits is None else interval_text(limits[0], limits[1], effect.unit),
                "limit_keys": effect.limits,
                "limit_values": limits,
                "interval": effect.interval if limits else "",
            }
        )
    kinds = {each["interval"] for each in effects if each["limits"]}
    return {
        "run": run.name,
        "title": finding.title,
        "verdict": finding.verdict and run.value(finding.verdict),
        "key": finding.verdict,
        "reasons": list(finding.reasons),
        "effects": effects,
        "intervals": kinds.pop() if len(kinds) == 1 else None,
        "has_limits": any(each["limits"] for each in effects),
        "size": size(run),
    }


def size(run: Run) -> str:
    """How much a run has seen."""
    questions = run.value("/num_questions") or run.value("/num_samples")
    images = run.value("/num_images")
    return f"n = {questions:,} question{'s' * (questions != 1)}" + (f" on {images:,} images" if images else "")


def sample_table(samples: Samples) -> Table:
    """The samples in words, for those who do not use the slider."""
    rows = []
    for record in samples.records:
        most = max(range(len(record["mass"])), key=record["mass"].__getitem__)
        rows.append(
            [
                words(record["question"]),
                words(record["kind"].replace("_", " ")),
                words(record["answer"]),
                words("–" if record["reference"] is None else record["reference"]),
                Cell(written(record["exit_layer"], "layer"), record["exit_layer"]),
                words("–" if record["exit_answer"] is None else record["exit_answer"]),
                Cell(written(record["exit_depth"], "layer"), record["exit_depth"]),
                Cell(f"{most} ({written(record['mass'][most], 'share')})", most),
            ]
        )
    return Table(
        "The samples",
        [
            "question",
            "kind",
            "answer",
            "reference",
            "exit layer",
            "answer with exit",
            "exit depth",
            "looks most in layer",
        ],
        rows,
        "Exit layer: where the gates took the image out. Exit depth: the first exit layer from which "
        "answer and cross-entropy stay. "
        "Last column: layer with most attention on the image, and how much of it.",
    )


# ------------------------------------------------------------------------ where it is from


def _source(run: Run) -> dict[str, Any]:
    date = datetime.fromtimestamp((run.path / "summary.json").stat().st_mtime, UTC)
    order = sorted(run.config, key=lambda key: (key not in SETTINGS_ABOVE, isinstance(run.config[key], dict)))
    return {
        "name": run.name,
        "path": str(run.path),
        "date": f"{date:%Y-%m-%d %H:%M} UTC",
        "command": command_of(run),
        "samples": run.value("/num_samples"),
        "failed": run.value("/num_failed"),
        "seconds": run.value("/seconds"),
        "weights": run.weights or "–",
        "data": run.data or "–",
        "settings": [
            (name, "null" if value is None else str(value))
            for name, value in leaves({key: run.config[key] for key in order})
        ],
    }


def versions(runs: Sequence[Run]) -> dict[str, Any]:
    """One row a package; a column for each set of versions that runs were made with."""
    sets: list[tuple[Mapping[str, str], list[str]]] = []
    for run in runs:
        found = run.value("/versions") or {}
        for known, names in sets:
            if known == found:
                names.append(run.name)
                break
        else:
            sets.append((found, [run.name]))
    packages = list(dict.fromkeys(package for found, _ in sets for package in found))
    return {
        "columns": [", ".join(names) for _, names in sets] if len(sets) > 1 else ["all runs"],
        "rows": [(package, [found.get(package, "–") for found, _ in sets]) for package in packages],
    }
