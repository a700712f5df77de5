"""What fitting a FitPrune recipe costs in the proportions of a 7B model.

    python -m benchmarks.fitprune        # writes docs/benchmarks/fitprune.md (a few minutes on two cores)

A random decoder as deep as LLaVA-1.5-7B's and an eighth as wide sees 32 system, 576 visual and 32 instruction tokens.
Attention statistics of 64 samples are collected in batches, then a recipe is fitted for every budget.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from analysis.statistics.markdown import markdown_table
from benchmarks import common
from benchmarks.sweep import INSTRUCTION_TOKENS, SYSTEM_TOKENS
from dyvte import Batch
from dyvte.policies.pruning.fitprune import Recipe, Statistics, fit_recipe

LIMIT_SECONDS = 300
"""FitPrune's own claim for its search."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a plain forward, of the statistics by batch, and of fitting every budget; the recipes."""
    mllm = common.model_of(options)
    generator = torch.Generator().manual_seed(1)
    warm_up = common.random_prompts(mllm, 1, SYSTEM_TOKENS, INSTRUCTION_TOKENS, generator=generator)
    run = partial(mllm.model, **warm_up, use_cache=False, logits_to_keep=1)
    with torch.no_grad():
        plain = [common.seconds_of(run, mllm.device) for _ in range(3)]
    seconds: list[float] = []

    def batches() -> Iterator[Batch]:
        for start in range(0, options.samples, options.batch_size):
            rows = min(options.batch_size, options.samples - start)
            batch = common.random_prompts(mllm, rows, SYSTEM_TOKENS, INSTRUCTION_TOKENS, generator=generator)
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


def report(options: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    collecting, fits = sum(found["batches"]), found["fits"]
    slowest = max(each for each, _ in fits.values())
    total = collecting + slowest
    verdict = "under" if total < LIMIT_SECONDS else "**over**"
    steps = [
        ["attention statistics, all samples", f"{collecting:.1f}"],
        ["... a sample, median over batches", f"{statistics.median(found['batches']) / options.batch_size:.2f}"],
        ["for scale: a plain forward of one sample, median", f"{found['plain']:.2f}"],
    ]
    columns = ["budget (decoder FLOPs)", "fitting, s", "alpha", "cost of the recipe"]
    recipes = [
        [f"{budget:g}", f"{seconds:.2f}", f"{each.alpha:.3f}", f"{each.cost:.3f}", f"{100 * each.keep[-1]:.0f}%"]
        for budget, (seconds, each) in fits.items()
    ]
    return common.paragraphs(
        "# Cost of fitting a FitPrune recipe",
        "Written by `python -m benchmarks.fitprune`.",
        f"{common.model_note(options)}; {SYSTEM_TOKENS} system + {common.VISUAL_TOKENS} visual + {INSTRUCTION_TOKENS} "
        f"instruction tokens; {options.samples} samples in batches of {options.batch_size}.",
        f"Statistics and one recipe take {total:.0f} s, {verdict} the {LIMIT_SECONDS / 60:.0f} minutes that FitPrune's "
        "authors give for their search.",
        markdown_table(["step", "seconds"], steps),
        markdown_table([*columns, "visual tokens seen by the last layer"], recipes),
        "Random weights: the recipes say nothing about a trained model, the times do.",
    )


def main() -> None:
    """Measure, print and write the report."""
    parser = common.model_parser(__doc__, "fitprune", layers=32, head_size=128, vocabulary=32064)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.6, 0.5])
    options = parser.parse_args()
    common.write_page(options.output, report(options, measure(options)))


if __name__ == "__main__":
    main()
