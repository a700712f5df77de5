"""`python -m docs.tooling.notebooks` (`make notebooks`): run the notebooks again and keep what they show.

Each runs top to bottom in a fresh kernel and an empty folder. The outputs go back into `notebooks/*.ipynb`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docs.tooling.generated import ROOT, write_generated
from dyvte.errors import ConfigError

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager

FOLDER = ROOT / "notebooks"
TIMEOUT = 600
"""Seconds a cell."""
QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
PROGRESS = re.compile(r"^.*\d+%\|.*\|.*$|^.*\d+(it|sample|epoch)s? \[.*\]$|^.* of .*\|.*\| .* gone, .* left.*$")
"""A line of a progress bar, which is of no use to a reader."""


def execute(
    file: Path, workdir: Path, instead: Mapping[str, str] | None = None, kernel: AsyncKernelManager | None = None
) -> dict[str, Any]:
    """Run a notebook in `workdir/notebooks`; its runs are kept under `workdir/outputs`.

    Args:
        file: the notebook.
        workdir: gets `notebooks/` and `outputs/`.
        instead: text -> what stands in its place, for a quick look at less data.
        kernel: one to go on with, emptied of what earlier notebooks left; by default a fresh one.

    Returns:
        The notebook as JSON, with outputs, and without times and machine-dependent metadata.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    import nbformat
    from nbclient import NotebookClient

    folder = workdir / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = json.loads(file.read_text())
    for cell in given["cells"]:
        for old, new in (instead or {}).items():
            cell["source"] = "".join(cell["source"]).replace(old, new)
    source = nbformat.reads(json.dumps(given), as_version=nbformat.NO_CONVERT)
    if kernel:
        code = f"import os; os.chdir({str(folder)!r}); get_ipython().reset()"
        source.cells.insert(0, nbformat.v4.new_code_cell(code))
    options = {"timeout": TIMEOUT, "record_timing": False, "resources": {"metadata": {"path": str(folder)}}}
    with _quiet(workdir):
        NotebookClient(source, km=kernel, kernel_name="python3", **options).execute()
    del source.cells[: bool(kernel)]
    notebook: dict[str, Any] = json.loads(nbformat.writes(source))
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [kept for kept in map(without_progress, cell["outputs"]) if kept is not None]
    return notebook


def without_progress(output: dict[str, Any]) -> dict[str, Any] | None:
    """An output without progress bars, as lines or widgets; None if nothing else is left. Warnings stay."""
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return None
    if output.get("name") != "stderr":
        return output
    lines = [line for line in re.split(r"[\r\n]+", "".join(output["text"])) if not PROGRESS.match(line.strip())]
    left = "\n".join(lines).replace("\x1b[A", "").strip()
    return {**output, "text": [left]} if left else None


@contextmanager
def _quiet(workdir: Path) -> Iterator[None]:
    """Without progress bars, and without Jupyter's files in the home folder, which two kernels would share."""
    wanted = {
        **QUIET,
        "IPYTHONDIR": str(workdir / ".ipython"),
        "JUPYTER_RUNTIME_DIR": str(workdir / ".jupyter"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def as_jupyter_formats(notebook: dict[str, Any]) -> str:
    """The text of the file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def chosen(names: Sequence[str]) -> list[Path]:
    """The notebooks with these names or beginnings of names, in order; all without names.

    Raises:
        ConfigError: there is no such notebook.
    """
    files = sorted(FOLDER.glob("*.ipynb"))
    for name in names:
        if not any(file.stem.startswith(name) for file in files):
            raise ConfigError(f"no notebook {name!r}; there are {', '.join(file.stem for file in files)}")
    return [file for file in files if not names or any(file.stem.startswith(name) for name in names)]


def main() -> None:
    """Run the notebooks one after the other; later ones find the runs of earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, by the beginning of their name; all without")
    parser.add_argument("--workdir", type=Path, help="keep and reuse finished runs here (default: an empty folder)")
    options = parser.parse_args()
    try:
        files = chosen(options.names)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as empty:
        workdir = (options.workdir or Path(empty)).resolve()
        for file in files:
            started = time.perf_counter()
            content = as_jupyter_formats(execute(file, workdir))
            write_generated(f"notebooks/{file.name}", content, "make notebooks", ("weights", "gates"), root=ROOT)
            print(f"{file.name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
