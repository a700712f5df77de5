"""What the notebooks show: figures and tables as values of a cell, and a folder of images to begin with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dyvte.data import Dataset
from dyvte.loading import SHIPPED_MODELS
from dyvte.runs.store import write_atomic

from .measuring.runs import read_summary as read_summary
from .plots.style import png_of
from .statistics.markdown import markdown_table

DPI = 100
"""Enough for a page, little enough for a repository, and the resolution that legends were laid out for."""


@dataclass(frozen=True, repr=False)
class NotebookPicture:
    """A PNG that Jupyter displays."""

    png: bytes

    def __repr__(self) -> str:
        return f"<picture, {len(self.png):,} bytes>"

    def _repr_png_(self) -> bytes:
        return self.png


@dataclass(frozen=True, repr=False)
class NotebookText:
    """Markdown that Jupyter displays."""

    markdown: str

    def __repr__(self) -> str:
        return self.markdown

    def _repr_markdown_(self) -> str:
        return self.markdown


def show(figure: Figure) -> NotebookPicture:
    """The figure as a picture, whatever backend is in use; the figure is closed."""
    return NotebookPicture(png_of(figure, DPI))


def picture(file: str | Path) -> NotebookPicture:
    """A PNG that a command has drawn."""
    return NotebookPicture(Path(file).read_bytes())


def page(file: str | Path) -> NotebookText:
    """A Markdown file that a command has written."""
    return NotebookText(Path(file).read_text())


def quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a command's function returns, without the table that it prints: the cell shows that as a page."""
    with redirect_stdout(io.StringIO()):
        return function(*arguments)


def table(frame: pd.DataFrame, digits: int = 3) -> NotebookText:
    """A table with its numbers rounded."""
    rows = [
        [f"{value:.{digits}f}" if isinstance(value, float) else value for value in row]
        for row in frame.itertuples(index=False)
    ]
    return NotebookText("\n".join(markdown_table(list(frame.columns), rows)))


def provenance(summary: Mapping[str, Any]) -> str:
    """What numbers are numbers of: model, data and sample size, and what a shipped model is no evidence for."""
    left_out = f", {summary['num_failed']:,} left out" if summary["num_failed"] else ""
    counted = f"{summary['num_samples']:,} samples{left_out}, {summary['num_layers']} decoder layers"
    text = f"{summary['model']} on {summary['data']}: {counted}."
    if summary["model"] in SHIPPED_MODELS:
        text += " This is the testbed, a small model made to check the tool on: no evidence about larger models."
    return text


def write_question_folder(folder: str | Path, dataset: Dataset) -> Path:
    """Write images/*.png and questions.jsonl in the form of LLaVA's evaluation data; a folder that is there is kept."""
    file = Path(folder) / "questions.jsonl"
    if file.is_file():
        return file
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for sample in dataset:
        name = f"{sample.image_id}.png" if sample.picture is not None else None
        if sample.picture is not None and not (file.parent / "images" / str(name)).is_file():
            write_atomic(file.parent / "images" / str(name), partial(sample.picture.save, format="png"))
        record = {"question_id": sample.id, "image": name, "text": sample.question}
        lines.append(json.dumps({**record, "answer": sample.answer, "category": sample.kind}))
    write_atomic(file, lambda out: out.write("".join(f"{line}\n" for line in lines).encode()))
    return file
