"""What generating costs while it runs: time of prefill and decoding, KV cache, memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dyvte.instrument.cache import KeptLayer
from dyvte.model_parts import cache_among

if TYPE_CHECKING:
    from dyvte.mllm import MLLM


@dataclass
class GenerationCost:
    """Of one `generate` call on a batch.

    Attributes:
        forward_seconds: of every forward call, the prefill first.
        kv_cache_bytes: keys and values stored after the prefill, of all rows.
    """

    forward_seconds: list[float] = field(default_factory=list)
    kv_cache_bytes: int = 0

    @property
    def prefill_seconds(self) -> float:
        """Of the first forward call."""
        return self.forward_seconds[0]

    @property
    def decode_seconds(self) -> list[float]:
        """Of each later forward call: one token of every row."""
        return self.forward_seconds[1:]


@contextmanager
def measure_generation(mllm: MLLM) -> Iterator[GenerationCost]:
    """Measure the `generate` call in the block. Enter it outside of policies, so that their work counts."""
    cost = GenerationCost()
    started = 0.0

    def start(module: torch.nn.Module, args: Any) -> None:
        nonlocal started
        _synchronize(mllm.device)
        started = time.perf_counter()

    def stop(module: torch.nn.Module, args: Any, output: Any) -> None:
        _synchronize(mllm.device)
        cost.forward_seconds.append(time.perf_counter() - started)
        if len(cost.forward_seconds) == 1:
            cost.kv_cache_bytes = kv_cache_bytes(cache_among(output))

    with mllm.model.register_forward_pre_hook(start), mllm.model.register_forward_hook(stop):
        yield cost


def kv_cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a KV cache of transformers."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, KeptLayer):
            total += layer.nbytes
        elif getattr(layer, "keys", None) is not None:  # linear attention holds a state instead
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated on a GPU, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # kilobytes on Linux


class PeakMemory:
    """Most memory that a block takes above what was held before it; use as `with PeakMemory(device) as memory:`.

    On a GPU what PyTorch allocates. On a CPU what PyTorch's allocator hands out to operations in the block, as its
    profiler counts it: the resident size of a process would depend on what earlier calls left to it.

    Attributes:
        bytes: the peak; 0 inside the block.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._before = 0
        self._profile: Any = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its starts and stops on stderr
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.__exit__(*error)
        held = 0
        events = self._profile.profiler.kineto_results.events()
        changes = (each for each in events if each.name() == "[memory]")
        for change in sorted(changes, key=lambda each: each.start_ns()):
            held += change.nbytes()
            self.bytes = max(self.bytes, held)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
