"""Commands in a process of their own that begins with all that this one has imported.

A fresh interpreter imports torch and transformers for longer than most commands under test run. That commands start
from the shell as well is tested where they are installed (`test_packaging.py`).
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def run_forked(
    command: str | Callable[[], object], arguments: Sequence[str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """What a command returns and writes, as `python -m COMMAND ARGUMENTS` in a folder.

    Args:
        command: the module, or a function that reads `sys.argv` as its `main` would.
        arguments: the words behind it.
        folder: the working directory.
    """

    def child() -> None:
        os.chdir(folder)
        for number, file in enumerate((out, err), start=1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb", 0), write_through=True) for n in (1, 2))
        sys.argv = [str(command), *arguments]
        if isinstance(command, str):
            sys.modules.pop(command, None)
            runpy.run_module(command, run_name="__main__")
        else:
            command()

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out.read().decode(), err.read().decode())
