"""Several processes that save gates into one folder at once: what stays is whole, and of one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dyvte.gates.controls import QUESTION_GATES
from dyvte.gates.features import QUESTION
from dyvte.gates.module import Gates
from dyvte.runs.locks import replace_folder
from dyvte.train import save_gates


def numbered(number: int, status: str = "text_last") -> Gates:
    """Gates whose weights and settings all say the same number."""
    gates = Gates(3, 64, [status], threshold=float(number), facts={"model": str(number)})
    for parameter in gates.parameters():
        torch.nn.init.constant_(parameter, number)
    return gates


def number_of(folder: Path) -> int:
    gates = Gates.from_pretrained(folder)
    found = {int(gates.threshold), int(gates.facts["model"]), *gates.inner.flatten().int().tolist()}
    assert len(found) == 1, "a mixture of several"
    assert f"# Visual-token exit gates for {min(found)}" in (folder / "README.md").read_text()
    return found.pop()


def at_once(jobs: int, do: Callable[[int], object]) -> None:
    """Call `do` with each number in a thread of its own, all starting together; any error is raised."""
    barrier = threading.Barrier(jobs)

    def job(number: int) -> None:
        barrier.wait()
        do(number)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(job, range(jobs)))


@pytest.mark.parametrize("how", ["save_pretrained", "train"])
def test_gates_saved_at_once_are_those_of_one(how: str, tmp_path: Path) -> None:
    every = [(numbered(number), numbered(number, QUESTION)) for number in range(3)]

    def save(number: int) -> None:
        gates, control = every[number]
        if how == "train":
            save_gates(tmp_path / "gates", gates, control)
        else:
            gates.save_pretrained(tmp_path / "gates")

    for _ in range(12):
        at_once(3, save)
        found = number_of(tmp_path / "gates")
        if how == "train":
            assert number_of(tmp_path / "gates" / QUESTION_GATES) == found
        assert [each.name for each in tmp_path.iterdir()] == ["gates"]
        assert not list((tmp_path / "gates").glob(".*"))


def test_a_folder_replaced_at_once_is_one_of_them(tmp_path: Path) -> None:
    for turn in range(20):
        for number in range(8):
            (tmp_path / f"new-{number}").mkdir()
            for name in "abc":
                (tmp_path / f"new-{number}" / name).write_text(f"{turn} {number}")
        at_once(8, lambda number: replace_folder(tmp_path / f"new-{number}", tmp_path / "final"))
        assert len({file.read_text() for file in (tmp_path / "final").iterdir()}) == 1
        assert [each.name for each in tmp_path.iterdir()] == ["final"]


def test_a_folder_that_must_not_be_replaced_stays(tmp_path: Path) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(FileExistsError):
        replace_folder(tmp_path / "new", tmp_path / "final", overwrite=False)
    assert (tmp_path / "final" / "file").read_text() == "final"
