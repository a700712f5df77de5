"""What `exit_sweep` costs against one run per exit, the way VTW's search does it.

    python -m analysis.bench_sweep            # measures everything, writes docs/benchmarks/sweep.md (about 3 minutes)

A random decoder in LLaVA's proportions answers from 32 system, 576 visual and 32 instruction tokens, in one process:

  (a) one forward under `FixedExit(k)` for every k = 0..L,
  (b) one `exit_sweep` of the same prompt,
  (c) one `exit_sweep` of eight questions on one image.

Memory is the peak of a process of its own during one call, above what it held before, against a plain forward that
fills a KV cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from dyvte import FixedExit, exit_sweep, wrap
from dyvte.mllm import MLLM, Batch

SYSTEM_TOKENS, INSTRUCTION_TOKENS = 32, 32
PATCHES_PER_SIDE = 24  # 576 visual tokens, as in LLaVA-1.5
QUESTIONS = 8
IMAGE_TOKEN, FIRST_TEXT = 1, 2
INTERMEDIATE_RATIO = 11008 / 4096  # of the LLaMA decoder in LLaVA-1.5
REPORT = Path("docs/benchmarks/sweep.md")
MEMORY_MODES = ("plain", "sweep", "sweep_shared")


def build(options: argparse.Namespace) -> MLLM:
    """A random LLaVA with a vision tower too small to matter."""
    heads = options.hidden // options.head_size
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            intermediate_size=int(options.hidden * INTERMEDIATE_RATIO),
            num_hidden_layers=options.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
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
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, options.dtype))
    return wrap(model.to(options.device))


def make_batch(mllm: MLLM, questions: int) -> Batch:
    """Prompts that ask different questions about one image."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, size = mllm.text_config.vocab_size, 2 * PATCHES_PER_SIDE

    def text(rows: int, length: int) -> torch.Tensor:
        return torch.randint(FIRST_TEXT, vocabulary, (rows, length), generator=generator)

    prefix = torch.cat([text(1, SYSTEM_TOKENS), torch.full((1, PATCHES_PER_SIDE**2), IMAGE_TOKEN)], dim=1)
    image = torch.randn(1, 3, size, size, generator=generator)
    return mllm.batch(
        input_ids=torch.cat([prefix.expand(questions, -1), text(questions, INSTRUCTION_TOKENS)], dim=1),
        pixel_values=image.expand(questions, -1, -1, -1),
    )


@torch.no_grad()
def one_exit(mllm: MLLM, batch: Batch, layer: int) -> torch.Tensor:
    """Next-token logits [B, vocab] of one run under one exit."""
    with FixedExit(layer=layer)(mllm):
        return mllm.model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way, by round; and how far the logits of (b) are from those of (a).

    Within a round the runs of (a) are spread between those of the others, so that all of them meet the same machine.
    """
    mllm = build(options)
    one, many = make_batch(mllm, 1), make_batch(mllm, QUESTIONS)
    exits = range(mllm.num_layers + 1)

    @torch.no_grad()
    def plain() -> None:
        mllm.model(**one, use_cache=True, logits_to_keep=1)

    others: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "b": lambda: exit_sweep(mllm, one),
        "b_no_entropy": lambda: exit_sweep(mllm, one, entropy=False),
        "c": lambda: exit_sweep(mllm, many, shared_image=[0] * QUESTIONS),
    }

    def seconds_of(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    naive = torch.stack([one_exit(mllm, one, layer) for layer in exits], dim=1)
    difference = (naive - others["b"]().logits).abs().max().item()
    others["c"]()
    rounds = []
    for index in range(options.repeats):
        seconds: dict[str, Any] = {"a": [0.0] * len(exits), **{name: [] for name in others}}
        order = list(others)
        for step, layer in enumerate(exits):
            seconds["a"][layer] = seconds_of(lambda layer=layer: one_exit(mllm, one, layer))  # type: ignore[misc]
            if step % (len(exits) // len(others)) == 0 and order:
                name = order.pop(index % len(order))
                seconds[name].append(seconds_of(others[name]))
                if name != "c":
                    seconds[name].append(seconds_of(others[name]))
        rounds.append(seconds)
        print({name: round(value, 3) for name, value in best_times(rounds).items()}, file=sys.stderr, flush=True)
    return {"rounds": rounds, "difference": difference}


@torch.no_grad()
def measure_memory(options: argparse.Namespace, mode: str) -> float:
    """MiB that the process needs at most during one call, above what it held before."""
    mllm = build(options)
    batch = make_batch(mllm, QUESTIONS if mode == "sweep_shared" else 1)
    on_gpu = options.device != "cpu"
    warm_up = make_batch(mllm, 1)
    warm_up["input_ids"] = warm_up["input_ids"][:, :SYSTEM_TOKENS]
    mllm.model(input_ids=warm_up["input_ids"])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # restarts the kernel's record of the peak
        before = _resident_mib("VmRSS")
    if mode == "plain":
        result: Any = mllm.model(**batch, use_cache=True, logits_to_keep=1)
    else:
        result = exit_sweep(mllm, batch, shared_image=[0] * QUESTIONS if mode == "sweep_shared" else None)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else _resident_mib("VmHWM")
    del result
    return peak - before


def _resident_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}; memory is measured on Linux only")


def _in_fresh_process(*arguments: str) -> Any:
    command = [sys.executable, "-m", "analysis.bench_sweep", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def unique_layer_work(layers: int) -> tuple[float, float]:
    """Bounds on the ratios (b) and (c) from token-layers alone, attention's shorter rows not counted."""
    tokens = SYSTEM_TOKENS + PATCHES_PER_SIDE**2 + INSTRUCTION_TOKENS
    text = SYSTEM_TOKENS + INSTRUCTION_TOKENS
    naive = sum(k * tokens + (layers - k) * text for k in range(layers + 1))
    branches = layers * (layers + 1) // 2 * INSTRUCTION_TOKENS
    prefix = layers * (tokens - INSTRUCTION_TOKENS)
    own = layers * INSTRUCTION_TOKENS
    return naive / (prefix + own + branches), naive / (prefix / QUESTIONS + own + branches)


