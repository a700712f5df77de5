"""What the attention probe costs: the time of a probed forward, and its memory against `output_attentions=True`.

    python -m benchmarks.probe            # measures everything, writes docs/benchmarks/probe.md (about 3 minutes)

Time: random decoders of LLaVA-1.5's proportions at 576 visual and 64 text tokens; plain and probed forwards alternate
in one process. Memory: the peak of the process during one forward at LLaVA-NeXT's 2,880 visual and 64 text tokens; each
way of running has a process of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from analysis.statistics.markdown import markdown_table
from benchmarks import common
from dyvte import AttentionProbe

HEAD_SIZE = 128
WAYS = {"plain": "plain sdpa", "probed": "probe", "contributions": "probe with contributions"}
MEMORY_MODES = ("plain", "probe", "output_attentions")


@torch.no_grad()
def measure_time(hidden: int, num_layers: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of plain and probed forwards, without and with contributions, in turns, and ratios round by round.

    Beside elapsed time, the ratio of processor time, which a busy machine disturbs less.
    """
    mllm = common.random_llava(num_layers, hidden, HEAD_SIZE)
    batch = common.random_prompts(mllm, 1)

    ways: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "plain": contextlib.nullcontext,
        "probed": partial(AttentionProbe, mllm),
        "contributions": partial(AttentionProbe, mllm, contributions=True),
    }

    def forward(way: str) -> tuple[float, float]:
        with ways[way]():
            start = time.perf_counter(), time.process_time()
            mllm.model(**batch, use_cache=False)
            return 1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])

    for way in ways:
        forward(way)
    names = list(ways)
    rounds = []
    for index in range(repeats):
        shift = index % len(names)  # no way always comes first
        times = {way: forward(way) for way in names[shift:] + names[:shift]}
        rounds.append(times)
    return {
        "hidden": hidden,
        "layers": num_layers,
        "tokens": batch["input_ids"].shape[1],
        "repeats": repeats,
        **{way: [times[way][0] for times in rounds] for way in names},
        "ratio": {way: [t[way][0] / t["plain"][0] for t in rounds] for way in names[1:]},
        "processor_ratio": {way: [t[way][1] / t["plain"][1] for t in rounds] for way in names[1:]},
    }


@torch.no_grad()
def measure_memory(mode: str, hidden: int, num_layers: int) -> dict[str, Any]:
    """MiB that the process needs at most during one forward, above what it held before."""
    attention = "eager" if mode == "output_attentions" else "sdpa"
    mllm = common.random_llava(num_layers, hidden, HEAD_SIZE, attn_implementation=attention)
    batch = common.random_prompts(mllm, 1, images=5)
    mllm.model(**common.random_prompts(mllm, 1), use_cache=False)  # warm up
    with AttentionProbe(mllm) if mode == "probe" else contextlib.nullcontext():
        extra = common.extra_mib(
            lambda: mllm.model(**batch, use_cache=False, output_attentions=mode == "output_attentions")
        )
    return {"mode": mode, "hidden": hidden, "layers": num_layers, "extra_mib": extra}


def report(times: list[dict[str, Any]], memory: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of the page."""
    columns = ["hidden", "layers", "tokens", "rounds", "forward", "ms", "ratio", "of processor time"]
    rows = [
        [
            *(row[name] for name in ("hidden", "layers", "tokens", "repeats")),
            label,
            common.spread(row[way], 0),
            *(common.spread(row[name][way], 3) if way in row[name] else "" for name in ("ratio", "processor_ratio")),
        ]
        for row in times
        for way, label in WAYS.items()
    ]
    plain, probe, maps = (memory[mode]["extra_mib"] for mode in MEMORY_MODES)
    shape = memory["plain"]
    heads = shape["hidden"] // HEAD_SIZE
    tokens = 5 * common.VISUAL_TOKENS + common.SYSTEM_TOKENS + common.QUESTION_TOKENS
    above = [
        ["plain sdpa", f"{plain:,.0f}", "", ""],
        ["with AttentionProbe", f"{probe:,.0f}", f"{probe - plain:,.0f}", f"{(probe - plain) / (maps - plain):.1%}"],
        ["`output_attentions=True` (eager)", f"{maps:,.0f}", f"{maps - plain:,.0f}", "100%"],
    ]
    return common.paragraphs(
        "# Cost of AttentionProbe",
        "Written by `python -m benchmarks.probe`.",
        f"{common.machine()}, float32, random weights in LLaVA-1.5's proportions (head size {HEAD_SIZE}).",
        "## Time",
        "One forward, median [quartiles]; plain sdpa, probed forwards and such with contributions take turns in one "
        "process, ratios are to the plain one of the same round. Processor time is less disturbed by other work on the "
        "machine.",
        markdown_table(columns, rows),
        "## Memory",
        f"Peak resident memory during one forward of {tokens:,} tokens above that before it; hidden {shape['hidden']}, "
        f"{shape['layers']} layers, {heads} heads. The maps alone are layers x heads x tokens^2 x 4 bytes = "
        f"{shape['layers'] * heads * tokens**2 * 4 / 2**20:,.0f} MiB; they grow with the number of layers, what the "
        "probe needs hardly does. One process each: the same forward took up to 100 MiB more in some processes than in "
        "others, which is the allocator's, so a difference of that size between the first two says nothing.",
        markdown_table(["forward", "peak, MiB", "above plain, MiB", "share"], above),
    )


def main() -> None:
    """Measure, print and write the report."""
    parser = common.page_parser(__doc__, "probe")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of forwards for each width")
    options = parser.parse_args()
    times = []
    for hidden, num_layers in ((1024, 6), (2048, 3)):
        times.append(measure_time(hidden, num_layers, options.repeats))
        for way, ratios in times[-1]["ratio"].items():
            print(f"hidden {hidden}, {WAYS[way]}: ratio {common.quartiles(ratios)[1]:.3f}", flush=True)
    memory = {mode: common.measured_apart(measure_memory, mode, 1024, 8) for mode in MEMORY_MODES}
    common.write_page(options.output, report(times, memory))


if __name__ == "__main__":
    main()
