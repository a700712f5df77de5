"""Several processes on one run, as `accelerate launch` or `torchrun` start them; alone, all of this does nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is process 0, the one that merges and prints."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process among those of its machine."""
    return _state().device


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        _state().wait_for_everyone()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Process 0 goes through the block before the others do."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


@functools.cache
def _state() -> Any:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())
