"""What fitting a FitPrune recipe costs in the proportions of a 7B model.

    python -m analysis.bench_fitprune        # writes docs/benchmarks/fitprune.md (a few minutes on two cores)

A random decoder as deep as LLaVA-1.5-7B's and an eighth as wide sees 32 system, 576 visual and 32 instruction tokens.
Attention statistics of 64 samples are collected in batches, then a recipe is fitted for every budget.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from analysis.bench_sweep import (
    FIRST_TEXT,
    IMAGE_TOKEN,
    INSTRUCTION_TOKENS,
    PATCHES_PER_SIDE,
    SYSTEM_TOKENS,
    build,
)
from dyvte.mllm import MLLM, Batch
from dyvte.policies.fitprune import Recipe, Statistics, fit_recipe
from dyvte.store import write_atomic

REPORT = Path("docs/benchmarks/fitprune.md")
LIMIT_SECONDS = 300
"""FitPrune's own claim for its search."""


def make_batch(mllm: MLLM, rows: int, generator: torch.Generator) -> Batch:
    """Random prompts, each with an image of its own."""
    side = 2 * PATCHES_PER_SIDE

    def text(length: int) -> torch.Tensor:
        return torch.randint(FIRST_TEXT, mllm.text_config.vocab_size, (rows, length), generator=generator)

    image = torch.full((rows, PATCHES_PER_SIDE**2), IMAGE_TOKEN)
    return mllm.batch(
        input_ids=torch.cat([text(SYSTEM_TOKENS), image, text(INSTRUCTION_TOKENS)], dim=1),
        pixel_values=torch.randn(rows, 3, side, side, generator=generator),
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a plain forward, of the statistics by batch, and of fitting every budget; the recipes."""
    mllm = build(options)
    generator = torch.Generator().manual_seed(1)
    warm_up = make_batch(mllm, 1, generator)
    plain = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            mllm.model(**warm_up, use_cache=False, logits_to_keep=1)
            plain.append(time.perf_counter() - started)
    seconds: list[float] = []

    def batches() -> Iterator[Batch]:
        for start in range(0, options.samples, options.batch_size):
            batch = make_batch(mllm, min(options.batch_size, options.samples - start), generator)
            started = time.perf_counter()
            yield batch
            seconds.append(time.perf_counter() - started)  # what the statistics took with it
            print(f"batch {len(seconds)}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)

    found = Statistics.collect(mllm, batches())
    fits: dict[float, tuple[float, Recipe]] = {}
    for budget in options.budgets:
        started = time.perf_counter()
        recipe = fit_recipe(mllm, found, budget)
        fits[budget] = (time.perf_counter() - started, recipe)
    return {"plain": statistics.median(plain[1:]), "batches": seconds, "fits": fits}


def report(options: argparse.Namespace, found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    collecting, fits = sum(found["batches"]), found["fits"]
    slowest = max(each for each, _ in fits.values())
    total = collecting + slowest
    verdict = "under" if total < LIMIT_SECONDS else "**over**"
    lines = [
        "# Cost of fitting a FitPrune recipe",
        "",
        "Written by `python -m analysis.bench_fitprune`.",
        "",
        f"{platform.processor() or platform.machine()}, {options.device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {options.dtype}, random weights: "
        f"{options.layers} layers, hidden {options.hidden}, heads of {options.head_size}; {SYSTEM_TOKENS} system + "
        f"{PATCHES_PER_SIDE**2} visual + {INSTRUCTION_TOKENS} instruction tokens; {options.samples} samples in batches "
        f"of {options.batch_size}.",
        "",
        f"Statistics and one recipe take {total:.0f} s, {verdict} the {LIMIT_SECONDS / 60:.0f} minutes that FitPrune's "
        "authors give for their search.",
        "",
        "| step | seconds |",
        "|---|---|",
        f"| attention statistics, all samples | {collecting:.1f} |",
        f"| ... a sample, median over batches | {statistics.median(found['batches']) / options.batch_size:.2f} |",
        f"| for scale: a plain forward of one sample, median | {found['plain']:.2f} |",
        "",
        "| budget (decoder FLOPs) | fitting, s | alpha | cost of the recipe | visual tokens seen by the last layer |",
        "|---|---|---|---|---|",
    ]
    for budget, (seconds, recipe) in fits.items():
        lines.append(
            f"| {budget:g} | {seconds:.2f} | {recipe.alpha:.3f} | {recipe.cost:.3f} | {100 * recipe.keep[-1]:.0f}% |"
        )
    lines += ["", "Random weights: the recipes say nothing about a trained model, the times do."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.6, 0.5])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=REPORT)
    options = parser.parse_args()
    text = report(options, measure(options))
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.output, lambda out: out.write(text.encode()))


if __name__ == "__main__":
    main()
