"""What a visual-token exit saves in wall-clock time: `python -m analysis.bench_dynamic_exit`.

A random model of LLaVA-1.5's proportions (576 visual and 64 text tokens), so times depend on shapes alone. Measured:
the prefill under an exit at half the depth against what separately timed layers predict, the time that gates take, and
a batch of 8 with mixed exits against the same questions one by one.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dyvte.flops import prefill_flops
from dyvte.gates import Gates
from dyvte.mllm import MLLM, Batch, wrap
from dyvte.policies.base import Policy
from dyvte.policies.dynamic_exit import DynamicExit, exit_probabilities
from dyvte.policies.fixed_exit import FixedExit

SYSTEM, VISUAL, QUESTION = 35, 576, 29
IMAGE_TOKEN = 99
ROWS = 8


def build(layers: int, width: int, heads: int, device: torch.device, dtype: torch.dtype) -> MLLM:
    """A random LLaVA with a small tower: 336 pixels in patches of 14 make 576 visual tokens."""
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 43 // 16,  # Vicuna's 11008 for 4096
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    torch.manual_seed(0)
    with torch.device(device):
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
        model = LlavaForConditionalGeneration(config)
    return wrap(model.to(dtype))


def make_batch(mllm: MLLM, rows: int, image: bool = True) -> Batch:
    """Random prompts; the first row is the same for any number of rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (rows, SYSTEM + VISUAL + QUESTION), generator=generator)
    if not image:
        text = torch.cat([ids[:, :SYSTEM], ids[:, SYSTEM + VISUAL :]], dim=1)
        return mllm.batch(input_ids=text, attention_mask=torch.ones_like(text))
    ids[:, SYSTEM : SYSTEM + VISUAL] = IMAGE_TOKEN
    pixels = torch.randn(rows, 3, 336, 336, generator=generator)
    return mllm.batch(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)


@dataclass
class Bench:
    """Times prefills; the device is synchronised around each."""

    mllm: MLLM
    repeats: int

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.mllm.device.type == "cuda":
            torch.cuda.synchronize(self.mllm.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one run."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def medians(self, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each run. They take turns, so a slow spell of the machine hits all of them."""
        for run in runs.values():
            run()  # warm up
        rounds = [{name: self.seconds(run) for name, run in runs.items()} for _ in range(self.repeats)]
        return {name: statistics.median(each[name] for each in rounds) for name in runs}

    @torch.no_grad()
    def prefill(self, batch: Batch, policy: Policy | None = None) -> None:
        """Prefill as `generate` does it."""
        with nullcontext() if policy is None else policy(self.mllm):
            self.mllm.model(**batch, use_cache=True, logits_to_keep=1)

    def layer_seconds(self, batch: Batch) -> float:
        """Median seconds that all decoder layers together take in a plain prefill."""
        totals = []
        for _ in range(self.repeats + 1):
            with self._timed_layers() as total:
                self.prefill(batch)
            totals.append(total[0])
        return statistics.median(totals[1:])

    @contextmanager
    def _timed_layers(self) -> Iterator[list[float]]:
        total, started = [0.0], 0.0

        def start(*_: object) -> None:
            nonlocal started
            self.synchronize()
            started = time.perf_counter()

        def stop(*_: object) -> None:
            self.synchronize()
            total[0] += time.perf_counter() - started

        handles = [layer.register_forward_pre_hook(start) for layer in self.mllm.layers]
        handles += [layer.register_forward_hook(stop) for layer in self.mllm.layers]
        try:
            yield total
        finally:
            for handle in handles:
                handle.remove()

    def gate_seconds(self, batch: Batch, policy: DynamicExit) -> float:
        """Median seconds that the gates of one prefill take."""
        spent = 0.0
        decide = DynamicExit.before_layer

        def timed(*arguments: object) -> None:
            nonlocal spent
            spent += self.seconds(lambda: decide(*arguments))  # type: ignore[arg-type]

        totals = []
        with mock.patch.object(DynamicExit, "before_layer", timed):
            for _ in range(self.repeats + 1):
                spent = 0.0
                self.prefill(batch, policy)
                totals.append(spent)
        return statistics.median(totals[1:])


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


def rows_alone(batch: Batch, mllm: MLLM) -> list[Batch]:
    """The rows of a batch without padding, one batch each."""
    return [mllm.batch(**{name: value[row : row + 1] for name, value in batch.items()}) for row in range(ROWS)]


def benchmark(mllm: MLLM, repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the report: what, measured, required."""
    bench, layers = Bench(mllm, repeats), mllm.num_layers
    one, half = make_batch(mllm, 1), FixedExit(layers // 2)
    times = bench.medians({"full": lambda: bench.prefill(one), "half": lambda: bench.prefill(one, half)})
    saved = times["full"] - times["half"]
    of_layer = (bench.layer_seconds(one) - bench.layer_seconds(make_batch(mllm, 1, image=False))) / layers
    predicted = (layers - half.layer) * of_layer
    full_flops = prefill_flops(mllm, one).total
    with half(mllm):
        flops_saved = 1 - prefill_flops(mllm, one).total / full_flops
    never = DynamicExit(Gates(layers, mllm.hidden_size), threshold=2.0)
    gates = bench.gate_seconds(one, never)

    eight = make_batch(mllm, ROWS)
    policy = mixed_exits(mllm, eight)
    alone = rows_alone(eight, mllm)
    batched = bench.medians(
        {
            "batch": lambda: bench.prefill(eight, policy),
            "one by one": lambda: [bench.prefill(each, policy) for each in alone],
        }
    )
    with torch.no_grad(), policy(mllm) as run:
        mllm.model(**eight, logits_to_keep=1)
    exits = sorted(run.exit_layers.tolist())
    time_saved = saved / times["full"]
    return [
        ("prefill of one question", f"{1e3 * times['full']:.1f} ms", ""),
        (f"the same, exit after {half.layer} of {layers} layers", f"{1e3 * times['half']:.1f} ms", ""),
        ("saved, of what timed layers predict", f"{saved / predicted:.3f}", "at least 0.9"),
        ("share of the time saved", f"{time_saved:.3f}", ""),
        ("share of the FLOPs saved", f"{flops_saved:.3f}", ""),
        ("time saved over FLOPs saved", f"{time_saved / flops_saved:.3f}", "reported"),
        (f"{layers - 1} gates, of the prefill", f"{gates / times['full']:.4f}", "below 0.02"),
        (f"batch of {ROWS}, exits {exits}, a question", f"{1e3 * batched['batch'] / ROWS:.1f} ms", ""),
        ("the same one by one, a question", f"{1e3 * batched['one by one'] / ROWS:.1f} ms", "not below the batch"),
    ]


def main() -> None:
    """Run the benchmark and write its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/dynamic_exit.md"))
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    rows = benchmark(build(args.layers, args.width, args.heads, device, dtype), args.repeats)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    lines = [
        "# What a visual-token exit saves in time",
        "",
        f"`python -m analysis.bench_dynamic_exit --layers {args.layers} --width {args.width} --heads {args.heads}`: "
        f"random model, {VISUAL} visual and {SYSTEM + QUESTION} text tokens, {str(dtype).removeprefix('torch.')}, "
        f"{machine}, {platform.machine()}, torch {torch.__version__}; medians of {args.repeats}.",
        "",
        "| | measured | required |",
        "|---|---|---|",
        *(f"| {what} | {value} | {required} |" for what, value, required in rows),
        "",
    ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
