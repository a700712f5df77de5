"""``python -m analysis.tables experiment=NAME``: the paper's tables, and every method at matched cost, on one model.

Methods get settings at which they cost the same (`dyvte.policies.method`), answer the same questions and are
compared with intervals: overall, and on the questions that need the image. What is finished is kept and reused.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from dyvte.data.base import build_dataset
from dyvte.errors import ConfigError
from dyvte.evaluate import policy_digest, reference_labels
from dyvte.gates.labels import LabelSet
from dyvte.instrument.vision_tower import ImageMemory
from dyvte.mllm import MLLM
from dyvte.policies.exits.dynamic_exit import DynamicExit
from dyvte.policies.registry import labels
from dyvte.runs import distributed
from dyvte.runs.config import command, load_model
from dyvte.runs.store import RunFolder, fingerprint
from dyvte.runs.terminal import progress

from .measuring.methods import REMEMBERED_BYTES, encoded, gates_of, load_calibration, plan, run_job
from .measuring.runs import run_facts
from .plots.methods import draw_methods_at_cost
from .plots.style import figure_style
from .statistics.markdown import write_table_page
from .statistics.methods import (
    compare_methods,
    comparison_page,
    leaders_in_words,
    outcome_row,
    outcomes_of,
    rows_by_kind,
)
from .statistics.needs_image import in_words, known_hops, needs_image

OF_GATES = ("statuses", "train_on_kinds", "other_gates")
"""Settings of an experiment that only `analysis.measuring.gate_tables` reads."""


@command("tables")
def main(cfg: DictConfig) -> str | None:
    """Make the table that `conf/experiment/` names."""
    summary = tables(cfg)
    return summary["in_words"] if summary else None


def tables(cfg: DictConfig) -> dict[str, Any] | None:
    """Run what is missing of an experiment and write its table; None in all processes but the first."""
    experiment = cfg.experiment
    if experiment.measures == "cost":
        from .cost import cost

        return cost(cfg)
    if experiment.measures == "gates":
        from .measuring.gate_tables import gate_table

        return gate_table(cfg)
    mllm, dataset, gates = load_model(cfg), build_dataset(cfg.data), gates_of(cfg)
    reference = reference_labels(mllm, dataset, cfg)
    asked: Any = OmegaConf.to_container(experiment, resolve=True)
    settings = {
        "experiment": {key: value for key, value in asked.items() if key not in OF_GATES},
        "calibration": OmegaConf.to_container(cfg.calibration, resolve=True),
        "gates": None if gates is None else policy_digest(DynamicExit(gates)),
        "max_new_tokens": cfg.max_new_tokens,
        "fixed_exits": "best pair of layers on the calibration prompts",
    }
    folder = RunFolder.open(cfg.output_dir, fingerprint(mllm, dataset, cfg, **settings), cfg, cfg.overwrite)
    jobs = plan(experiment)
    mine = range(distributed.rank(), len(jobs), distributed.world_size())
    todo = [index for index in mine if not folder.has_shard(index)]
    if todo:
        batches = list(encoded(mllm, dataset, cfg.batch_size))
        calibration = load_calibration(mllm, cfg, gates, experiment.counted)
        memory = ImageMemory(REMEMBERED_BYTES)
        settings_of_bar = {"initial": len(mine) - len(todo), "disable": not distributed.is_main()}
        with progress(experiment.name, "settings of methods", len(mine), **settings_of_bar) as bar:
            for index in todo:
                started = time.perf_counter()
                found = run_job(jobs[index], calibration, batches, cfg.max_new_tokens, memory)
                folder.write_shard(index, found, num_samples=len(dataset), seconds=time.perf_counter() - started)
                bar.update()
    distributed.barrier()
    if not distributed.is_main():
        return None
    folder.merge()
    return report(cfg, mllm, folder, reference)


def report(cfg: DictConfig, mllm: MLLM, folder: RunFolder, reference: LabelSet) -> dict[str, Any]:
    """Write the table (Parquet, CSV, Markdown), the figure and the summary."""
    images = reference.samples["image_id"].tolist()
    kinds = reference.samples["kind"].astype(str).to_numpy()
    hops = [known_hops(json.loads(text)) for text in reference.samples["metadata"]]
    needed, said_by = needs_image(hops, ~reference.agree[:, 0].numpy())
    found = outcomes_of(folder, reference, cfg.experiment)
    if not found:
        raise ConfigError(f"experiment {cfg.experiment.name}: no method can meet any of its budgets")
    subsets = {"accuracy": np.ones(len(images), dtype=bool), "accuracy_needs_image": needed}
    rows = [outcome_row(each, subsets, images) for each in found]
    folder.write_table("comparison", pd.DataFrame(rows))
    by_kind = rows_by_kind(found, kinds, images)
    folder.write_table("kinds", pd.DataFrame(by_kind))
    verdicts = compare_methods(found, subsets, images, cfg)
    note = (
        f"{len(images)} questions about {len(set(images))} images ({int(needed.sum())} {in_words(said_by)}); "
        "intervals 95%, clustered by image"
    )
    leading = {
        (each["on"], each["budget"]): {method: method in each["not_told_apart"] for method in each["lead"]}
        | {each["ahead"]: True}
        for each in verdicts
    }
    with figure_style():
        folder.save_figure("accuracy_against_cost", draw_methods_at_cost(rows, leading, labels(), note))
    write_table_page(folder, comparison_page(cfg, rows, by_kind, verdicts, note))
    return folder.write_summary(
        **run_facts(cfg, mllm),
        num_samples=len(images),
        num_images=len(set(images)),
        experiment=cfg.experiment.name,
        counted=cfg.experiment.counted,
        needs_image=int(needed.sum()),
        needs_image_by=said_by,
        tolerance=cfg.experiment.tolerance,
        rows=rows,
        verdicts=verdicts,
        in_words=leaders_in_words(verdicts),
    )


if __name__ == "__main__":
    main()
