"""`python -m analysis.gate_recipes`: options of the gates' recipe side by side on validation data, and their page."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from dyvte.data.base import build_dataset
from dyvte.gates.labels import LabelSet, collect_labels
from dyvte.runs import distributed
from dyvte.runs.config import command, load_model
from dyvte.runs.store import RunFolder, write_atomic
from dyvte.train import fit_gates, label_settings, split_labels

from .statistics.markdown import markdown_table

FIGURES = ("mean_cost", "cost_at_0.985", "cost_at_0.99", "cost_at_0.995", "withheld_less_seen", "dose_slope", "inputs")
"""Of every option, from `dyvte.gates.validation`; `inputs` is the numbers that a gate looks at."""


@command("gate_recipes")
def main(cfg: DictConfig) -> str | None:
    """Train and compare the options that `conf/gate_recipes.yaml` names."""
    mllm, dataset = load_model(cfg), build_dataset(cfg.data)
    labels = collect_labels(mllm, dataset, cfg, cfg.labels.dir, label_settings(cfg.labels))
    options: dict[str, Any] = OmegaConf.to_container(cfg.options, resolve=True)  # type: ignore[assignment]
    folders = {name: option_folder(cfg, labels, changes) for name, changes in options.items()}
    if not distributed.is_main():
        return None
    rows = []
    for name, (folder, own) in folders.items():
        if not (file := folder.path / "summary.json").is_file():
            started = time.perf_counter()
            split, parts = split_labels(labels, own), list(own.recipe.status)
            fit = fit_gates(mllm.num_layers, mllm.hidden_size, split, own, parts, mllm.device)
            folder.write_summary(
                model=cfg.model.name,
                data=cfg.data.name,
                num_layers=mllm.num_layers,
                num_samples=len(labels),
                training_seconds=round(time.perf_counter() - started, 1),
                inputs=fit.gates.shift.shape[1],
                **fit.validation,
            )
        rows.append({"option": name, **json.loads(file.read_text())})
        print(", ".join([name, *(f"{key} {rows[-1][key]:.4g}" for key in FIGURES if key in rows[-1])]))
    table = pd.DataFrame(rows)
    text = page(cfg, table, len(split_labels(labels, cfg).validation))
    if cfg.page is not None:
        write_atomic(Path(cfg.page), lambda out: out.write(text.encode()))
    print(text)
    best = cheapest_that_waits(table)
    return f"the cheapest option that waits for the image: {best}." if best else "no option waits for the image."


def option_folder(cfg: DictConfig, labels: LabelSet, changes: dict[str, Any]) -> tuple[RunFolder, DictConfig]:
    """The folder of an option, whose name follows from its settings, and its configuration."""
    own = cfg.copy()
    own.recipe = OmegaConf.merge(cfg.recipe, changes)
    settings = {
        "labels": json.loads((labels.folder.path / "fingerprint.json").read_text()),
        "recipe": OmegaConf.to_container(own.recipe, resolve=True),
        "validation_share": cfg.validation_share,
        "seed": cfg.seed,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return RunFolder.open(Path(cfg.output_dir) / digest, settings, cfg), own


def page(cfg: DictConfig, table: pd.DataFrame, validation_questions: int) -> str:
    """The whole page: one row an option, the cheapest that waits for the image named."""
    rows = [[each["option"], *(_cell(each.get(key), key) for key in FIGURES)] for each in table.to_dict("records")]
    best = cheapest_that_waits(table)
    shared: Sequence[str] = cfg.recipe.training.counterfactual
    lines = [
        "# Options of the gates' recipe",
        "",
        f"`python -m analysis.gate_recipes page=docs/gate_recipes.md` wrote this page. {validation_questions:,} "
        f"held-out questions of `{cfg.data.name}` about images that no gate was trained on; none of them is asked in "
        "[gate_claims.md](gate_claims.md). Every option changes one thing about gates that look at "
        f"{', '.join(cfg.recipe.status)} and learn from other runs ({', '.join(shared)}).",
        "",
        "Cost is decoder FLOPs over the full model's at equal agreement with its answers, whatever the threshold; "
        "`mean` is over the three. p(exit) of a status that never saw the image less that of the full model's is below "
        "0, and the slope of p(exit) over the layers that saw the image above 0, where gates wait for the image.",
        "",
        *markdown_table(
            ["option", "mean", "at 98.5%", "at 99%", "at 99.5%", "withheld less seen", "slope", "inputs"], rows
        ),
        "",
        f"Cheapest of those that wait for the image: **{best}**." if best else "No option waits for the image.",
    ]
    return "\n".join(lines) + "\n"


def cheapest_that_waits(table: pd.DataFrame) -> str | None:
    """The option of least cost among those whose gates wait for the image."""
    waiting = table[(table["withheld_less_seen"] < 0) & (table["dose_slope"] > 0)]
    return str(waiting.sort_values("mean_cost")["option"].iloc[0]) if len(waiting) else None


def _cell(value: float | None, key: str) -> str:
    if value is None or value != value:
        return "–"
    return str(int(value)) if key == "inputs" else f"{value:+.4f}" if key == "dose_slope" else f"{value:.3f}"


if __name__ == "__main__":
    main()