def best_times(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Shortest time of every run over all rounds; (a) is the sum over its runs."""
    best = {name: min(min(each[name]) for each in rounds) for name in rounds[0] if name != "a"}
    return {"a": sum(map(min, zip(*(each["a"] for each in rounds), strict=True))), **best}


def median_times(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Median time of every run over all rounds; (a) is the sum over its runs."""
    middle = {
        name: statistics.median(value for each in rounds for value in each[name]) for name in rounds[0] if name != "a"
    }
    return {"a": sum(map(statistics.median, zip(*(each["a"] for each in rounds), strict=True))), **middle}


def report(options: argparse.Namespace, times: dict[str, Any], memory: dict[str, float]) -> str:
    """The measurements as Markdown."""
    best, middle = best_times(times["rounds"]), median_times(times["rounds"])

    def row(label: str, name: str, questions: int, bound: float | None) -> str:
        ratios = [each["a"] * questions / each[name] for each in (best, middle)]
        limit = "" if bound is None else f"{bound:.1f}"
        return (
            f"| {label} | {best[name] / questions:.3f} | {middle[name] / questions:.3f} | {ratios[0]:.1f} | "
            f"{ratios[1]:.1f} | {limit} |"
        )

    bound_b, bound_c = unique_layer_work(options.layers)
    lines = [
        "# Cost of exit_sweep",
        "",
        "Written by `python -m analysis.bench_sweep`.",
        "",
        f"{platform.processor() or platform.machine()}, {options.device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {options.dtype}, random weights: "
        f"{options.layers} layers, hidden {options.hidden}, heads of {options.head_size}, vocabulary "
        f"{options.vocabulary:,}; {SYSTEM_TOKENS} system + {PATCHES_PER_SIDE**2} visual + {INSTRUCTION_TOKENS} "
        "instruction tokens.",
        "",
        f"{len(times['rounds'])} rounds in one process; every round runs each way, with the {options.layers + 1} runs "
        "of (a) spread between the others. Best and median are taken run by run over the rounds; (a) is the sum of its "
        "runs. The bound counts tokens times layers; attention over shorter sequences is not in it, so a ratio may "
        "exceed it.",
        "",
        "| all exits of a question | best, s a question | median | faster than (a), by best | by median | bound |",
        "|---|---|---|---|---|---|",
        row("(a) one run per exit", "a", 1, None),
        row("(b) sweep", "b", 1, bound_b),
        row("(b) sweep without entropies", "b_no_entropy", 1, bound_b),
        row(f"(c) sweep, {QUESTIONS} questions an image", "c", QUESTIONS, bound_c),
        row("for scale: one plain forward with cache", "plain", 1, None),
        "",
        f"Largest difference between the logits of (a) and (b): {times['difference']:.1e}.",
        "",
        "| one call, in a process of its own | peak memory above that before, MiB | against plain |",
        "|---|---|---|",
    ]
    labels = ("plain forward with cache", "(b) sweep", f"(c) sweep, {QUESTIONS} questions")
    for label, mode in zip(labels, MEMORY_MODES, strict=True):
        lines.append(f"| {label} | {memory[mode]:,.0f} | {memory[mode] / memory['plain']:.2f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; on a GPU take --dtype bfloat16 and real widths")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--memory-of", choices=MEMORY_MODES, help=argparse.SUPPRESS)  # what a child process measures
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(measure_memory(options, options.memory_of)))
        return
    memory = {mode: _in_fresh_process("--memory-of", mode, *sys.argv[1:]) for mode in MEMORY_MODES}
    print(memory, file=sys.stderr, flush=True)
    text = report(options, measure_time(options), memory)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(options.output)


if __name__ == "__main__":
    main()
