"""Notebooks run as committed, show what their code gives on the shipped model, and hold no logic and no numbers."""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager

from docs.tooling.notebooks import FOLDER, chosen, execute, without_progress
from dyvte.errors import ConfigError

FILES = sorted(FOLDER.glob("*.ipynb"))
NAMES = ["01_three_stages", "02_manual_exit", "03_dyvte", "04_compare_methods", "05_your_model", "06_causes"]
NAMES += ["07_explore_attention"]
OF_ONE_QUESTION = ("07_explore_attention",)
"""Asks once and leaves no run folder."""
MACHINE = re.compile(r"/(home|root|tmp|work|usr|opt|Users|var)/|[A-Z]:\\\\")
NUMBER = re.compile(r"\d+\.\d+|\d\s?%|\b\d{3,}\b")

LESS_DATA = {
    "data.limit=192": "data.limit=8",
    "data.limit=144": "data.limit=8",
    "data.limit=480": "data.limit=48",
    "recipe.bound=0.1": "recipe.bound=0.9",
    "LIMIT = 48": "LIMIT = 8",
    "data.limit=36": "data.limit=8",
    "calibration.data.limit=32": "calibration.data.limit=8",
    "experiment.random_seeds=2": "experiment.random_seeds=1",
}
"""What a notebook is run on here, so that it takes seconds; the outputs that are kept are of all its data."""

QUICK_FIGURES = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
from matplotlib.layout_engine import ConstrainedLayoutEngine
from quick_figures import RunFolder, save_quickly
sys.path.pop()
RunFolder.save_figure = save_quickly
ConstrainedLayoutEngine.execute = lambda self, figure: None
"""
"""Figures are drawn, without finding places for their panels."""
INSTEAD = LESS_DATA | {"make_experiments_importable()  #": f"{QUICK_FIGURES}make_experiments_importable()  #"}

by_name = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def cells(notebook: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in cells(notebook, "code") for output in cell["outputs"]]


def pictures(notebook: dict[str, Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_all_are_there() -> None:
    assert [file.stem for file in FILES] == NAMES
    assert chosen(["03"]) == [FOLDER / "03_dyvte.ipynb"]
    with pytest.raises(ConfigError, match="no notebook '9'; there are 01_three_stages"):
        chosen(["01", "9"])


@by_name
def test_the_first_cell_picks_and_the_rest_only_calls(file: Path) -> None:
    first, *rest = cells(read(file), "code")
    assert first["metadata"]["tags"] == ["parameters"]
    assignments = ast.parse(text(first)).body
    assert all(isinstance(each, ast.Assign) for each in assignments)
    chosen_here = {each.targets[0].id: ast.literal_eval(each.value) for each in assignments}  # type: ignore[attr-defined]
    assert {"MODEL", "SOURCE", *(["RUNS"] if file.stem not in OF_ONE_QUESTION else [])} <= set(chosen_here)
    logic = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.If, ast.While, ast.Try)
    for cell in rest:
        tree = ast.parse(text(cell))
        assert not any(isinstance(node, logic) for node in ast.walk(tree)), text(cell)
        assigned = {
            name.id for name in ast.walk(tree) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        }
        assert not assigned & set(chosen_here), "set again below the first cell"


def test_all_install_what_is_missing_in_the_same_words_and_else_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = {text(cells(read(file), "code")[1]) for file in FILES}
    called: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, check: called.append(command))
    exec(compile(words, "notebook", "exec"), {"SOURCE": "dyvte.whl"})
    assert not called, "dyvte is there"
    importlib.import_module("dyvte.analysis.stages")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(compile(words, "notebook", "exec"), {"SOURCE": "dyvte.whl"})
    assert called == [[sys.executable, "-m", "pip", "install", "--quiet", "dyvte.whl"]]


@by_name
def test_text_says_what_to_look_for_and_not_what_came_out(file: Path) -> None:
    notebook = read(file)
    for cell in cells(notebook, "markdown"):
        words = re.sub(r"\[[^\]]*\]\([^)]*\)|`[^`]*`", "", text(cell)).replace("95%", "")  # links, code, the level
        assert not NUMBER.search(words), words
    assert "testbed" in text(notebook["cells"][0])


@by_name
def test_outputs_are_whole(file: Path) -> None:
    """That they are of this code and of the weights that ship is the rule of all generated files (test_gallery)."""
    notebook = read(file)
    counts = [cell["execution_count"] for cell in cells(notebook, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert pictures(notebook) > 0
    assert not [each for each in outputs(notebook) if each["output_type"] == "error" or each.get("name") == "stderr"]
    content = json.dumps(outputs(notebook))
    content = re.sub(r'"image/png": "[^"]*"', "", content)
    assert not MACHINE.search(content), MACHINE.search(content)


@by_name
def test_a_table_is_shown_once_and_as_a_table(file: Path) -> None:
    printed = [line for each in outputs(read(file)) for line in "".join(each.get("text", "")).splitlines()]
    assert not [line for line in printed if line.startswith("|")]


def test_progress_bars_go_and_warnings_stay() -> None:
    bars = (
        "a on b:   0%|          | 0/24 [00:00<?, ?sample/s]\ra on b:  67%|██▋   | 16/24 [00:34<00:17,  2.13s/sample]\n"
        "a on b: 16 of 24 samples |████        | 00:34 gone, 00:17 left, loss=0.1\n"
    )
    stderr = {"output_type": "stream", "name": "stderr"}
    assert without_progress({**stderr, "text": [bars]}) is None
    assert without_progress({**stderr, "text": [bars, "UserWarning: x\n"]}) == {**stderr, "text": ["UserWarning: x"]}
    widget = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}
    assert without_progress(widget) is None
    stdout = {"output_type": "stream", "name": "stdout", "text": [bars]}
    assert without_progress(stdout) == stdout


@pytest.fixture(scope="module")
def kernel() -> Iterator[AsyncKernelManager]:
    """One for every notebook, each of which finds it empty: starting one takes longer than most of them."""
    started = AsyncKernelManager(kernel_name="python3")
    yield started
    if started.has_kernel:
        asyncio.run(started.shutdown_kernel(now=True))


@pytest.mark.slow
@by_name
def test_it_runs_as_committed_on_less_data(file: Path, tmp_path: Path, kernel: AsyncKernelManager) -> None:
    small = any(old in text(cells(read(file), "code")[0]) for old in LESS_DATA)
    assert small or file.stem in OF_ONE_QUESTION, "this notebook runs on all its data"
    notebook = execute(file, tmp_path, INSTEAD, kernel)
    assert pictures(notebook) == pictures(read(file))
    assert not list(tmp_path.rglob("figures/*.pdf")), "figures are drawn quickly"
    runs = list((tmp_path / "outputs" / "notebooks").rglob("summary.json"))
    assert bool(runs) == (file.stem not in OF_ONE_QUESTION), "runs go where the first cell says"
    assert not list((tmp_path / "notebooks").iterdir())
