"""Questions a second under policies, from the pixels to the last token of the answer.

    python -m benchmarks.end_to_end       # writes docs/benchmarks/end_to_end.md (about 15 minutes)

Questions with one image each through `generate` in batches of 8, with short (4 tokens) and long (64) answers, by a
random model of LLaVA-1.5's proportions. The policies take turns at every batch. Where the time of the full model goes,
before the decoder, in its prefill and in decoding, says what an exit can save at most.
"""

from __future__ import annotations

import pandas as pd
import torch

from analysis.cost import time_generation
from analysis.statistics.markdown import markdown_table
from benchmarks import common
from benchmarks.common import QUESTION_TOKENS, SYSTEM_TOKENS, UNCHANGED, VISUAL_TOKENS
from benchmarks.dynamic_exit import ROWS, mixed_exits
from dyvte import MLLM, Batch, FastV, FixedExit, Policy, ToMe
from dyvte.cost.flops import prefill_flops

ANSWER_TOKENS = (4, 64)
FULL = "full model"


def batches(mllm: MLLM, questions: int) -> list[Batch]:
    """Different questions about different images, by eights."""
    generator = torch.Generator().manual_seed(0)
    numbers = range(questions // ROWS)
    return [common.random_prompts(mllm, ROWS, generator=generator).to(mllm.device) for _ in numbers]


def policies(mllm: MLLM, batch: Batch) -> dict[str, Policy]:
    """The unchanged model and what the paper's Table 4 compares."""
    return {
        FULL: UNCHANGED,
        "exit at half the depth": FixedExit(mllm.num_layers // 2),
        "gates, mixed exits": mixed_exits(mllm, batch),
        "FastV(2, 0.5)": FastV(layer=2, keep=0.5),
        "ToMe(0.5)": ToMe(keep=0.5),
    }


@torch.no_grad()
def measure(mllm: MLLM, of_questions: list[Batch], answer_tokens: tuple[int, ...]) -> pd.DataFrame:
    """Seconds of every batch under every policy, with each length of answer.

    Returns:
        `tokens`, `method`, `batch`, the columns of `time_generation`, and `flops`, those of the prefill.
    """
    ways = policies(mllm, of_questions[0])
    for policy in ways.values():
        time_generation(mllm, of_questions[0], policy, 2)  # warms up
    rows = []
    for number, batch in enumerate(of_questions):
        for name, policy in ways.items():
            with policy(mllm):
                flops = prefill_flops(mllm, batch).total
            for tokens in answer_tokens:
                timed = time_generation(mllm, batch, policy, tokens)
                rows.append({"tokens": tokens, "method": name, "batch": number, "flops": flops, **timed})
    return pd.DataFrame(rows)


def table(measured: pd.DataFrame) -> list[list[str]]:
    """Rows of the page.

    Tokens of an answer, method, questions a second, of the full model's; time saved over what the FLOPs of the prefill
    predict (share of them saved, times the full model's prefill); and shares of the time.
    """
    rows = []
    whole = measured.assign(
        decoding=measured["decode_seconds"] * (measured["tokens"] - 1),
        prefill=measured["prefill_seconds"] - measured["vision_seconds"],
    )
    whole["seconds"] = whole["prefill_seconds"] + whole["decoding"]
    for tokens, of_length in whole.groupby("tokens", sort=False):
        sums = of_length.groupby("method", sort=False).sum()
        full, questions = sums.loc[FULL], ROWS * of_length["batch"].nunique()
        for method, own in sums.iterrows():
            predicted = (1 - own["flops"] / full["flops"]) * full["prefill_seconds"]
            saved = full["seconds"] - own["seconds"]
            shares = [100 * own[part] / own["seconds"] for part in ("vision_seconds", "prefill", "decoding")]
            rows.append(
                [
                    str(tokens),
                    str(method),
                    f"{questions / own['seconds']:.2f}",
                    f"{full['seconds'] / own['seconds']:.2f}",
                    f"{saved / predicted:.2f}" if predicted else "",
                    " / ".join(f"{share:.0f}" for share in shares),
                ]
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the page."""
    parser = common.model_parser(__doc__, "end_to_end", layers=16)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, nargs="+", default=list(ANSWER_TOKENS))
    options = parser.parse_args(arguments)
    mllm = common.model_of(options)
    measured = measure(mllm, batches(mllm, options.questions), tuple(options.answer_tokens))
    columns = ["answer, tokens", "", "questions/s", "of full", "saved, of predicted", "vision / prefill / decoding, %"]
    lines = common.paragraphs(
        "# Questions a second",
        "Written by `python -m benchmarks.end_to_end`.",
        f"{common.model_note(options)}; {options.questions} questions of {SYSTEM_TOKENS} system, {VISUAL_TOKENS} "
        f"visual and {QUESTION_TOKENS} question tokens in batches of {ROWS}. *Saved, of predicted*: time saved over "
        "the share of the prefill's FLOPs saved times the full model's prefill; what decoding saves comes on top. "
        "Vision is the tower (of one layer here), the projector and the embedding.",
        markdown_table(columns, table(measured)),
    )
    common.write_page(options.output, lines)


if __name__ == "__main__":
    main()
