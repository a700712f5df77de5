"""What a visual-token exit saves in wall-clock time.

    python -m benchmarks.dynamic_exit     # writes docs/benchmarks/dynamic_exit.md (about 3 minutes)

A random model of LLaVA-1.5's proportions sees 35 system, 576 visual and 29 question tokens. Measured: the prefill under
an exit at half the depth against what separately timed layers predict, the time that gates take, a batch of 8 with
mixed exits against the same questions one by one, and its decoding against the full model's. All of them take turns in
every round; ratios are taken within one. What the gates' deciding costs is also counted at LLaVA-1.5's own sizes, on
the meta device, and timed at a width at which matrix products fill the processor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import pandas as pd
import torch

from analysis.statistics.markdown import markdown_table
from benchmarks import common
from benchmarks.common import QUESTION_TOKENS, SYSTEM_TOKENS, UNCHANGED, paragraphs, prefill
from dyvte import MLLM, Batch, DynamicExit, FixedExit, FlopCounter, Gates, Policy, exit_probabilities
from dyvte.cost.flops import plan_decoder_flops, prefill_flops
from dyvte.cost.operators import Work, count_layers
from dyvte.instrument.states import token_status

ROWS = 8
STEPS = 8
NEARLY_NEVER = 1 - 1e-6
"""A threshold that no random gate reaches, but that the host cannot know of."""
LLAVA = {"LLaVA-1.5-7B": (32, 4096, 128), "LLaVA-1.5-13B": (40, 5120, 128)}
"""Layers, hidden size and head size of the decoders."""


def prefill_seconds(mllm: MLLM, batch: Batch, policy: Policy = UNCHANGED) -> float:
    """Of one prefill."""
    return common.seconds_of(partial(prefill, mllm, batch, policy), mllm.device)


@torch.no_grad()
def decode_seconds(mllm: MLLM, batch: Batch, policy: Policy = UNCHANGED) -> float:
    """Of one decoding step, the mean over `STEPS` after a prefill."""
    with policy(mllm):
        cache = mllm.model(**batch, use_cache=True, logits_to_keep=1).past_key_values

        def decode() -> None:
            for step in common.decoding_steps(mllm, batch, cache, STEPS):
                step()

        return common.seconds_of(decode, mllm.device) / STEPS


def layer_seconds(mllm: MLLM, batch: Batch) -> float:
    """That all decoder layers together take in a plain prefill."""
    marks: list[float] = []

    def mark(*_: object) -> None:
        marks.append(common.now(mllm.device))

    handles = [layer.register_forward_pre_hook(mark) for layer in mllm.layers]
    handles += [layer.register_forward_hook(mark) for layer in mllm.layers]
    prefill(mllm, batch)
    for handle in handles:
        handle.remove()
    return sum(marks[1::2]) - sum(marks[::2])


def gate_seconds(mllm: MLLM, batch: Batch, policy: DynamicExit) -> float:
    """That the gates of one prefill take."""
    spent = 0.0
    decide = DynamicExit.before_layer

    def timed(*arguments: object) -> None:
        nonlocal spent
        spent += common.seconds_of(lambda: decide(*arguments), mllm.device)  # type: ignore[arg-type]

    with mock.patch.object(DynamicExit, "before_layer", timed):
        prefill(mllm, batch, policy)
    return spent


def gates_firing_at(mllm: MLLM, layer: int, first: int = 1) -> DynamicExit:
    """Gates that are all asked, from layer `first` on, until every row leaves at this layer."""
    thresholds = [NEARLY_NEVER] * (layer - 1) + [0.0] + [NEARLY_NEVER] * (mllm.num_layers - 1 - layer)
    gates = Gates(mllm.num_layers, mllm.hidden_size).to(mllm.device)
    return DynamicExit(gates, threshold=thresholds, min_layer=first)


@torch.no_grad()
def mixed_exits(mllm: MLLM, batch: Batch) -> DynamicExit:
    """Random gates whose thresholds let about one row go at each of 8 layers spread over the depth."""
    gates = Gates(mllm.num_layers, mllm.hidden_size)
    with DynamicExit(gates, threshold=2.0)(mllm) as run:
        mllm.model(**batch, logits_to_keep=1)
    said = torch.stack(list(exit_probabilities(run).values())).float().cpu()  # [L - 1, rows]
    top = said.sort(1, descending=True).values
    every = max(1, mllm.num_layers // ROWS)
    fires = torch.tensor([k % every == 0 for k in range(1, mllm.num_layers)])
    return DynamicExit(gates, threshold=torch.where(fires, (top[:, 0] + top[:, 1]) / 2, 2.0).tolist())


def measure(mllm: MLLM, mixed: DynamicExit, repeats: int) -> list[dict[str, float]]:
    """Seconds of everything that is timed, round by round."""
    one, text = (common.random_prompts(mllm, 1, images=images) for images in (1, 0))
    eight = common.random_prompts(mllm, ROWS)
    alone = [eight[row : row + 1] for row in range(ROWS)]
    timed: dict[str, Callable[[], float]] = {
        "full": partial(prefill_seconds, mllm, one),
        "half": partial(prefill_seconds, mllm, one, FixedExit(mllm.num_layers // 2)),
        "layers": partial(layer_seconds, mllm, one),
        "text layers": partial(layer_seconds, mllm, text),
        "batch": partial(prefill_seconds, mllm, eight, mixed),
        "one by one": lambda: sum(prefill_seconds(mllm, each, mixed) for each in alone),
        "decoding": partial(decode_seconds, mllm, eight),
        "decoding mixed": partial(decode_seconds, mllm, eight, mixed),
    }
    return common.in_turns(timed, repeats)


@torch.no_grad()
def exits_of(mllm: MLLM, batch: Batch, policy: DynamicExit) -> list[int]:
    """Exit layers of the rows, in order."""
    with policy(mllm) as run:
        mllm.model(**batch, logits_to_keep=1)
    return sorted(run.exit_layers.tolist())


def flops_saved(mllm: MLLM) -> float:
    """Share of the prefill's FLOPs, vision tower included, that an exit at half the depth saves."""
    one = common.random_prompts(mllm, 1)
    full = prefill_flops(mllm, one).total
    with FixedExit(mllm.num_layers // 2)(mllm):
        return 1 - prefill_flops(mllm, one).total / full


def never_firing(mllm: MLLM) -> DynamicExit:
    """Gates that are all asked and let no row go."""
    return DynamicExit(Gates(mllm.num_layers, mllm.hidden_size, bias=True), threshold=NEARLY_NEVER)


def measure_gates(mllm: MLLM, repeats: int) -> list[dict[str, float]]:
    """Seconds of a plain prefill, of one under gates that are all asked and never fire, and of the gates in one."""
    one, asked = common.random_prompts(mllm, 1), never_firing(mllm)
    timed: dict[str, Callable[[], float]] = {
        "full": partial(prefill_seconds, mllm, one),
        "asked": partial(prefill_seconds, mllm, one, asked),
        "gates": partial(gate_seconds, mllm, one, asked),
    }
    return common.in_turns(timed, repeats)


@torch.no_grad()
def deciding_flops(layers: int, hidden: int, head_size: int) -> tuple[int, int]:
    """Operations of all gates of a prefill, statuses included, and of the decoder in it; counted on the meta device."""
    length = SYSTEM_TOKENS + common.VISUAL_TOKENS + QUESTION_TOKENS
    with torch.device("meta"):  # one layer and one gate: all are alike
        mllm = common.random_llava(1, hidden, head_size, device="meta")
        gate = Gates(2, hidden, bias=True)
        states, weights = torch.empty(1, length, hidden), torch.empty(1, len(gate.status), length)
    with FlopCounter(mllm) as counter:
        gate.exit_probability(token_status(states, weights), 0)
    return (layers - 1) * counter.count.total, layers * plan_decoder_flops(mllm, [length])


@torch.no_grad()
def deciding_work(mllm: MLLM) -> tuple[Work, Work]:
    """What every gate but the first dispatches, and what a decoder layer does."""
    one = common.random_prompts(mllm, 1)
    found = []
    for policy in (UNCHANGED, never_firing(mllm)):
        with policy(mllm), count_layers(mllm) as work:
            mllm.model(**one, use_cache=True, logits_to_keep=1)
        found.append(work.layers[-1])
    return found[1] - found[0], found[0]


def deciding_page(mllm: MLLM, rounds: list[dict[str, float]]) -> list[str]:
    """Lines of the page."""
    times, rows = pd.DataFrame(rounds), []
    for name, sizes in LLAVA.items():
        gates, decoder = deciding_flops(*sizes)
        rows.append((f"FLOPs of {sizes[0] - 1} gates over the decoder's, {name}", f"{gates / decoder:.5f}", "counted"))
    gate, layer = deciding_work(mllm)
    rows += [
        ("operators of a gate over those of a layer", f"{gate.operators} / {layer.operators}", "counted"),
        ("bytes that they write", f"{gate.output_bytes / layer.output_bytes:.5f}", "counted"),
        ("waits of the host, a gate that may let a row go", str(gate.synchronisations), "counted"),
        ("time of the gates, of the prefill", common.spread(times["gates"] / times["full"], 4), "below 0.01"),
        ("prefill under them, of the plain one", common.spread(times["asked"] / times["full"], 3), "reported"),
    ]
    return paragraphs(
        "# What the gates' deciding costs",
        f"Written by `python -m benchmarks.dynamic_exit --deciding --layers {mllm.num_layers} --hidden "
        f"{mllm.hidden_size} --repeats {len(rounds)}`.",
        "Gates that are all asked and never fire, one question. FLOPs at the sizes of LLaVA-1.5, on the meta device, "
        f"without the vision tower; operators, bytes and time on {mllm.num_layers} layers of hidden {mllm.hidden_size} "
        f"({common.machine(mllm.device)}, {str(mllm.dtype).removeprefix('torch.')}), where plain and asked prefills "
        f"take turns: median of {len(rounds)} rounds [quartiles]. A gate is not waited for where no row sees its image "
        "any longer, or where a threshold decides alone ([counts](counts.md)).",
        markdown_table(["", "found", "required"], rows),
    )


def table(layers: int, rounds: list[dict[str, float]], flops: float, exits: list[int]) -> list[tuple[str, str, str]]:
    """Rows of the page: what, measured, required."""
    leave, times = layers // 2, pd.DataFrame(rounds)
    saved = times["full"] - times["half"]
    predicted = (layers - leave) / layers * (times["layers"] - times["text layers"])

    def ms(seconds: pd.Series) -> str:
        return f"{common.spread(1e3 * seconds, 1)} ms"

    def ratio(part: pd.Series, whole: pd.Series) -> str:
        return common.spread(part / whole, 3)

    return [
        ("prefill of one question", ms(times["full"]), ""),
        (f"the same, exit after {leave} of {layers} layers", ms(times["half"]), ""),
        ("saved, of what timed layers predict", ratio(saved, predicted), "at least 0.9"),
        ("share of the time saved", ratio(saved, times["full"]), ""),
        ("share of the FLOPs saved", f"{flops:.3f}", ""),
        ("time saved over FLOPs saved", ratio(saved, flops * times["full"]), "reported"),
        (f"batch of {ROWS}, exits {exits}, a question", ms(times["batch"] / ROWS), ""),
        ("the same one by one, a question", ms(times["one by one"] / ROWS), ""),
        ("batch over one by one", ratio(times["batch"], times["one by one"]), "at most 1"),
        (f"decoding step of {ROWS} rows, full model", ms(times["decoding"]), ""),
        ("the same with these exits", ms(times["decoding mixed"]), ""),
        ("decoding with these exits, of full", ratio(times["decoding mixed"], times["decoding"]), "reported"),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the page."""
    parser = common.model_parser(__doc__, "dynamic_exit", layers=16)
    parser.add_argument("--deciding", action="store_true", help="what deciding costs, to docs/benchmarks/deciding.md")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    options = parser.parse_args(arguments)
    mllm = common.model_of(options)
    if options.deciding:
        if options.output == parser.get_default("output"):
            options.output = options.output.with_name("deciding.md")
        common.write_page(options.output, deciding_page(mllm, measure_gates(mllm, options.repeats)))
        return
    batch = common.random_prompts(mllm, ROWS)
    mixed = mixed_exits(mllm, batch)
    rounds = measure(mllm, mixed, options.repeats)
    rows = table(options.layers, rounds, flops_saved(mllm), exits_of(mllm, batch, mixed))
    lines = paragraphs(
        "# What a visual-token exit saves in time",
        "Written by `python -m benchmarks.dynamic_exit`. What the gates' deciding costs: [deciding](deciding.md).",
        f"{common.model_note(options)}; {SYSTEM_TOKENS} system + {common.VISUAL_TOKENS} visual + {QUESTION_TOKENS} "
        f"question tokens. Median of {options.repeats} rounds [quartiles]; everything is timed in every round, and "
        "ratios are taken within a round.",
        markdown_table(["", "measured", "required"], rows),
    )
    common.write_page(options.output, lines)


if __name__ == "__main__":
    main()
