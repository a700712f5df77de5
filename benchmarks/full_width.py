"""LLaVA-1.5-7B's architecture at full width and reduced depth through the commands: time and peak memory.

    python -m benchmarks.full_width      # writes docs/benchmarks/full_width.md (needs 10 GiB of memory, 5 of disk)

The model has random weights in float32, the published vision tower and projector, and a few of its decoder layers. It
answers questions of the built-in task, 576 visual tokens each, which it cannot do; what is shown is that every command
takes a model of this width, and at what cost. Each command runs in a process of its own, which loads the model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil

from analysis.measuring.runs import read_summary
from analysis.statistics.markdown import markdown_table
from benchmarks import architectures
from benchmarks.common import machine, page_parser, paragraphs, write_page
from dyvte.testbed.tokenizer import build_processor

SEED = 0


@dataclass(frozen=True)
class Run:
    """One command and what it took.

    Attributes:
        seconds: from start to end of its process.
        work_seconds: on the samples alone, as its summary says.
        peak_bytes: most memory that the process had resident.
    """

    command: str
    samples: int
    seconds: float
    work_seconds: float
    peak_bytes: int


def write_model(settings: dict[str, Any], layers: int, folder: Path) -> dict[str, Any]:
    """Save a random float32 model of so many decoder layers and its processor; returns the sizes for the report."""
    config = architectures.build_config(settings)
    config.text_config.num_hidden_layers = layers
    processor = build_processor(config.vision_config.patch_size)
    side = config.vision_config.image_size
    processor.image_processor = CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False)
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    torch.manual_seed(SEED)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "hidden": config.text_config.hidden_size,
        "heads": config.text_config.num_attention_heads,
        "vision_layers": config.vision_config.num_hidden_layers,
        "vision_width": config.vision_config.hidden_size,
        "visual_tokens": (side // config.vision_config.patch_size) ** 2,
    }


def commands(model: Path, folder: Path, samples: int, train_samples: int) -> list[tuple[str, int, list[str]]]:
    """Name, number of questions and words of every command."""
    common = ["model=hf", f"model.path={model}", "device=cpu", "batch_size=2"]
    few = [f"data.limit={samples}", "bootstrap=100"]
    short = "max_new_tokens=4"
    reference = [f"comparison_dir={folder}/compare", f"reference_dir={folder}/reference"]
    training = [f"data.limit={train_samples}", "data.per_scene=1", f"labels.{short}", f"labels.dir={folder}/labels"]
    training += ["validation_share=0.5", "recipe.training.members=1"]
    gates = ["policy=dynamic_exit", f"policy.gates={folder}/train/gates"]
    found = [
        ("analysis.stages", samples, few),
        ("analysis.exits", samples, [*few, "permutations=99", "captions=0", short]),
        ("dyvte.train", train_samples, training),
        ("dyvte.evaluate", samples, [f"data.limit={samples}", short, *reference, *gates]),
    ]
    return [
        (name, number, [*common, *words, f"output_dir={folder}/{name.partition('.')[2]}"])
        for name, number, words in found
    ]


def run_command(module: str, samples: int, words: list[str], folder: Path) -> Run:
    """Run one command to its end."""
    log = folder / f"{module}.log"
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", module, *words], stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{module} failed: ...{log.read_text()[-2000:]}")
    work = read_summary(words[-1].removeprefix("output_dir="))["seconds"]
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{module}: {seconds:.0f} s, {peak / 2**30:.1f} GiB", file=sys.stderr, flush=True)
    return Run(module, samples, seconds, work, peak)


def report(name: str, layers: int, facts: dict[str, Any], runs: list[Run]) -> list[str]:
    """The lines of the page."""
    weights = 4 * facts["parameters"]
    columns = ["command", "questions", "whole process, s", "work on the questions, s", "peak resident memory, GiB"]
    rows = [
        [
            *(f"`{run.command}`", run.samples, f"{run.seconds:.0f}", f"{run.work_seconds:.0f}"),
            *(f"{each / 2**30:.1f}" for each in (run.peak_bytes, run.peak_bytes - weights)),
        ]
        for run in runs
    ]
    return paragraphs(
        "# Full width, reduced depth",
        "Written by `python -m benchmarks.full_width`.",
        f"{machine()}, float32. The architecture of `{name}` with {layers} decoder layers and random weights: hidden "
        f"{facts['hidden']:,}, {facts['heads']} heads, a vision tower of {facts['vision_layers']} layers and width "
        f"{facts['vision_width']:,}, {facts['visual_tokens']} visual tokens; {facts['parameters'] / 1e9:.2f} billion "
        f"parameters, {weights / 2**30:.1f} GiB. Batches of 2, answers of at most 4 tokens.",
        markdown_table([*columns, "above the weights, GiB"], rows),
        "`dyvte.train` labels its questions under every exit and trains the gates. The whole process includes starting "
        "Python and reading the weights, and for `dyvte.evaluate` the labels of every exit that it compares with.",
    )


def main() -> None:
    """Build, run, print and write the report."""
    parser = page_parser(__doc__, "full_width")
    parser.add_argument("--model", default="llava7b", choices=["llava7b", "llava13b"])
    parser.add_argument("--layers", type=int, default=2, help="decoder layers")
    parser.add_argument("--samples", type=int, default=4, help="questions of stages, exits and evaluate")
    parser.add_argument("--train-samples", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="for the model and the runs; by default one that is deleted")
    parser.add_argument("--small", action="store_true", help="a narrow model, to try this program")
    options = parser.parse_args()
    known = architectures.architecture(options.model)
    settings = architectures.small_settings(known) if options.small else known.config
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        facts = write_model(settings, options.layers, folder / "model")
        todo = commands(folder / "model", folder, options.samples, options.train_samples)
        runs = [run_command(*each, folder=folder) for each in todo]
    write_page(options.output, report(options.model, options.layers, facts, runs))


if __name__ == "__main__":
    main()
