"""What policies and instruments add to the model's own work, in counts that are the same on every machine.

    python -m benchmarks.counts           # writes docs/benchmarks/counts.md (about a minute)

A random model of LLaVA-1.5's proportions, 35 system, 576 visual and 29 question tokens, at batch 1 and 8. Counted, for
every policy and instrument, over what the unchanged model does: operators dispatched, bytes that kernels write, host
synchronisations, and calls of dyvte's Python functions.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch

import dyvte
from analysis.statistics.markdown import markdown_table, records_table
from benchmarks import common
from benchmarks.common import UNCHANGED, VISUAL_TOKENS, decoding_steps
from benchmarks.dynamic_exit import ROWS, gates_firing_at, mixed_exits
from dyvte import MLLM, Batch, Policy
from dyvte.cost.operators import LayerWork, OperatorCounter, Work, count_layers
from dyvte.instrument.cache import KeptLayer
from dyvte.policies.pruning.fitprune import Recipe
from dyvte.policies.registry import methods

BATCH_SIZES = (1, ROWS)
LAYERS, HIDDEN, HEAD_SIZE = 16, 64, 32
VISION_LAYERS = 2  # methods look at the last but one
MIXED = "dynamic exit, mixed"
EXITS = ("fixed exit", "dynamic exit, all rows at once", MIXED)
"""Policies that are counted on prompts of different lengths as well."""
STEPS = 4
"""Decoding steps: the first, which prepares the others, and three that are as all later ones."""
PACKAGE = str(Path(dyvte.__file__).parent) + os.sep
KEEP = 0.5


def counted_model(layers: int = LAYERS) -> MLLM:
    """The model that is counted."""
    return common.random_llava(layers, HIDDEN, HEAD_SIZE, vision_layers=VISION_LAYERS)


def prompts(mllm: MLLM, batch_size: int, padded: bool = False) -> Batch:
    """Its prompts; padded, row r lacks its first r tokens."""
    batch = common.random_prompts(mllm, batch_size)
    if not padded:
        return batch
    mask = torch.ones_like(batch["attention_mask"]).triu()[:batch_size]
    return mllm.batch(**{**batch, "attention_mask": mask})


def policies(mllm: MLLM) -> dict[str, Callable[[Batch], Policy]]:
    """Every method of the registry, by what tables call it: what makes it for a batch of prompts."""
    layers = mllm.num_layers
    half = layers // 2
    recipe = Recipe([1.0, 1.0, *[KEEP] * (layers - 2)], alpha=0.0, budget=KEEP, cost=KEEP, num_samples=1)

    def mixed(batch: Batch) -> Policy:
        return mixed_exits(mllm, batch) if len(batch["input_ids"]) > 1 else gates_firing_at(mllm, half)

    def after_fastv(batch: Batch) -> Policy:
        return dyvte.FastVDynamicExit([dyvte.FastV(), gates_firing_at(mllm, half, first=dyvte.FastV.layer + 1)])

    made: dict[str, dict[str, Callable[[Batch], Policy]]] = {
        "none": {},
        "fixed_exit": {"": lambda batch: dyvte.FixedExit(half)},
        "vtw": {"": lambda batch: dyvte.VTW(half)},
        "dynamic_exit": {", all rows at once": lambda batch: gates_firing_at(mllm, half), ", mixed": mixed},
        "fastv_dynamic_exit": {"": after_fastv},
        "fitprune": {"": lambda batch: dyvte.FitPrune(recipe)},
        "tome": {
            "": lambda batch: dyvte.ToMe(keep=KEEP),
            ", every layer": lambda batch: dyvte.ToMe(merges=VISUAL_TOKENS // (2 * layers)),
        },
        "skip_attention": {"": lambda batch: dyvte.SkipAttention(layers=[half])},
    }
    found: dict[str, Callable[[Batch], Policy]] = {}
    for name, method in methods().items():
        keeps = {"keep": KEEP} if "keep" in {each.name for each in fields(method)} else {}
        for variant, make in made.get(name, {"": lambda batch, method=method, keeps=keeps: method(**keeps)}).items():
            found[method.label + variant] = make
    return found


def instruments(mllm: MLLM) -> dict[str, Callable[[Batch], object]]:
    """Every instrument by name, with a run of it on a batch."""

    def probed(batch: Batch) -> object:
        with dyvte.AttentionProbe(mllm):
            return mllm.model(**batch)

    windows = [(start, start + 4) for start in range(0, mllm.num_layers, 4)]
    return {
        "AttentionProbe": probed,
        "exit_sweep": lambda batch: dyvte.exit_sweep(mllm, batch, entropy=False),
        "exit_sweep with entropy": lambda batch: dyvte.exit_sweep(mllm, batch),
        f"knockout, {len(windows)} windows": lambda batch: dyvte.knockout(mllm, batch, windows=windows),
        "logit_lens": lambda batch: dyvte.logit_lens(mllm, batch),
    }


# --------------------------------------------------------------------------- counting


@dataclass
class Count:
    """What one generation dispatched.

    Attributes:
        prefill: by layer.
        leaving: the layers before which tokens left: their number of stored positions is not that of the one before.
        after: the layers that run without some positions, as the layer before did.
        steps: decoding, step by step.
        by_name: operators of the last step.
        prefill_calls, step_calls: calls of dyvte's Python functions in the prefill and in the last step.
    """

    prefill: LayerWork
    leaving: list[int]
    after: list[int]
    steps: list[Work]
    by_name: Counter[str]
    prefill_calls: int
    step_calls: int


@torch.no_grad()
def count_generation(mllm: MLLM, batch: Batch, policy: Policy = UNCHANGED) -> Count:
    """Count a prefill as `generate` does it, and `STEPS` decoding steps."""
    run = partial(mllm.model, **batch, use_cache=True, logits_to_keep=1)
    with policy(mllm):
        run()  # what is made once a block is not counted
        with count_layers(mllm) as prefill:
            cache = run().past_key_values
        leaving, after = _layers_by_what_left(cache)
        steps = []
        for step in decoding_steps(mllm, batch, cache, STEPS):
            with OperatorCounter() as counter:
                step()
            steps.append(counter.work)
        step = next(decoding_steps(mllm, batch, cache, 1, done=STEPS))
        step_calls = python_calls(step)
        prefill_calls = python_calls(run)
    return Count(prefill, leaving, after, steps, counter.by_name, prefill_calls, step_calls)


def _layers_by_what_left(cache: Any) -> tuple[list[int], list[int]]:
    stored = [layer.nbytes if isinstance(layer, KeptLayer) else None for layer in cache.layers]
    short = [index for index, size in enumerate(stored) if size is not None]
    leaving = [index for index in short if index == 0 or stored[index] != stored[index - 1]]
    return leaving, [index for index in short if index not in leaving]


def python_calls(run: Callable[[], object]) -> int:
    """Calls of dyvte's Python functions in `run()`."""
    calls = 0

    def see(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    collecting = gc.isenabled()
    gc.disable()  # or what it finalises counts, at any time
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
        if collecting:
            gc.enable()
    return calls


@torch.no_grad()
def count_instrument(mllm: MLLM, batch: Batch, run: Callable[[Batch], object]) -> tuple[LayerWork, int]:
    """The work of one run of an instrument by layer, and calls of dyvte's Python functions."""
    run(batch)
    with count_layers(mllm) as work:
        run(batch)
    return work, python_calls(lambda: run(batch))


# ------------------------------------------------------------------------------- page


def policy_columns(plain: Count, count: Count) -> dict[str, str]:
    """What the tables of policies show: over the unchanged model, by kind of layer and by step."""
    extra = [one - other for one, other in zip(count.prefill.layers, plain.prefill.layers, strict=True)]
    first = min([*count.leaving, *count.after], default=len(extra))
    total, full = count.prefill.total, plain.prefill.total
    step, own = count.steps[-1], plain.steps[-1]
    return {
        "layers before": _most(extra[:first]),
        "layers where tokens leave": _most([extra[layer] for layer in count.leaving]),
        "layers after": _most([extra[layer] for layer in count.after]),
        "prefill": f"{total.operators / full.operators:.2f}",
        "syncs": f"{(total - full).synchronisations:+d}",
        "bytes": f"{total.output_bytes / full.output_bytes:.2f}",
        "calls": f"{count.prefill_calls:,}",
        "first step": f"{(count.steps[0] - own).operators:+d}",
        "later steps": f"{step.operators / own.operators:.3f}",
        "kernels": f"{step.kernels / own.kernels:.3f}",
        "bytes, step": f"{step.output_bytes / own.output_bytes:.2f}",
        "syncs, step": f"{(step - own).synchronisations:+d}",
        "calls, step": str(count.step_calls),
    }


def _most(extra: list[Work]) -> str:
    return f"{max(each.operators for each in extra):+d}" if extra else ""


def instrument_columns(plain: LayerWork, work: LayerWork, calls: int) -> dict[str, str]:
    """What the table of instruments shows: over one prefill of the unchanged model."""
    extra = [(one - other).operators for one, other in zip(work.layers, plain.layers, strict=True)]
    total, full = work.total, plain.total
    return {
        "a layer": f"{median(extra):+.0f}",
        "operators": f"{total.operators / full.operators:.2f}",
        "bytes": f"{total.output_bytes / full.output_bytes:.2f}",
        "syncs": f"{(total - full).synchronisations:+d}",
        "calls": f"{calls:,}",
    }


def page(mllm: MLLM, batch_sizes: Sequence[int] = BATCH_SIZES) -> list[str]:
    """Count everything and write it down."""
    of_policies, of_instruments, plain_layers, names = [], [], [], list(policies(mllm))
    for batch_size in batch_sizes:
        batch = prompts(mllm, batch_size)
        plain = count_generation(mllm, batch)
        plain_layers.append(
            f"at batch {batch_size} {plain.prefill.layers[1].operators} operators a layer of the prefill and "
            f"{plain.steps[-1].operators} a decoding step"
        )
        found = {name: count_generation(mllm, batch, make(batch)) for name, make in policies(mllm).items()}
        for name, count in found.items():
            of_policies.append({"policy": name, "batch": batch_size, **policy_columns(plain, count)})
        for name, run in instruments(mllm).items():
            columns = instrument_columns(plain.prefill, *count_instrument(mllm, batch, run))
            of_instruments.append({"instrument": name, "batch": batch_size, **columns})
    full, mixed = plain.by_name, found[MIXED].by_name
    differing = [[f"`{name}`", full[name], mixed[name]] for name in sorted(mixed | full) if mixed[name] != full[name]]
    return common.paragraphs(
        "# What policies and instruments dispatch",
        "Written by `python -m benchmarks.counts`. Counts, not times: the same on every machine and in every run.",
        f"A random LLaVA of {mllm.num_layers} layers, {common.SYSTEM_TOKENS} system + {VISUAL_TOKENS} visual + "
        f"{common.QUESTION_TOKENS} question tokens. The unchanged model dispatches {', '.join(plain_layers)}.",
        "## Policies",
        "Over the unchanged model. *Layers before, where tokens leave, after*: operators more in the prefill, in "
        "the layer of each kind that has the most; *prefill*: operators of all of it, as a ratio; *syncs*: host "
        "synchronisations more (see `dyvte.cost.operators`); *bytes*: what kernels write, as a ratio; *calls*: of "
        "dyvte's Python functions. *First step*: operators more in the first decoding step, which prepares the "
        "later ones; then operators, kernels and bytes of a later one, as ratios.",
        records_table(sorted(of_policies, key=lambda row: names.index(row["policy"]))),
        "## What a step with mixed exits dispatches more",
        f"Batch {batch_sizes[-1]}, operators of a later step. Two groups of rows attend one after the other in every "
        "layer that some rows have left: queries are put in the groups' order, keys are written into one store, read "
        "from it by group, and outputs are put back in order.",
        markdown_table(["operator", "full model", "mixed exits"], differing),
        "## Bounds",
        "`tests/test_counts.py` holds them: a prefill layer before any token left "
        "dispatches nothing more, one after an exit at most 8 operators; decoding under an exit that all rows "
        "take at once, and under methods that drop tokens, no more than the full model, with mixed exits at most "
        "1.14 times, padded or not; no step waits for the device more often; gates wait once a layer at which a row "
        "may leave, and not at all where a threshold decides alone or no row sees its image. A layer that only some "
        "rows have left runs twice in the prefill, once for each group.",
        "## Prompts that differ in length",
        f"Batch {batch_sizes[-1]}, row r padded on the left by r tokens; over the unchanged model on the same prompts. "
        "Masks are gathered from the model's in every step, as the caller may change it; where groups of rows attend "
        "apart they are what is added to the scores, which `scaled_dot_product_attention` would make of a boolean mask "
        "in every layer.",
        records_table(_padded(mllm, batch_sizes[-1])),
        "## Instruments",
        "Over one prefill of the unchanged model: operators more in the median layer, then operators and bytes as "
        "ratios, and host synchronisations more.",
        records_table(of_instruments),
    )


def _padded(mllm: MLLM, batch_size: int) -> list[dict[str, str]]:
    """Rows of the table of prompts that differ in length."""
    batch = prompts(mllm, batch_size, padded=True)
    plain, rows = count_generation(mllm, batch), []
    for name in EXITS:
        columns = policy_columns(plain, count_generation(mllm, batch, policies(mllm)[name](batch)))
        shown = ("prefill", "syncs", "first step", "later steps", "kernels")
        rows.append({"policy": name, **{column: columns[column] for column in shown}})
    return rows


def main() -> None:
    """Count, print and write the page."""
    common.write_page(common.page_parser(__doc__, "counts").parse_args().output, page(counted_model()))


if __name__ == "__main__":
    main()
