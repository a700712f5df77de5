"""Whether commands are as fast beside a busy process as alone: `python -m benchmarks.busy_machine`.

Runs a command in processes of its own, alone and beside one that spins on a core, alternating, with dyvte's default and
with OpenMP's own (threads that spin while they wait). Prints seconds and the ratio of their medians; at most 1.5 is
what the toolkit promises with its default.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import machine

COMMAND = ["-m", "analysis.exits", "data.limit=32", "captions=0"]
SPIN = "while True: pass"
POLICIES = {"dyvte's default (threads sleep)": None, "OpenMP's own (threads spin)": "ACTIVE"}


def run_seconds(command: Sequence[str], policy: str | None, busy: bool) -> float:
    """Seconds that a command takes, beside a spinning process or not."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    }
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    spinning = subprocess.Popen([sys.executable, "-c", SPIN]) if busy else None
    try:
        with TemporaryDirectory() as folder:
            start = time.perf_counter()
            line = [sys.executable, *command, f"output_dir={Path(folder) / 'run'}"]
            subprocess.run(line, check=True, env=environment, capture_output=True)
            return time.perf_counter() - start
    finally:
        if spinning is not None:
            spinning.kill()
            spinning.wait()


def busy_ratios(command: Sequence[str], repeats: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds alone and beside a busy process, by waiting policy, alternating."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in POLICIES}
    for _ in range(repeats):
        for name, policy in POLICIES.items():
            for busy in (False, True):
                found[name][busy].append(run_seconds(command, policy, busy))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(machine())
    for name, (alone, beside) in busy_ratios(COMMAND, options.repeats).items():
        times = [", ".join(f"{second:.1f}" for second in seconds) for seconds in (alone, beside)]
        ratio = statistics.median(beside) / statistics.median(alone)
        print(f"{name}: alone {times[0]} s, beside a busy process {times[1]} s, ratio of medians {ratio:.2f}")


if __name__ == "__main__":
    main()
