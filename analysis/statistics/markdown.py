"""Tables in Markdown, the `table.md` of a run folder, and pages that are written in part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from dyvte.errors import ConfigError
from dyvte.runs.store import RunFolder, write_atomic


def markdown_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table."""
    body = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return [body[0], "|" + "---|" * len(head), *body[1:]]


def records_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a table whose rows are dictionaries of the same keys, which head its columns.

    Example:
        >>> records_table([{"method": "FastV", "cost": 0.5}])
        ['| method | cost |', '|---|---|', '| FastV | 0.5 |']
    """
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def heading(cfg: DictConfig, note: str) -> list[str]:
    """Title of an experiment, and what its numbers are of."""
    return [f"### {cfg.experiment.title}", "", f"{cfg.model.name} on {cfg.data.name}: {note}.", ""]


def percent_with_limits(row: Mapping[str, Any], name: str) -> str:
    """A share in percent with the limits `<name>_low` and `<name>_high` beside it; a dash where there is none."""
    if row[name] is None or math.isnan(row[name]):
        return "–"
    return f"{100 * row[name]:.1f} [{100 * row[f'{name}_low']:.1f}, {100 * row[f'{name}_high']:.1f}]"


def published(experiment: DictConfig) -> list[str]:
    """The numbers that an experiment quotes from the paper; nothing where it quotes none."""
    if not experiment.published:
        return []
    rows = [(each.method, each.task, each.quantity, each.value) for each in experiment.published]
    table = markdown_table(["method", "task", "quantity", "value"], rows)
    return ["", "Published, on other models and data:", "", *table, "", f"Source: {experiment.source}."]


def replace_section(text: str, name: str, content: str) -> str:
    """A page with the lines between its comments `<!-- name -->` and `<!-- /name -->` replaced."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ConfigError(f"the page to write on has no part between {start} and {end}")
    return f"{before}{start}\n{content}\n{end}{after}"


def with_limits(estimate: Mapping[str, float | None], form: str = ".3f", name: str = "value") -> str:
    """An estimate with its limits `low` and `high` in brackets; a dash for what is not known.

    Example:
        >>> with_limits({"value": 0.5, "low": 0.25, "high": None}, ".2f")
        '0.50 [0.25, –]'
    """
    value, low, high = ("–" if estimate[key] is None else f"{estimate[key]:{form}}" for key in (name, "low", "high"))
    return f"{value} [{low}, {high}]"


def write_table_page(folder: RunFolder, lines: Sequence[str]) -> None:
    """Write `table.md` and print it."""
    text = "\n".join(lines) + "\n"
    file = folder.path / "table.md"
    write_atomic(file, lambda out: out.write(text.encode()))
    print(text)
    print(f"table: {file}")
