"""What policies and instruments cost on a GPU, in full size, in at most ten minutes.

    python -m benchmarks.gpu              # on one GPU of 80 GB; writes docs/benchmarks/gpu.md

Random bfloat16 weights: LLaVA-1.5-7B and 13B, LLaVA-NeXT-7B (2,928 visual tokens) and Qwen2.5-VL-7B. Every part is
saved as it ends, so a run that is cut short keeps what it has, and one that is started again goes on. `--dry-run` does
all of it with tiny copies of the models on a CPU: it shows that the program works, and its times say nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from transformers import AutoModelForImageTextToText

import dyvte
from analysis.cost import measure
from analysis.statistics.markdown import markdown_table
from benchmarks import architectures, common
from benchmarks.common import QUESTION_TOKENS, SYSTEM_TOKENS
from benchmarks.dynamic_exit import gates_firing_at
from dyvte import MLLM, Batch, Policy
from dyvte.cost.measure import PeakMemory
from dyvte.runs.config import config_folder
from dyvte.runs.store import write_json

MODELS = ("llava7b", "llava13b", "llava_next7b", "qwen25vl7b")
BATCH_SIZES = (1, 8)
MINUTES = 10.0
NEW_TOKENS = 16
REPEATS = 7
HALF = 0.5
"""Depth of the fixed exit; and where the gates let go, as our source of the paper does not print its mean exit."""
INSTRUMENT_WINDOWS = 4
"""Windows of the knock-out, which share the depth."""


@dataclass
class Part:
    """Measurements of one kind, "policies" or "instruments", on one model, saved together."""

    model: str
    attention: str
    kind: str
    batch_size: int

    @property
    def name(self) -> str:
        """Key in the file of results."""
        return f"{self.model}, {self.attention}, {self.kind}, batch {self.batch_size}"


def parts(models: tuple[str, ...] = MODELS) -> list[Part]:
    """What is measured, the most important first: policies of every model, then instruments, then flash attention."""
    found = [Part(model, "sdpa", "policies", size) for model, size in itertools.product(models, BATCH_SIZES)]
    found += [Part(model, "sdpa", "instruments", 1) for model in models]
    if importlib.util.find_spec("flash_attn") is not None:
        found += [Part(model, "flash_attention_2", "policies", size) for model in models for size in BATCH_SIZES]
    return found


def policies(mllm: MLLM) -> dict[str, Policy]:
    """The policies of the paper's Table 4 by the names of the registry, and the unchanged model."""
    leave = round(HALF * mllm.num_layers)
    return {
        "none": dyvte.Unchanged(),
        "fixed_exit": dyvte.FixedExit(leave),
        "dynamic_exit": gates_firing_at(mllm, leave),
        "fastv": dyvte.FastV(layer=2, keep=0.5),
        "tome": dyvte.ToMe(keep=0.5),
    }


