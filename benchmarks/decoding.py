"""What a decoding step costs after visual tokens have left, against the unchanged model's.

    python -m benchmarks.decoding         # writes docs/benchmarks/decoding.md (about 5 minutes)

A random model of LLaVA-1.5's proportions decodes 8 rows after 576 and 2,880 visual tokens each. Every way of running
has prefilled once; then they take turns, one step each a round, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from analysis.statistics.markdown import markdown_table
from benchmarks.common import VISUAL_TOKENS, add_output, machine, random_llava, random_prompts, spread, write_page
from benchmarks.dynamic_exit import QUESTION_TOKENS, ROWS, SYSTEM_TOKENS, UNCHANGED, mixed_exits
from dyvte.batch import Batch
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.exits.dynamic_exit import DynamicExit
from dyvte.policies.exits.fixed_exit import FixedExit

IMAGES = (1, 5)
"""Images of 576 tokens in a prompt: LLaVA-1.5, and about as many as LLaVA-NeXT shows."""
REQUIRED = {1: "at most 1.05", 5: "below 1"}
WARM_UP = 2


def policies(mllm: MLLM, batch: Batch) -> dict[str, Policy]:
    """The unchanged model, an exit at half the depth, and exits spread over the depth."""
    return {
        "full model": UNCHANGED,
        "exit at half the depth": FixedExit(mllm.num_layers // 2),
        "mixed exits": mixed_exits(mllm, batch),
    }


@torch.no_grad()
def measure(mllm: MLLM, batch: Batch, ways: dict[str, Policy], rounds: int) -> list[dict[str, float]]:
    """Seconds of one step under every policy, round by round; the first rounds warm up and are left out."""
    device = mllm.device
    caches: dict[str, Any] = {}
    for name, policy in ways.items():
        with policy(mllm):
            caches[name] = mllm.model(**batch, use_cache=True, logits_to_keep=1).past_key_values
    mask, found = batch["attention_mask"], []
    for _ in range(WARM_UP + rounds):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        seconds = {}
        for name, policy in ways.items():
            with policy(mllm):
                start = _now(device)
                mllm.model(
                    input_ids=batch["input_ids"][:, -1:],
                    attention_mask=mask,
                    past_key_values=caches[name],
                    use_cache=True,
                )
                seconds[name] = _now(device) - start
        found.append(seconds)
    return found[WARM_UP:]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(images: int, rounds: list[dict[str, float]]) -> list[list[str]]:
    """Rows of the page: visual tokens, way of running, milliseconds, of the full model's step, what is required."""
    full, *others = rounds[0]
    rows = [[f"{images * VISUAL_TOKENS:,}", full, spread((1e3 * each[full] for each in rounds), 1), "", ""]]
    for name in others:
        ratio = spread((each[name] / each[full] for each in rounds), 3)
        times = spread((1e3 * each[name] for each in rounds), 1)
        rows.append([f"{images * VISUAL_TOKENS:,}", name, times, ratio, REQUIRED.get(images, "")])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--images", type=int, nargs="+", default=list(IMAGES), help="of 576 tokens, in a prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    add_output(parser, "decoding")
    options = parser.parse_args(arguments)
    dtype = torch.float32 if options.device == "cpu" else torch.float16
    mllm = random_llava(options.layers, options.hidden, options.head_size, device=options.device, dtype=dtype)
    rows: list[list[str]] = []
    exits: list[int] = []
    for images in options.images:
        batch = random_prompts(mllm, ROWS, SYSTEM_TOKENS, QUESTION_TOKENS, images=images).to(mllm.device)
        ways = policies(mllm, batch)
        exits = exits or exits_of(mllm, batch, ways["mixed exits"])
        rows += table(images, measure(mllm, batch, ways, options.rounds))
    lines = [
        "# A decoding step after visual tokens have left",
        "",
        "Written by `python -m benchmarks.decoding`. What the steps dispatch: [counts](counts.md).",
        "",
        f"{machine(options.device)}, {str(dtype).removeprefix('torch.')}, random weights: {options.layers} layers, "
        f"hidden {options.hidden}, heads of {options.head_size}; {ROWS} rows, {SYSTEM_TOKENS} system and "
        f"{QUESTION_TOKENS} question tokens around the images; mixed exits are at {exits} for the shorter prompts. "
        f"Median of {options.rounds} rounds [quartiles].",
        "",
        *markdown_table(["visual tokens", "", "step, ms", "of full", "required"], rows),
    ]
    write_page(options.output, lines)


@torch.no_grad()
def exits_of(mllm: MLLM, batch: Batch, policy: Policy) -> list[int]:
    """Exit layers of the rows, in order."""
    assert isinstance(policy, DynamicExit)
    with policy(mllm) as run:
        mllm.model(**batch, logits_to_keep=1)
    return sorted(run.exit_layers.tolist())


if __name__ == "__main__":
    main()
