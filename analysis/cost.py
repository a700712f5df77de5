"""``python -m analysis.cost``: what policies cost, measured in one run.

Prefill and decoding latency at several batch sizes, tokens a second, FLOPs, memory and the KV cache. The policies take
turns in every repeat, in an order drawn anew, so that a machine that gets slower or busier in between does so for all
of them: ratios to the unchanged model are taken within a repeat.
"""

from __future__ import annotations

import time
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from dyvte.batch import Batch
from dyvte.cost.flops import prefill_flops, watch_overhead
from dyvte.cost.measure import PeakMemory, kv_cache_bytes
from dyvte.data.base import build_dataset
from dyvte.errors import DataError
from dyvte.evaluate import policy_digest
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.exits.dynamic_exit import DynamicExit
from dyvte.policies.registry import labels
from dyvte.runs.config import command, load_model
from dyvte.runs.store import RunFolder, fingerprint

from .measuring.methods import describe, gates_of, load_calibration, policy_at
from .measuring.runs import fill_shards, run_facts
from .statistics.markdown import heading, markdown_table, published, write_table_page


@command("cost")
def main(cfg: DictConfig) -> str:
    """Measure the policies of `conf/cost.yaml`."""
    return str(cost(cfg)["in_words"])


def cost(cfg: DictConfig) -> dict[str, Any]:
    """Measure, and write the table and the repeats."""
    mllm, dataset, gates = load_model(cfg), build_dataset(cfg.data), gates_of(cfg)
    settings = cfg.cost
    budget, calibration = cfg.experiment.budgets[0], load_calibration(mllm, cfg, gates)
    methods = {name: policy_at(name, budget, calibration) for name in dict.fromkeys(["none", *cfg.experiment.methods])}
    policies = {name: policy for name, policy in methods.items() if policy is not None}  # who can meet the budget
    largest = max(settings.batch_sizes)
    prompts = list(islice((each for each in dataset.readable() if each.image is not None), largest))
    if len(prompts) < largest:
        raise DataError(f"a batch of {largest} needs as many questions with an image; set data.limit=")
    made_of = {
        "experiment": OmegaConf.to_container(cfg.experiment, resolve=True),
        "cost": OmegaConf.to_container(settings, resolve=True),
        "gates": None if gates is None else policy_digest(DynamicExit(gates)),
        "threads": torch.get_num_threads(),
    }
    folder = RunFolder.open(cfg.output_dir, fingerprint(mllm, dataset, cfg, **made_of), cfg, cfg.overwrite)

    def of_batch(batch_size: int) -> tuple[dict[str, pd.DataFrame], int]:
        part = prompts[:batch_size]
        batch = mllm.encode([each.image for each in part], [each.question for each in part])
        repeats = measure(mllm, batch, policies, settings.repeats, settings.new_tokens, cfg.seed)
        constants = pd.DataFrame([{"method": name, **constant(mllm, batch, each)} for name, each in policies.items()])
        found = {"repeats": repeats, "constants": constants}
        return {name: table.assign(batch_size=batch_size) for name, table in found.items()}, batch_size

    fill_shards(folder, settings.batch_sizes, of_batch)
    table = summarize(folder.read_table("repeats"), folder.read_table("constants"), settings.new_tokens)
    table["setting"] = table["method"].map({name: describe(policy) for name, policy in policies.items()})
    folder.write_table("cost", table)
    write_table_page(folder, markdown(cfg, table))
    return folder.write_summary(
        **run_facts(cfg, mllm),
        device=str(mllm.device),
        threads=torch.get_num_threads(),
        rows=table.to_dict("records"),
        in_words=cost_in_words(table),
    )


@torch.no_grad()
def measure(
    mllm: MLLM, batch: Batch, policies: dict[str, Policy], repeats: int, new_tokens: int, seed: int
) -> pd.DataFrame:
    """`time_generation` of every policy in every repeat, in an order drawn anew; one more repeat before warms up."""
    order = np.random.default_rng(seed)
    rows = []
    for repeat in range(repeats + 1):
        for name in order.permutation(list(policies)):
            timed = time_generation(mllm, batch, policies[str(name)], new_tokens)
            if repeat:
                rows.append({"repeat": repeat, "method": str(name), **timed})
    return pd.DataFrame(rows)


