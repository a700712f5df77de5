"""Settings of every test: deterministic, offline, on one thread. What was not checked is said at the end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tests state what holds on the CPU in float32

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from dyvte.mllm import MLLM

settings.register_profile(
    "dyvte", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("dyvte")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes() -> MLLM:
    """The shipped model, loaded once; a test that changes it loads its own."""
    from dyvte.loading import load

    return load("llava_shapes", device="cpu")


@pytest.fixture(scope="session", autouse=True)
def groups_stay_apart() -> Iterator[None]:
    """Rows that left their image run apart from the others, as in large models, where tests do not say otherwise."""
    from dyvte.cost import calls

    with mock.patch.dict(calls.FLOPS_PER_OPERATOR, cpu=1.0):
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """Files are written in the same order, but a test does not wait until each would outlast a power failure."""
    with mock.patch("os.fsync", return_value=None):
        yield


@pytest.fixture(scope="session", autouse=True)
def figures_are_drawn_quickly() -> Iterator[None]:
    """Also in what fixtures run; a test of the figures themselves has `quick_figures.printed`."""
    from quick_figures import quick

    with quick():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name every test that skipped itself, with what it lacked: green means nothing for these."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        what = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[f"{report.nodeid.partition('::')[0]}: {what.removeprefix('Skipped: ')}"] += 1
    if reasons:
        terminalreporter.section("NOT CHECKED HERE", sep="!", red=True, bold=True)
        for reason, count in reasons.items():
            terminalreporter.line(f"{count} tests of {reason}", red=True)
