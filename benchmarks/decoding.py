"""What a decoding step costs after visual tokens have left, against the unchanged model's.

    python -m benchmarks.decoding         # writes docs/benchmarks/decoding.md (about 5 minutes)

A random model of LLaVA-1.5's proportions decodes 8 rows after 576 and 2,880 visual tokens each. Every way of running
has prefilled once; then they take turns, one step each a round, and ratios are taken within a round.
"""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch

from analysis.statistics.markdown import markdown_table
from benchmarks import common
from benchmarks.common import QUESTION_TOKENS, SYSTEM_TOKENS, UNCHANGED
from benchmarks.dynamic_exit import ROWS, exits_of, mixed_exits
from dyvte import MLLM, Batch, FixedExit, Policy

IMAGES = (1, 5)
"""Images of 576 tokens in a prompt: LLaVA-1.5, and about as many as LLaVA-NeXT shows."""
REQUIRED = {1: "at most 1.05", 5: "below 1"}
WARM_UP = 2


@torch.no_grad()
def measure(mllm: MLLM, batch: Batch, ways: dict[str, Policy], rounds: int) -> list[dict[str, float]]:
    """Seconds of one step under every policy, round by round."""
    steps = {
        name: common.decoding_steps(mllm, batch, common.prefill(mllm, batch, policy), WARM_UP + rounds)
        for name, policy in ways.items()
    }

    def step_seconds(name: str) -> float:
        step = next(steps[name])
        with ways[name](mllm):
            return common.seconds_of(step, mllm.device)

    return common.in_turns({name: partial(step_seconds, name) for name in ways}, rounds, WARM_UP)


def table(images: int, rounds: list[dict[str, float]]) -> list[list[str]]:
    """Rows of the page: visual tokens, way of running, milliseconds, of the full model's step, what is required."""
    times = pd.DataFrame(rounds)
    full = times.columns[0]
    rows = []
    for name, seconds in times.items():
        ratio = common.spread(seconds / times[full], 3)
        compared = ["", ""] if name == full else [ratio, REQUIRED.get(images, "")]
        rows.append([f"{images * common.VISUAL_TOKENS:,}", str(name), common.spread(1e3 * seconds, 1), *compared])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the page."""
    parser = common.model_parser(__doc__, "decoding", layers=8)
    parser.add_argument("--images", type=int, nargs="+", default=list(IMAGES), help="of 576 tokens, in a prompt")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    mllm = common.model_of(options)
    rows: list[list[str]] = []
    exits: list[int] = []
    for images in options.images:
        batch = common.random_prompts(mllm, ROWS, images=images).to(mllm.device)
        mixed = mixed_exits(mllm, batch)
        ways = {
            "full model": UNCHANGED,
            "exit at half the depth": FixedExit(mllm.num_layers // 2),
            "mixed exits": mixed,
        }
        exits = exits or exits_of(mllm, batch, mixed)
        rows += table(images, measure(mllm, batch, ways, options.rounds))
    lines = common.paragraphs(
        "# A decoding step after visual tokens have left",
        "Written by `python -m benchmarks.decoding`. What the steps dispatch: [counts](counts.md).",
        f"{common.model_note(options)}; {ROWS} rows, {SYSTEM_TOKENS} system and {QUESTION_TOKENS} question tokens "
        f"around the images; mixed exits are at {exits} for the shorter prompts. Median of {options.rounds} rounds "
        "[quartiles].",
        markdown_table(["visual tokens", "", "step, ms", "of full", "required"], rows),
    )
    common.write_page(options.output, lines)


if __name__ == "__main__":
    main()
