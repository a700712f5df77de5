"""Files that several processes may want at once: locks that end with their process, and files that appear whole."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".tmp-"
_IN_USE: dict[Path, int] = {}
"""Folders that this process uses, and the open file of each that says so."""


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else uses, on this machine or another."""
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:16]}")


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file next to `path` and rename it, so `path` is never seen half written."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(new: Path, final: Path, overwrite: bool = True) -> None:
    """Rename a finished folder to its final name, in place of what is there; one of several at once stays, whole.

    Without `overwrite` a `FileExistsError` is raised where there is something.
    """
    old = None
    try:
        while True:
            try:
                new.rename(final)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if not overwrite:
                    raise FileExistsError(errno.EEXIST, "exists", str(final)) from error
            if old is not None:  # another process was quicker
                shutil.rmtree(old, ignore_errors=True)
            old = temporary_name(final)
            with suppress(FileNotFoundError):
                final.rename(old)
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(folder: Path, inside: bool = True) -> Iterator[None]:
    """One process after the other goes through the block; file systems without locks let all through.

    `inside` locks a file in the folder; else the folder itself is locked, for one that must hold no file of ours.
    """
    with ExitStack() as stack:
        if fcntl is not None:
            file, flags = (folder / ".lock", os.O_CREAT | os.O_RDWR) if inside else (folder, os.O_RDONLY)
            handle = os.open(file, flags, 0o666)
            stack.callback(os.close, handle)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def use(folder: Path) -> bool:
    """Say that this process uses a folder until it ends, inside of `locked`; gives whether no other process does."""
    key = folder.resolve()
    if fcntl is None:
        return True
    if key not in _IN_USE or not (folder / ".in-use").exists():
        _IN_USE[key] = os.open(folder / ".in-use", os.O_CREAT | os.O_RDWR, 0o666)
    alone = True
    try:
        fcntl.flock(_IN_USE[key], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        alone = False
    with suppress(OSError):
        fcntl.flock(_IN_USE[key], fcntl.LOCK_SH | fcntl.LOCK_NB)
    return alone
