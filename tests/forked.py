"""Commands in a process of their own that begins with all that this one has imported.

A fresh interpreter imports torch and transformers for longer than most commands under test run. That commands start
from the shell as well is tested where they are installed (`test_packaging.py`).
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate import PartialState

from dyvte.runs import distributed


def start_forked(
    command: str | Callable[[], object],
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> Callable[[], subprocess.CompletedProcess[str]]:
    """Start a command as `python -m COMMAND ARGUMENTS` would; what is returned waits for what it returns and writes.

    Args:
        command: the module, or a function that reads `sys.argv` as its `main` would.
        arguments: the words behind it.
        folder: the working directory.
        environment: variables to set.
    """
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed in `finish`

    def child() -> None:
        os.chdir(folder)
        os.environ.update(environment or {})
        PartialState._reset_state()  # this process may have found before that it is alone
        distributed._state.cache_clear()
        for number, file in enumerate((out, err), start=1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb", 0), write_through=True) for n in (1, 2))
        sys.argv = [str(command), *arguments]
        if isinstance(command, str):
            sys.modules.pop(command, None)
            runpy.run_module(command, run_name="__main__")
        else:
            command()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()

    def finish() -> subprocess.CompletedProcess[str]:
        process.join()
        written = []
        with out, err:
            for file in (out, err):
                file.seek(0)
                written.append(file.read().decode())
        return subprocess.CompletedProcess(list(arguments), process.exitcode, *written)

    return finish


def run_forked(
    command: str | Callable[[], object], arguments: Sequence[str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """`start_forked`, and wait."""
    return start_forked(command, arguments, folder)()


def as_torchrun(processes: int) -> list[dict[str, str]]:
    """The variables that `torchrun` sets in each of so many processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    return [{**common, "MASTER_PORT": port, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(processes)]
