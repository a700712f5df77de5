"""What `knockout` costs against one masked forward for each path and window.

    python -m benchmarks.knockout --naive 4  # writes the table of docs/causes.md

The model of the sweep's benchmark (24 layers; 32 system, 576 visual, 32 instruction tokens). Both sides run in one
process, alternating; the masked forwards are timed on a sample of the windows and scaled to all of them. Memory is the
peak of a process of its own during one call, above what it held before, beside that of one exit sweep.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from analysis.statistics.markdown import markdown_table
from benchmarks import common
from dyvte import MLLM, Batch, exit_sweep, knockout
from dyvte.instrument.causal import all_windows
from dyvte.instrument.causal.groups import group_masks

WIDTH, SWEEP = 4, "exit sweep"
SYSTEM_TOKENS, QUESTION_TOKENS = 32, 32
SECTION = "what knock-out costs"
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
        f"{len(PATHS)} paths, width {WIDTH}": (PATHS, of_width, False),
        "entry x exit map": ([("instruction", "visual")], all_windows(num_layers), True),
        f"visual -> visual, width {WIDTH}": ([("visual", "visual")], of_width, False),
    }


def model_and_prompt(options: argparse.Namespace) -> tuple[Any, Any]:
    """The sweep benchmark's model, and one prompt."""
    mllm = common.random_llava(options.layers, options.hidden, min(128, options.hidden), vocabulary=32064)
    return mllm, common.random_prompts(mllm, 1, SYSTEM_TOKENS, QUESTION_TOKENS)


@torch.no_grad()
def measure_memory(options: argparse.Namespace, name: str) -> float:
    """MiB that one call (or the sweep) needs at most above what the process held before."""
    mllm, batch = model_and_prompt(options)
    mllm.model(**batch, use_cache=False, logits_to_keep=1)  # warm up
    if name == SWEEP:
        return common.extra_mib(lambda: exit_sweep(mllm, batch))
    paths, windows, invert = calls(options.layers)[name]
    return common.extra_mib(lambda: knockout(mllm, batch, None, paths, windows, invert, keep_logits=False))


def measure_time(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of both sides by call, how many knock-outs they are, and how far their logits are apart."""
    mllm, batch = model_and_prompt(options)
    found = {}
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
        found[name] = {"number": len(jobs), "call": min(fast), "forwards": whole, "difference": worst}
        print(name, found[name], flush=True)
    return found


def report(options: argparse.Namespace, times: dict[str, dict[str, float]], memory: dict[str, float]) -> list[str]:
    """The lines of the section."""
    rows = [
        [
            *(name, f"{each['number']:.0f}", f"{each['call']:.1f} s", f"{each['forwards']:.1f} s"),
            *(
                f"{each['forwards'] / each['call']:.1f}",
                f"{memory[name]:.0f} MiB, {memory[name] / memory[SWEEP]:.2f} x",
            ),
        ]
        for name, each in times.items()
    ]
    worst = max(each["difference"] for each in times.values())
    columns = ["what", "knock-outs", "one call", "one masked forward each"]
    return common.paragraphs(
        f"Measured on {common.machine()}: {options.layers} layers of width {options.hidden}; {SYSTEM_TOKENS} system, "
        f"{common.VISUAL_TOKENS} visual and {QUESTION_TOKENS} question tokens. The slow side was timed on about "
        f"{options.naive} masked forwards a line and scaled up. Memory is beside that of one exit sweep, "
        f"{memory[SWEEP]:.0f} MiB. The logits of both sides differ by {worst:.0e} at most.",
        markdown_table([*columns, "ratio", "peak memory, the sweep's = 1"], rows),
    )


def main() -> None:
    """Measure, print and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--naive", type=int, default=12, help="masked forwards that are timed")
    parser.add_argument("--page", type=Path, default=Path("docs/causes.md"), help="default: %(default)s")
    options = parser.parse_args()
    memory = {}
    for name in (SWEEP, *calls(options.layers)):
        memory[name] = common.measured_apart(measure_memory, options, name)
        print(f"peak memory, {name}: {memory[name]:.0f} MiB, {memory[name] / memory[SWEEP]:.2f} x", flush=True)
    common.write_section(options.page, SECTION, report(options, measure_time(options), memory))


if __name__ == "__main__":
    main()
