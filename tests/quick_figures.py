"""Figures of commands under test: drawn in full, but neither laid out nor printed, which takes longest of a small run.

Otherwise a command under test computes for a second and draws for six. What stays is what a test of a command can find:
every artist is drawn, so a figure that cannot be drawn fails, and the same numbers give the same bytes. How figures are
laid out and written is tested once a command, under `printed`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from dyvte.runs.locks import write_atomic
from dyvte.runs.store import RunFolder

DPI = 40
_AS_USERS_GET_THEM = RunFolder.save_figure


def save_quickly(self: RunFolder, name: str, figure: Figure) -> Path:
    """Like `RunFolder.save_figure`, with a small PNG alone and all panels where they were put first."""
    path = self.path / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.set_layout_engine("none")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    write_atomic(path, lambda out: out.write(drawn.getvalue()))
    plt.close(figure)
    return path


@contextmanager
def quick() -> Iterator[None]:
    """Within the block commands save figures quickly."""
    with mock.patch.object(RunFolder, "save_figure", save_quickly):
        yield


@contextmanager
def printed() -> Iterator[None]:
    """Within the block commands save figures as users get them."""
    with mock.patch.object(RunFolder, "save_figure", _AS_USERS_GET_THEM):
        yield
