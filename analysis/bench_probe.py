"""What the attention probe costs: the time of a probed forward, and its memory against `output_attentions=True`.

    python -m analysis.bench_probe            # measures everything, writes docs/benchmarks/probe.md (about 3 minutes)

Time: random decoders of LLaVA-1.5's proportions at 576 visual and 64 text tokens; plain and probed forwards alternate
in one process. Memory: the peak of the process during one forward at LLaVA-NeXT's 2,880 visual and 64 text tokens; each
way of running has a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from dyvte import AttentionProbe, wrap
from dyvte.mllm import MLLM, Batch

SYSTEM_TOKENS, QUESTION_TOKENS = 35, 29
PATCHES_PER_SIDE = 24  # 576 visual tokens an image, as in LLaVA-1.5
IMAGE_TOKEN, FIRST_TEXT, VOCABULARY = 1, 2, 512
HEAD_SIZE = 128
INTERMEDIATE_RATIO = 11008 / 4096  # of the LLaMA decoder in LLaVA-1.5
REPORT = Path("docs/benchmarks/probe.md")
MEMORY_MODES = ("plain", "probe", "output_attentions")


def build(hidden: int, num_layers: int, attn_implementation: str) -> MLLM:
    """A random LLaVA with a vision tower too small to matter."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=int(hidden * INTERMEDIATE_RATIO),
            num_hidden_layers=num_layers,
            num_attention_heads=hidden // HEAD_SIZE,
            num_key_value_heads=hidden // HEAD_SIZE,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            patch_size=2,
            image_size=2 * PATCHES_PER_SIDE,
        ),
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    return wrap(
        transformers.AutoModelForImageTextToText.from_config(
            config, attn_implementation=attn_implementation, dtype=torch.float32
        )
    )


def make_batch(mllm: MLLM, num_images: int) -> Batch:
    """One prompt: 35 system tokens, the images, 29 question tokens."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> torch.Tensor:
        return torch.randint(FIRST_TEXT, VOCABULARY, (1, length), generator=generator)

    image = torch.full((1, num_images * PATCHES_PER_SIDE**2), IMAGE_TOKEN)
    size = 2 * PATCHES_PER_SIDE
    return mllm.batch(
        input_ids=torch.cat([text(SYSTEM_TOKENS), image, text(QUESTION_TOKENS)], dim=1),
        pixel_values=torch.randn(num_images, 3, size, size, generator=generator),
    )


@torch.no_grad()
def measure_time(hidden: int, num_layers: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of plain and probed forwards, alternating, with the ratios pair by pair.

    Beside elapsed time, the ratio of processor time, which a busy machine disturbs less.
    """
    mllm = build(hidden, num_layers, "sdpa")
    batch = make_batch(mllm, num_images=1)

    def forward(probed: bool) -> tuple[float, float]:
        with AttentionProbe(mllm) if probed else contextlib.nullcontext():
            start = time.perf_counter(), time.process_time()
            mllm.model(**batch, use_cache=False)
            return 1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])

    for probed in (False, True):
        forward(probed)
    pairs = []
    for index in range(repeats):
        first = bool(index % 2)  # neither side always comes first
        times = {first: forward(first), not first: forward(not first)}
        pairs.append((times[False], times[True]))
    return {
        "hidden": hidden,
        "layers": num_layers,
        "tokens": batch["input_ids"].shape[1],
        "repeats": repeats,
        "plain": statistics.quantiles(plain[0] for plain, _ in pairs),
        "probed": statistics.quantiles(probed[0] for _, probed in pairs),
        "ratio": statistics.quantiles(probed[0] / plain[0] for plain, probed in pairs),
        "processor_ratio": statistics.quantiles(probed[1] / plain[1] for plain, probed in pairs),
    }