def time_generation(mllm: MLLM, batch: Batch, policy: Policy, new_tokens: int) -> dict[str, float]:
    """Seconds of one generation of so many tokens, all of a batch's rows together, the policy's work included.

    `vision_seconds` up to the decoder's start (vision tower, projector, embedding), `prefill_seconds` of the first
    forward with it, `deciding_seconds` of the policy's own work, most of it in that, `decode_seconds` of a later step.
    """
    clock, deciding, decoder = Stopwatch(mllm.device), Stopwatch(mllm.device), mllm.decoder

    def starts(module: torch.nn.Module, *_: Any) -> None:
        if len(clock.marks) == (module is decoder):
            clock.mark()

    handles = [each.register_forward_pre_hook(starts) for each in (mllm.model, decoder)]
    handles.append(mllm.model.register_forward_hook(lambda *_: clock.mark()))
    try:
        with policy(mllm), watch_overhead(deciding.mark):
            settings = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
            mllm.model.generate(**batch.left_padded(), **settings)
    finally:
        for handle in handles:
            handle.remove()
    vision, decoding, *steps = clock.seconds()
    return {
        "vision_seconds": vision,
        "prefill_seconds": vision + decoding,
        "deciding_seconds": sum(deciding.seconds()[::2]),
        "decode_seconds": sum(steps) / max(len(steps), 1),
    }


class Stopwatch:
    """Times between marks: CUDA events on a GPU, else the performance counter."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Note the time."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between one mark and the next."""
        if not self.cuda:
            return [end - start for start, end in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(self.marks)]


@torch.no_grad()
def constant(mllm: MLLM, batch: Batch, policy: Policy) -> dict[str, float]:
    """What does not vary between repeats, of one question: FLOPs of the prefill, bytes in the KV cache.

    And the peak memory of the batch's prefill, above what was held before it (see `dyvte.cost.measure.PeakMemory`).
    """
    rows = len(batch["input_ids"])
    with policy(mllm):
        with PeakMemory(mllm.device) as memory:
            cache = mllm.model(**batch, use_cache=True, logits_to_keep=1).past_key_values
        count = prefill_flops(mllm, batch)
    return {
        "flops_total": count.total / rows,
        "flops_decoder": count.decoder / rows,
        "kv_cache_bytes": kv_cache_bytes(cache) / rows,
        "peak_memory_bytes": memory.bytes,
    }


def summarize(repeats: pd.DataFrame, constants: pd.DataFrame, new_tokens: int) -> pd.DataFrame:
    """One row a batch size and method: medians, quartiles, and the paired ratio to the unchanged model.

    And the shares of the time of an answer of `new_tokens` tokens: before the decoder, its prefill, decoding; and what
    deciding takes, in time and operations.
    """
    rows = []
    by_run = repeats.set_index("repeat").groupby(["batch_size", "method"], sort=False)
    key: Any
    for key, own in by_run:
        batch_size, method = key
        base = by_run.get_group((batch_size, "none"))
        row: dict[str, Any] = {"batch_size": batch_size, "method": method}
        for name in ("prefill", "decode"):
            seconds = own[f"{name}_seconds"]
            low, median, high = 1e3 * np.quantile(seconds, [0.25, 0.5, 0.75])
            ratio = seconds / base[f"{name}_seconds"]
            row |= {f"{name}_ms": median, f"{name}_ms_q25": low, f"{name}_ms_q75": high}
            row[f"{name}_ratio"] = float(ratio.median())
            row[f"{name}_ratio_q25"], row[f"{name}_ratio_q75"] = np.quantile(ratio, [0.25, 0.75])
        row["deciding_ms"] = 1e3 * float(own["deciding_seconds"].median())
        answer = (new_tokens - 1) * own["decode_seconds"]
        whole = own["prefill_seconds"] + answer
        row["vision_share"] = float((own["vision_seconds"] / whole).median())
        row["prefill_share"] = float(((own["prefill_seconds"] - own["vision_seconds"]) / whole).median())
        row["decode_share"] = float((answer / whole).median())
        row["tokens_per_second"] = 1e3 * float(batch_size) / row["decode_ms"]
        rows.append(row)
    table = pd.DataFrame(rows).merge(constants, on=["batch_size", "method"], validate="one_to_one")
    outside = table["flops_total"] - table["flops_decoder"]
    of_full = outside[table["method"] == "none"].set_axis(table["batch_size"][table["method"] == "none"])
    table["flops_deciding"] = outside - table["batch_size"].map(of_full)
    order = {name: index for index, name in enumerate(constants["method"].drop_duplicates())}
    return table.sort_values(["batch_size", "method"], key=lambda c: c.map(order) if c.name == "method" else c)


