"""What `exit_sweep` costs against one run per exit, the way VTW's search does it.

    python -m benchmarks.sweep            # measures everything, writes docs/benchmarks/sweep.md (about 3 minutes)

A random decoder in LLaVA's proportions answers from 32 system, 576 visual and 32 instruction tokens, in one process:

  (a) one forward under `FixedExit(k)` for every k = 0..L,
  (b) one `exit_sweep` of the same prompt,
  (c) one `exit_sweep` of eight questions on one image.

Memory is the peak of a process of its own during one call, above what it held before, against a plain forward that
fills a KV cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from analysis.statistics.markdown import markdown_table
from benchmarks import common
from dyvte import MLLM, Batch, FixedExit, exit_sweep

SYSTEM_TOKENS, INSTRUCTION_TOKENS = 32, 32
QUESTIONS = 8
MEMORY_MODES = ("plain", "sweep", "sweep_shared")


def questions_about_one_image(mllm: MLLM, questions: int) -> Batch:
    """Prompts that ask different questions about one image."""
    return common.random_prompts(mllm, questions, SYSTEM_TOKENS, INSTRUCTION_TOKENS, same_image=True)


@torch.no_grad()
def one_exit(mllm: MLLM, batch: Batch, layer: int) -> torch.Tensor:
    """Next-token logits [B, vocab] of one run under one exit."""
    with FixedExit(layer=layer)(mllm):
        return mllm.model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way, by round; and how far the logits of (b) are from those of (a).

    Within a round the runs of (a) are spread between those of the others, so that all of them meet the same machine.
    """
    mllm = common.model_of(options)
    one, many = (questions_about_one_image(mllm, number) for number in (1, QUESTIONS))
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

    naive = torch.stack([one_exit(mllm, one, layer) for layer in exits], dim=1)
    difference = (naive - others["b"]().logits).abs().max().item()
    others["c"]()
    rounds = []
    for index in range(options.repeats):
        seconds: dict[str, Any] = {"a": [0.0] * len(exits), **{name: [] for name in others}}
        order = list(others)
        for step, layer in enumerate(exits):
            seconds["a"][layer] = common.seconds_of(partial(one_exit, mllm, one, layer), mllm.device)
            if step % (len(exits) // len(others)) == 0 and order:
                name = order.pop(index % len(order))
                times = 1 if name == "c" else 2
                seconds[name] += [common.seconds_of(others[name], mllm.device) for _ in range(times)]
        rounds.append(seconds)
        print({name: round(value, 3) for name, value in times_over(rounds, min).items()}, file=sys.stderr, flush=True)
    return {"rounds": rounds, "difference": difference}


@torch.no_grad()
def measure_memory(options: argparse.Namespace, mode: str) -> float:
    """MiB that the process needs at most during one call, above what it held before."""
    mllm = common.model_of(options)
    batch = questions_about_one_image(mllm, QUESTIONS if mode == "sweep_shared" else 1)
    mllm.model(**common.random_prompts(mllm, 1, SYSTEM_TOKENS, INSTRUCTION_TOKENS, images=0))  # warm up
    if mode == "plain":
        return common.extra_mib(lambda: mllm.model(**batch, use_cache=True, logits_to_keep=1), options.device)
    shared = [0] * QUESTIONS if mode == "sweep_shared" else None
    return common.extra_mib(lambda: exit_sweep(mllm, batch, shared_image=shared), options.device)


def unique_layer_work(layers: int) -> tuple[float, float]:
    """Bounds on the ratios (b) and (c) from token-layers alone, attention's shorter rows not counted."""
    tokens = SYSTEM_TOKENS + common.VISUAL_TOKENS + INSTRUCTION_TOKENS
    text = SYSTEM_TOKENS + INSTRUCTION_TOKENS
    naive = sum(k * tokens + (layers - k) * text for k in range(layers + 1))
    branches = layers * (layers + 1) // 2 * INSTRUCTION_TOKENS
    prefix = layers * (tokens - INSTRUCTION_TOKENS)
    own = layers * INSTRUCTION_TOKENS
    return naive / (prefix + own + branches), naive / (prefix / QUESTIONS + own + branches)


def times_over(rounds: list[dict[str, Any]], of: Callable[[Iterable[float]], float]) -> dict[str, float]:
    """The shortest (`min`) or median time of every run over all rounds; (a) is the sum over its runs."""
    others = {name: of(value for each in rounds for value in each[name]) for name in rounds[0] if name != "a"}
    return {"a": sum(map(of, zip(*(each["a"] for each in rounds), strict=True))), **others}


def report(options: argparse.Namespace, times: dict[str, Any], memory: dict[str, float]) -> list[str]:
    """The lines of the page."""
    best, middle = (times_over(times["rounds"], of) for of in (min, statistics.median))

    def row(label: str, name: str, questions: int, bound: float | None) -> list[str]:
        ratios = [each["a"] * questions / each[name] for each in (best, middle)]
        return [
            label,
            *(f"{each[name] / questions:.3f}" for each in (best, middle)),
            *(f"{ratio:.1f}" for ratio in ratios),
            "" if bound is None else f"{bound:.1f}",
        ]

    bound_b, bound_c = unique_layer_work(options.layers)
    columns = ["all exits of a question", "best, s a question", "median", "faster than (a), by best", "by median"]
    ways = [
        row("(a) one run per exit", "a", 1, None),
        row("(b) sweep", "b", 1, bound_b),
        row("(b) sweep without entropies", "b_no_entropy", 1, bound_b),
        row(f"(c) sweep, {QUESTIONS} questions an image", "c", QUESTIONS, bound_c),
        row("for scale: one plain forward with cache", "plain", 1, None),
    ]
    labels = ("plain forward with cache", "(b) sweep", f"(c) sweep, {QUESTIONS} questions")
    kept = [
        [label, f"{memory[mode]:,.0f}", f"{memory[mode] / memory['plain']:.2f}"]
        for label, mode in zip(labels, MEMORY_MODES, strict=True)
    ]
    return common.paragraphs(
        "# Cost of exit_sweep",
        "Written by `python -m benchmarks.sweep`.",
        f"{common.model_note(options)}, vocabulary {options.vocabulary:,}; {SYSTEM_TOKENS} system + "
        f"{common.VISUAL_TOKENS} visual + {INSTRUCTION_TOKENS} instruction tokens.",
        f"{len(times['rounds'])} rounds in one process; every round runs each way, with the {options.layers + 1} runs "
        "of (a) spread between the others. Best and median are taken run by run over the rounds; (a) is the sum of its "
        "runs. The bound counts tokens times layers; attention over shorter sequences is not in it, so a ratio may "
        "exceed it.",
        markdown_table([*columns, "bound"], ways),
        f"Largest difference between the logits of (a) and (b): {times['difference']:.1e}.",
        markdown_table(
            ["one call, in a process of its own", "peak memory above that before, MiB", "against plain"], kept
        ),
    )


def main() -> None:
    """Measure, print and write the report."""
    parser = common.model_parser(__doc__, "sweep", layers=24, head_size=128, vocabulary=32064)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    options = parser.parse_args()
    memory = {mode: common.measured_apart(measure_memory, options, mode) for mode in MEMORY_MODES}
    print(memory, file=sys.stderr, flush=True)
    common.write_page(options.output, report(options, measure_time(options), memory))


if __name__ == "__main__":
    main()
