"""What the benchmarks share: a random model of LLaVA-1.5's proportions, its prompts, memory, and the page they write.

Random weights will do, as times and memory depend on shapes alone. The vision tower is too small to matter.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from analysis.statistics.markdown import replace_section
from dyvte import MLLM, Batch, Policy, Unchanged, wrap
from dyvte.cost.measure import PeakMemory
from dyvte.runs.store import write_atomic

PATCHES_PER_SIDE = 24
VISUAL_TOKENS = PATCHES_PER_SIDE**2
SYSTEM_TOKENS, QUESTION_TOKENS = 35, 29
"""Tokens of a prompt; as the number of visual ones, those of LLaVA-1.5."""
PATCH_SIZE = 2
UNCHANGED = Unchanged()
IMAGE_TOKEN, FIRST_TEXT = 1, 2
Measured = TypeVar("Measured")
INTERMEDIATE_RATIO = 11008 / 4096  # of the LLaMA decoder in LLaVA-1.5


def random_llava(
    layers: int,
    hidden: int,
    head_size: int,
    *,
    vocabulary: int = 512,
    vision_layers: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> MLLM:
    """A LLaVA of this depth and width with random weights."""
    heads = hidden // head_size
    text = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": int(hidden * INTERMEDIATE_RATIO)}
    text |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": vision_layers, "num_attention_heads": 1}
    vision |= {"patch_size": PATCH_SIZE, "image_size": PATCH_SIZE * PATCHES_PER_SIDE}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation=attn_implementation, dtype=dtype
    )
    return wrap(model.to(device))


def model_parser(
    description: str | None, page: str, *, layers: int, head_size: int = 64, vocabulary: int = 512
) -> argparse.ArgumentParser:
    """`page_parser` with the sizes of a model, which `model_of` makes, and the device that it is measured on."""
    parser = page_parser(description, page)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--head-size", type=int, default=head_size)
    parser.add_argument("--vocabulary", type=int, default=vocabulary)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, float16 on a GPU")
    return parser


def model_of(options: argparse.Namespace) -> MLLM:
    """The random model that options of `model_parser` describe."""
    return random_llava(
        options.layers,
        options.hidden,
        options.head_size,
        vocabulary=options.vocabulary,
        device=options.device,
        dtype=getattr(torch, _dtype(options)),
    )


def model_note(options: argparse.Namespace) -> str:
    """What was measured on what."""
    return (
        f"{machine(options.device)}, {_dtype(options)}, random weights: {options.layers} layers, hidden "
        f"{options.hidden}, heads of {options.head_size}"
    )


def _dtype(options: argparse.Namespace) -> str:
    return options.dtype or ("float32" if options.device == "cpu" else "float16")


def random_prompts(
    mllm: MLLM,
    rows: int,
    system: int = SYSTEM_TOKENS,
    question: int = QUESTION_TOKENS,
    *,
    images: int = 1,
    same_image: bool = False,
    generator: torch.Generator | None = None,
) -> Batch:
    """Prompts of a `random_llava`: system tokens, images, question; without a generator always the same ones.

    Args:
        images: of each prompt; 0 makes prompts of text alone.
        same_image: all rows have the system tokens and the images of the first.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    own = 1 if same_image else rows

    def text(number: int, length: int) -> torch.Tensor:
        return torch.randint(FIRST_TEXT, mllm.text_config.vocab_size, (number, length), generator=generator)

    visual = torch.full((own, images * VISUAL_TOKENS), IMAGE_TOKEN)
    prefix = torch.cat([text(own, system), visual], dim=1).expand(rows, -1)
    ids = torch.cat([prefix, text(rows, question)], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        side = PATCH_SIZE * PATCHES_PER_SIDE
        pixels = torch.randn(own, images, 3, side, side, generator=generator).expand(rows, -1, -1, -1, -1)
        inputs["pixel_values"] = pixels.flatten(0, 1)
    return mllm.batch(**inputs)


@torch.no_grad()
def prefill(mllm: MLLM, batch: Batch, policy: Policy = UNCHANGED) -> Any:
    """Prefill as `generate` does it. Returns the KV cache."""
    with policy(mllm):
        return mllm.model(**batch, use_cache=True, logits_to_keep=1).past_key_values


def decoding_steps(mllm: MLLM, batch: Batch, cache: Any, number: int, done: int = 0) -> Iterator[Callable[[], object]]:
    """So many calls that each decode one token of every row, to be made in order, after `done` of them."""
    ids, mask = batch["input_ids"][:, -1:], batch["attention_mask"]
    for place in range(done + 1, done + 1 + number):
        longer = torch.cat([mask, torch.ones_like(mask[:, :1]).expand(-1, place)], dim=1)
        yield partial(mllm.model, input_ids=ids, attention_mask=longer, past_key_values=cache, use_cache=True)


# -------------------------------------------------------------------- time and memory


def now(device: torch.device) -> float:
    """Seconds of the performance counter, when the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run()` takes, the device's work included."""
    start = now(device)
    run()
    return now(device) - start


def in_turns(timed: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> list[dict[str, float]]:
    """The seconds of each run in every round; the first rounds warm up and are left out."""
    return [{name: run() for name, run in timed.items()} for _ in range(warm_up + rounds)][warm_up:]


def extra_mib(run: Callable[[], object], device: str = "cpu") -> float:
    """MiB needed at most while `run()` works, above what was held before it.

    Allocated on a GPU, resident in the process on a CPU. What earlier work of the process has left to its allocator is
    used again without being counted, so measure in a process of its own (`measured_apart`).
    """
    if device != "cpu":
        with PeakMemory(torch.device(device)) as memory:
            run()
        return memory.bytes / 2**20
    if not sys.platform.startswith("linux"):
        raise RuntimeError("the resident memory of a process is measured on Linux only")
    Path("/proc/self/clear_refs").write_text("5")  # restarts the kernel's record of the peak
    resident = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - resident


def _status_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(rf"^{name}:\s*(\d+) kB$", status, re.MULTILINE)
    return int(kib) / 1024


def measured_apart(function: Callable[..., Measured], *arguments: Any) -> Measured:
    """What a function gives in a process of its own, which has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


# ------------------------------------------------------------------------------- page


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one value, that value three times."""
    known = list(values)
    low, middle, high = statistics.quantiles(known, method="inclusive") if len(known) > 1 else known * 3
    return low, middle, high


def spread(values: Iterable[float], digits: int) -> str:
    """The median, with the quartiles in brackets."""
    low, middle, high = (f"{value:.{digits}f}" for value in quartiles(values))
    return f"{middle} [{low}, {high}]"


def machine(device: str | torch.device = "cpu") -> str:
    """Processor, threads and versions that a measurement was made with."""
    kind = torch.device(device)
    if kind.type == "cuda":
        where = torch.cuda.get_device_name(kind)
    else:
        threads = torch.get_num_threads()
        where = f"{_processor()}, {threads} thread{'s' * (threads != 1)}"
    return f"{where}, torch {torch.__version__}, transformers {transformers.__version__}"


def _processor() -> str:
    """The processor's name: Python gives its architecture alone on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def page_parser(description: str | None, page: str) -> argparse.ArgumentParser:
    """The options of a benchmark that writes `docs/benchmarks/<page>.md`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    file = Path("docs/benchmarks") / f"{page}.md"
    parser.add_argument("--output", type=Path, default=file, help="page to write (default: %(default)s)")
    return parser


def paragraphs(*parts: str | Sequence[str]) -> list[str]:
    """The lines of headings, paragraphs, and tables (given as their lines), with an empty line between them."""
    lines = [line for part in parts for line in ("", *([part] if isinstance(part, str) else part))]
    return lines[1:]


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Print a page, and write it whole or not at all."""
    text = "\n".join(lines) + "\n"
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda out: out.write(text.encode()))
    print(f"wrote {path}")


def write_section(path: Path, name: str, lines: Sequence[str]) -> None:
    """Print a part of a page, and write it between the page's comments `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ConfigError: the page lacks the two comments.
    """
    text = "\n".join(lines)
    print(text)
    after = replace_section(path.read_text(), name, text)
    write_atomic(path, lambda out: out.write(after.encode()))
    print(f"wrote {path}, {name}")
