"""How a command measures a data set: batches in turn, each a shard of the run folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig

from dyvte.data import Dataset, Sample
from dyvte.errors import RunFolderError
from dyvte.gates.module import SHIPPED_GATES
from dyvte.loading import SHIPPED_MODELS
from dyvte.mllm import MLLM
from dyvte.runs import distributed, runner
from dyvte.runs.store import RunFolder, fingerprint, plain

T = TypeVar("T")


def measure_dataset(
    cfg: DictConfig, mllm: MLLM, dataset: Dataset, measure: Callable[..., Any], **settings: Any
) -> RunFolder | None:
    """Run a measurement over a data set, going on where an earlier run of the same command was stopped.

    Args:
        measure: turns the samples of a batch into tables.
        **settings: what the tables depend on besides model, data, seed and batch size.

    Returns:
        The folder with the finished tables; None in processes other than the main one.
    """
    made_of = fingerprint(mllm, dataset, cfg, **settings)
    folder = RunFolder.open(cfg.output_dir, made_of, cfg, overwrite=cfg.overwrite)
    batches = runner.consecutive_batches(len(dataset), cfg.batch_size)
    runner.run(folder, dataset, batches, measure, f"{cfg.model.name} on {cfg.data.name}")
    return folder if distributed.is_main() else None


def fill_shards(folder: RunFolder, jobs: Iterable[T], make: Callable[[T], tuple[dict[str, pd.DataFrame], int]]) -> None:
    """Write what `make` says of every job (tables, and how many samples they are of) as a shard, and merge them.

    A job whose shard is there already is left out.
    """
    for index, job in enumerate(jobs):
        if not folder.has_shard(index):
            started = time.perf_counter()
            tables, number = make(job)
            folder.write_shard(index, tables, num_samples=number, seconds=time.perf_counter() - started)
    folder.merge()


def columns_of(samples: Sequence[Sample], *names: str) -> dict[str, list[Any]]:
    """Attributes of some samples, as the columns of a table."""
    return {name: [getattr(sample, name) for sample in samples] for name in names}


def run_facts(cfg: DictConfig, mllm: MLLM) -> dict[str, Any]:
    """What every summary begins with: model, data and depth."""
    return {"model": cfg.model.name, "data": cfg.data.name, "num_layers": mllm.num_layers}


def finish_run(
    folder: RunFolder,
    content: Mapping[str, Any],
    draw: Callable[[dict[str, Any]], Mapping[str, Figure]],
    outline: Callable[[dict[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Save figures and summary, and print what came out, how many samples were left out, and where the results are.

    Args:
        content: of the summary, beside what `RunFolder.write_summary` knows.
        draw: the figures by their names, from that content as JSON types.
        outline: what came out, from the summary, which is returned.
    """
    known: dict[str, Any] = plain(content)
    figures = draw(known)
    for name, figure in figures.items():
        folder.save_figure(name, figure)
    summary = folder.write_summary(**known, figures=sorted(figures))
    if outline is not None:
        print(outline(summary))
    failed = f", {summary['num_failed']} left out (failures.jsonl)" if summary["num_failed"] else ""
    print(f"{summary['num_samples']} samples{failed}; results in {folder.path}")
    return summary


def read_summary(folder: str | Path) -> dict[str, Any]:
    """What a finished run says: its `summary.json`. RunFolderError without one."""
    file = Path(folder) / "summary.json"
    if not file.is_file():
        raise RunFolderError(f"{folder} has no summary.json: the run is not finished, or it is another folder")
    return dict(json.loads(file.read_text()))


def shipped_files() -> dict[str, str]:
    """Digests of what results on the shipped model depend on: its weights with configuration and tokenizer, its gates.

    The model card, which is written after the fact, is left out.
    """
    digests = {}
    for name, folder in (("weights", SHIPPED_MODELS["llava_shapes"]), ("gates", SHIPPED_GATES["llava_shapes"])):
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix != ".md" and not file.name.startswith("."):
                digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
        digests[name] = digest.hexdigest()[:16]
    return digests
