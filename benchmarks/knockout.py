"""What `knockout` costs against one masked forward for each path and window.

    python -m benchmarks.knockout --naive 12

The model of the sweep's benchmark (24 layers; 32 system, 576 visual, 32 instruction tokens). Both sides run in one
process, alternating; the masked forwards are timed on a sample of the windows and scaled to all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from benchmarks.common import extra_mib, machine, measured_apart, random_llava, random_prompts
from dyvte import exit_sweep, knockout
from dyvte.batch import Batch
from dyvte.instrument.causal import all_windows
from dyvte.instrument.causal.groups import group_masks
from dyvte.mllm import MLLM

WIDTH, SWEEP = 4, "exit sweep"
PATHS = [("question", "visual"), ("question", "question"), ("last", "visual"), ("last", "question")]


@torch.no_grad()
def masked_forward(
    mllm: MLLM, batch: Batch, path: tuple[str, str], window: tuple[int, int], invert: bool
) -> torch.Tensor:
    """Logits [B, vocab] at the prompt's end of one full forward with an edited mask."""
    groups, length = group_masks(batch.layout), batch["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    cut = groups[path[0]][:, :, None] & groups[path[1]][:, None, :] & ~torch.eye(length, dtype=torch.bool)
    mask = (causal & ~cut)[:, None]

    def edit(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    layers = [each for each in range(mllm.num_layers) if (window[0] <= each < window[1]) != invert]
    handles = [mllm.layers[each].register_forward_pre_hook(edit, with_kwargs=True) for each in layers]
    try:
        return mllm.model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


def calls(num_layers: int) -> dict[str, tuple[list[tuple[str, str]], list[tuple[int, int]], bool]]:
    """What is measured, by name: paths, windows, inverted or not."""
    of_width = [(start, min(start + WIDTH, num_layers)) for start in range(num_layers)]
    return {
        "96 knock-outs of width 4": (PATHS, of_width, False),
        "entry x exit map": ([("instruction", "visual")], all_windows(num_layers), True),
        "image -> image, width 4": ([("visual", "visual")], of_width, False),
    }


def model_and_prompt(options: argparse.Namespace) -> tuple[Any, Any]:
    """The sweep benchmark's model, and one prompt."""
    mllm = random_llava(options.layers, options.hidden, min(128, options.hidden), vocabulary=32064)
    return mllm, random_prompts(mllm, 1, 32, 32)


@torch.no_grad()
def measure_memory(options: argparse.Namespace) -> float:
    """MiB that one call (or the sweep) needs at most above what the process held before."""
    mllm, batch = model_and_prompt(options)
    mllm.model(**batch, use_cache=False, logits_to_keep=1)  # warm up
    if options.memory_of == SWEEP:
        return extra_mib(lambda: exit_sweep(mllm, batch))
    paths, windows, invert = calls(options.layers)[options.memory_of]
    return extra_mib(lambda: knockout(mllm, batch, None, paths, windows, invert, keep_logits=False))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--naive", type=int, default=12, help="masked forwards that are timed")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # what a child process measures
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(measure_memory(options)))
        return
    print(machine())
    sizes = ["--layers", str(options.layers), "--hidden", str(options.hidden)]
    memory = {
        name: measured_apart("benchmarks.knockout", ["--memory-of", name, *sizes])
        for name in (SWEEP, *calls(options.layers))
    }
    for name, mib in memory.items():
        print(f"peak memory, {name}: {mib:.0f} MiB, {mib / memory[SWEEP]:.2f}x the sweep's", flush=True)
    mllm, batch = model_and_prompt(options)
    for name, (paths, windows, invert) in calls(options.layers).items():
        jobs = [(p, w) for p in range(len(paths)) for w in range(len(windows))]
        chosen = jobs[:: max(1, len(jobs) // options.naive)]
        half = len(chosen) // 2
        naive, fast, worst = 0.0, [], 0.0
        for part in (chosen[:half], chosen[half:]):
            start = time.perf_counter()
            cut = knockout(mllm, batch, None, paths, windows, invert)
            fast.append(time.perf_counter() - start)
            assert cut.logits is not None
            for p, w in part:
                start = time.perf_counter()
                logits = masked_forward(mllm, batch, paths[p], windows[w], invert)
                naive += time.perf_counter() - start
                worst = max(worst, (logits - cut.logits[:, p, w]).abs().max().item())
        whole = naive / len(chosen) * len(jobs)
        print(
            f"{name}: {min(fast):.2f} s against {whole:.1f} s, {whole / min(fast):.1f}x; logits within {worst:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