@torch.no_grad()
def measure_memory(mode: str, hidden: int, num_layers: int) -> dict[str, Any]:
    """MiB that the process needs at most during one forward, above what it held before."""
    mllm = build(hidden, num_layers, "eager" if mode == "output_attentions" else "sdpa")
    batch = make_batch(mllm, num_images=5)
    warm_up = make_batch(mllm, num_images=1)
    mllm.model(**warm_up, use_cache=False)
    with AttentionProbe(mllm) if mode == "probe" else contextlib.nullcontext():
        Path("/proc/self/clear_refs").write_text("5")  # restarts the kernel's record of the peak
        before = _resident_mib("VmRSS")
        output = mllm.model(**batch, use_cache=False, output_attentions=mode == "output_attentions")
        peak = _resident_mib("VmHWM")
    del output
    return {"mode": mode, "hidden": hidden, "layers": num_layers, "extra_mib": peak - before}


def _resident_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}; memory is measured on Linux only")


def _in_fresh_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "analysis.bench_probe", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(times: list[dict[str, Any]], memory: dict[str, dict[str, Any]]) -> str:
    """The measurements as Markdown."""

    def spread(quartiles: list[float], digits: int) -> str:
        low, middle, high = (f"{value:.{digits}f}" for value in quartiles)
        return f"{middle} ({low} to {high})"

    lines = [
        "# Cost of AttentionProbe",
        "",
        "Written by `python -m analysis.bench_probe`.",
        "",
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, float32, random weights in LLaVA-1.5's proportions (head size "
        f"{HEAD_SIZE}).",
        "",
        "## Time",
        "",
        "One forward, median (quartiles); plain sdpa and probed forwards alternate in one process, ratios are taken "
        "pair by pair. Processor time is less disturbed by other work on the machine.",
        "",
        "| hidden | layers | tokens | pairs | plain sdpa, ms | probed, ms | ratio | ratio of processor time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['hidden']} | {row['layers']} | {row['tokens']} | {row['repeats']} | {spread(row['plain'], 0)} | "
        f"{spread(row['probed'], 0)} | {spread(row['ratio'], 3)} | "
        f"{spread(row['processor_ratio'], 3)} |"
        for row in times
    ]
    plain, probe, maps = (memory[mode]["extra_mib"] for mode in MEMORY_MODES)
    shape = memory["plain"]
    heads, tokens = shape["hidden"] // HEAD_SIZE, 5 * PATCHES_PER_SIDE**2 + SYSTEM_TOKENS + QUESTION_TOKENS
    lines += [
        "",
        "## Memory",
        "",
        f"Peak resident memory during one forward of {tokens:,} tokens above that before it; hidden {shape['hidden']}, "
        f"{shape['layers']} layers, {heads} heads. The maps alone are layers x heads x tokens^2 x 4 bytes = "
        f"{shape['layers'] * heads * tokens**2 * 4 / 2**20:,.0f} MiB; they grow with the number of layers, what the "
        "probe needs hardly does. Differences of a few MiB either way are the allocator's.",
        "",
        "| forward | peak, MiB | above plain, MiB | share |",
        "|---|---|---|---|",
        f"| plain sdpa | {plain:,.0f} | | |",
        f"| with AttentionProbe | {probe:,.0f} | {probe - plain:,.0f} | {(probe - plain) / (maps - plain):.1%} |",
        f"| `output_attentions=True` (eager) | {maps:,.0f} | {maps - plain:,.0f} | 100% |",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of forwards for each width")
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--memory-of", choices=MEMORY_MODES, help=argparse.SUPPRESS)  # what a child process measures
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, hidden=1024, num_layers=8)))
        return
    times = []
    for hidden, num_layers in ((1024, 6), (2048, 3)):
        times.append(measure_time(hidden, num_layers, options.repeats))
        print(times[-1], flush=True)
    memory = {}
    for mode in MEMORY_MODES:
        memory[mode] = _in_fresh_process("--memory-of", mode)
        print(memory[mode], flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_suffix(".partial")
    partial.write_text(report(times, memory))
    partial.replace(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