def cost_in_words(table: pd.DataFrame) -> str:
    """Which method saves most time in the largest batch."""
    batch_size = table["batch_size"].max()
    rivals = table[(table["batch_size"] == batch_size) & (table["method"] != "none")]
    if rivals.empty:
        return "the full model alone was timed: name methods to compare it with (experiment.methods=)"
    best = rivals.loc[rivals["prefill_ratio"].idxmin()]
    faster = int((rivals["prefill_ratio_q75"] < 1).sum())
    return (
        f"{faster} of {len(rivals)} methods shorten the prefill of a batch of {batch_size}; {labels()[best['method']]} "
        f"most, to {best['prefill_ratio']:.0%} of the full model's time, with {best['kv_cache_bytes'] / 1e3:.0f} kB in "
        "the KV cache."
    )


def markdown(cfg: DictConfig, table: pd.DataFrame) -> list[str]:
    """The lines of the page to put into a document."""
    columns = ["batch", "method", "prefill, ms", "of full", "decode step, ms", "of full", "tokens/s"]
    columns += ["vision / prefill / decoding, %"]
    columns += ["deciding, ms", "deciding GFLOPs", "decoder GFLOPs", "total GFLOPs", "KV cache, kB", "peak memory, MB"]
    note = (
        f"median of {cfg.cost.repeats} repeats [quartiles], {torch.get_num_threads()} threads; ratios are taken within "
        "a repeat. FLOPs and KV cache are of one question; peak memory is what the prefill of the whole batch takes at "
        "most above what the process held before it. Vision (tower, projector, embedding), the decoder's prefill and "
        f"decoding are shares of the time of an answer of {cfg.cost.new_tokens} tokens; an exit can save no more than "
        "the second, and of the third what attention to visual keys takes. Deciding is what a method computes to "
        "choose tokens or layers: part of the prefill's time and of the total FLOPs, not of the decoder's"
    )
    rows = [
        [
            row["batch_size"],
            labels()[row["method"]],
            f"{row['prefill_ms']:.1f} [{row['prefill_ms_q25']:.1f}, {row['prefill_ms_q75']:.1f}]",
            f"{row['prefill_ratio']:.2f}",
            f"{row['decode_ms']:.2f} [{row['decode_ms_q25']:.2f}, {row['decode_ms_q75']:.2f}]",
            f"{row['decode_ratio']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            " / ".join(f"{100 * row[f'{part}_share']:.0f}" for part in ("vision", "prefill", "decode")),
            f"{row['deciding_ms']:.2f}",
            f"{row['flops_deciding'] / 1e9:.4f}",
            f"{row['flops_decoder'] / 1e9:.3f}",
            f"{row['flops_total'] / 1e9:.3f}",
            f"{row['kv_cache_bytes'] / 1e3:.0f}",
            f"{row['peak_memory_bytes'] / 1e6:.1f}",
        ]
        for row in table.to_dict("records")
    ]
    return [*heading(cfg, note), *markdown_table(columns, rows), *published(cfg.experiment)]


if __name__ == "__main__":
    main()