def instruments(mllm: MLLM, batch: Batch) -> dict[str, Callable[[], object]]:
    """One run of each instrument on a batch, with what it is compared with."""
    width = max(mllm.num_layers // INSTRUMENT_WINDOWS, 1)
    windows = [(start, start + width) for start in range(0, mllm.num_layers - width + 1, width)]

    def forward(**settings: Any) -> object:
        return mllm.model(**batch, logits_to_keep=1, **settings)

    def probed() -> object:
        with dyvte.AttentionProbe(mllm):
            return forward()

    def maps() -> object:
        before = mllm.text_config._attn_implementation
        mllm.model.set_attn_implementation("eager")
        try:
            return forward(output_attentions=True)
        finally:
            mllm.model.set_attn_implementation(before)

    return {
        "plain forward": forward,
        "AttentionProbe": probed,
        "output_attentions": maps,
        "exit_sweep": lambda: dyvte.exit_sweep(mllm, batch, entropy=False),
        f"knockout, {len(windows)} windows": lambda: dyvte.knockout(mllm, batch, windows=windows),
    }


# -------------------------------------------------------------------------- measuring


def load(name: str, attention: str, device: torch.device, tiny: bool) -> MLLM:
    """A model with random weights, made on the device that it runs on."""
    known = architectures.architecture(name)
    if tiny:
        return architectures.small_copy(known, attention)
    torch.manual_seed(0)
    with device:
        model = AutoModelForImageTextToText.from_config(
            architectures.build_config(known.config), dtype=torch.bfloat16, attn_implementation=attention
        )
    return dyvte.wrap(model.eval())


def prompts(mllm: MLLM, name: str, rows: int) -> Batch:
    """Prompts with as much text as LLaVA's own, each with an image of its own."""
    known = architectures.architecture(name)
    made = [
        architectures.prompt(mllm, known, known.visual_tokens, SYSTEM_TOKENS, QUESTION_TOKENS, seed)
        for seed in range(rows)
    ]
    batch, dtype = Batch.cat(made).to(mllm.device), mllm.model.dtype
    for key, value in batch.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            batch[key] = value.to(dtype)
    return batch


@torch.no_grad()
def measure_policies(mllm: MLLM, batch: Batch, repeats: int, new_tokens: int) -> list[dict[str, Any]]:
    """One row a policy: milliseconds of prefill and step in every repeat, which alternate, and peak memory in bytes."""
    chosen = policies(mllm)
    timed = measure(mllm, batch, chosen, repeats, new_tokens, seed=0)
    rows = []
    for name, policy in chosen.items():
        own = timed[timed["method"] == name].sort_values("repeat")
        with PeakMemory(mllm.device) as memory:
            common.prefill(mllm, batch, policy)
        rows.append(
            {
                "method": name,
                "prefill_ms": (1e3 * own["prefill_seconds"]).tolist(),
                "decode_ms": (1e3 * own["decode_seconds"]).tolist(),
                "peak_bytes": memory.bytes,
            }
        )
    return rows


@torch.no_grad()
def measure_instruments(mllm: MLLM, batch: Batch, repeats: int) -> list[dict[str, Any]]:
    """One row an instrument: milliseconds in every repeat, which alternate, and peak memory in bytes.

    One that does not fit into memory has no times, and says so.
    """
    runs = instruments(mllm, batch)
    rows: dict[str, dict[str, Any]] = {name: {"method": name, "ms": [], "peak_bytes": 0} for name in runs}
    for repeat, (name, run) in itertools.product(range(repeats + 1), runs.items()):
        row = rows[name]
        if "failed" in row:
            continue
        try:
            with PeakMemory(mllm.device) as memory:
                seconds = common.seconds_of(run, mllm.device)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
            _free(mllm.device)
            continue
        if repeat:  # the first warms up
            row["ms"].append(1e3 * seconds)
        row["peak_bytes"] = memory.bytes
    return list(rows.values())


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_parts(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The rows of every part, saved with the page after each; `left_out`: the parts that there was no time for."""
    where = common.machine(device)
    results: dict[str, Any] = {"machine": where, "dry_run": options.dry_run, "parts": {}, "left_out": []}
    if options.results.is_file():
        before = json.loads(options.results.read_text())
        if (before["machine"], before["dry_run"]) == (where, options.dry_run):
            results["parts"] = before["parts"]
    started, slowest = time.monotonic(), 0.0
    wanted = [part for part in parts(tuple(options.models)) if part.name not in results["parts"]]
    for (model, attention), group in itertools.groupby(wanted, key=lambda part: (part.model, part.attention)):
        mllm: MLLM | None = None
        for part in group:
            part_started = time.monotonic()
            if part_started + slowest - started > 60 * options.minutes:
                results["left_out"].append(part.name)
                continue
            mllm = load(model, attention, device, options.dry_run) if mllm is None else mllm
            batch = prompts(mllm, model, part.batch_size)
            rows = (
                measure_instruments(mllm, batch, options.repeats)
                if part.kind == "instruments"
                else measure_policies(mllm, batch, options.repeats, options.new_tokens)
            )
            results["parts"][part.name] = {**vars(part), "rows": rows}
            slowest = max(slowest, time.monotonic() - part_started)
            _save(results, options)
        del mllm
        _free(device)
    _save(results, options)
    return results


# ------------------------------------------------------------------------------- page


def _save(results: dict[str, Any], options: argparse.Namespace) -> None:
    options.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.results, results)
    common.write_page(options.output, page(results, options.repeats, options.new_tokens))


def page(results: dict[str, Any], repeats: int, new_tokens: int) -> list[str]:
    """What was measured, beside the latencies of the paper's Table 4."""
    measured = results["parts"].values()
    of_policies = [row for part in measured if part["kind"] == "policies" for row in _policy_rows(part)]
    of_instruments = [row for part in measured if part["kind"] == "instruments" for row in _instrument_rows(part)]
    columns = ["model", "attention", "batch", "method", "prefill, ms", "of full", "step, ms", "of full", "memory, GB"]
    return common.paragraphs(
        "# Policies and instruments on a GPU",
        "Written by `python -m benchmarks.gpu`.",
        *(["Dry run with tiny models: the numbers mean nothing."] if results["dry_run"] else []),
        f"{results['machine']}, bfloat16, random weights; {SYSTEM_TOKENS} system and {QUESTION_TOKENS} question tokens "
        f"around the image; exits after half of the layers. Median of {repeats} repeats [quartiles]; ratios are taken "
        f"within a repeat. A step is the mean of {new_tokens - 1}. Memory is what the prefill takes at most above the "
        "weights.",
        "## Policies",
        markdown_table(columns, of_policies),
        "## Instruments, batch 1",
        markdown_table(["model", "instrument", "ms", "of plain", "memory, GB"], of_instruments),
        "## The paper's Table 4",
        _published(),
        *([f"No time was left for: {'; '.join(results['left_out'])}."] if results["left_out"] else []),
    )


def _policy_rows(part: dict[str, Any]) -> Iterator[list[str]]:
    full = next(row for row in part["rows"] if row["method"] == "none")
    for row in part["rows"]:
        cells = [part["model"], part["attention"], str(part["batch_size"]), row["method"]]
        for name, digits in (("prefill_ms", 1), ("decode_ms", 2)):
            cells += [common.spread(row[name], digits), _ratio(row[name], full[name])]
        yield [*cells, f"{row['peak_bytes'] / 1e9:.2f}"]


def _instrument_rows(part: dict[str, Any]) -> Iterator[list[str]]:
    plain = next(row for row in part["rows"] if row["method"] == "plain forward")
    for row in part["rows"]:
        if "failed" in row:
            yield [part["model"], row["method"], row["failed"], "", ""]
            continue
        cells = [part["model"], row["method"], common.spread(row["ms"], 1), _ratio(row["ms"], plain["ms"])]
        yield [*cells, f"{row['peak_bytes'] / 1e9:.2f}"]


def _ratio(own: list[float], other: list[float]) -> str:
    return f"{common.quartiles(one / two for one, two in zip(own, other, strict=True))[1]:.3f}"


def _published() -> list[str]:
    """Latencies that the paper prints, of its full model's."""
    experiment = yaml.safe_load((config_folder() / "experiment" / "table4.yaml").read_text())
    table = pd.DataFrame(experiment["published"])
    rows = []
    for task, own in table.groupby("task", sort=False):
        full = own["value"].iloc[0]
        rows += [[task, name, f"{value:.3f}", f"{value / full:.3f}"] for name, value in own[["method", "value"]].values]
    return [*markdown_table(["task", "method", "latency, s", "of full"], rows), "", f"Source: {experiment['source']}."]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the page."""
    parser = common.page_parser(__doc__, "gpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=architectures.names())
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no part is begun that would end later")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--results", type=Path, default=Path("outputs/benchmarks/gpu.json"), help="what goes on")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("needs a GPU; --dry-run tries the program without one")
    run_parts(options, torch.device("cpu" if options.dry_run else "cuda"))


if __name__ == "__main__":
    main()
