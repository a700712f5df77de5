"""`python -m analysis.gate_recipes`: options of the gates' recipe side by side on validation data, and their page."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from dyvte.data.base import build_dataset
from dyvte.gates.labels import collect_labels
from dyvte.runs import distributed
from dyvte.runs.config import command, load_model
from dyvte.runs.store import RunFolder, write_atomic
from dyvte.train import fit_gates, label_settings, split_labels

from .statistics.markdown import markdown_table

FIGURES = ("mean_cost", "cost_at_0.985", "cost_at_0.99", "cost_at_0.995", "withheld_less_seen", "dose_slope", "inputs")
"""Of every option, from `dyvte.gates.validation`; `inputs` is the numbers that a gate looks at."""


@command("gate_recipes")
def main(cfg: DictConfig) -> None:
    """Train and compare the options that `conf/gate_recipes.yaml` names."""
    mllm, dataset = load_model(cfg), build_dataset(cfg.data)
    labels = collect_labels(mllm, dataset, cfg, cfg.labels.dir, label_settings(cfg.labels))
    made_of = json.loads((labels.folder.path / "fingerprint.json").read_text())
    variants: dict[str, Any] = OmegaConf.to_container(cfg.variants, resolve=True)  # type: ignore[assignment]
    settings = {"recipe": OmegaConf.to_container(cfg.recipe, resolve=True), "share": cfg.validation_share}
    folder = RunFolder.open(cfg.output_dir, {"labels": made_of, "settings": settings, "variants": variants}, cfg)
    if not distributed.is_main():
        return
    for index, (name, changes) in enumerate(variants.items()):
        if folder.has_shard(index):
            continue
        started = time.perf_counter()
        own = cfg.copy()
        own.recipe = OmegaConf.merge(cfg.recipe, changes)
        parts = list(own.recipe.status)
        fit = fit_gates(mllm.num_layers, mllm.hidden_size, split_labels(labels, own), own, parts, mllm.device)
        row = {"option": name, "inputs": fit.gates.shift.shape[1], **fit.validation}
        seconds = time.perf_counter() - started
        folder.write_shard(index, {"recipes": pd.DataFrame([row])}, num_samples=1, seconds=seconds)
        print(f"{name}: {', '.join(f'{key} {row[key]:.4g}' for key in FIGURES if key in row)} ({seconds:.0f} s)")
    folder.merge()
    table = folder.read_table("recipes")
    folder.write_summary(
        model=cfg.model.name,
        data=cfg.data.name,
        num_layers=mllm.num_layers,
        num_samples=len(labels),
        num_failed=len(labels.folder.failures()),
        seconds=labels.folder.seconds,
        options=len(table),
    )
    text = page(cfg, table, len(split_labels(labels, cfg).validation))
    if cfg.page is not None:
        write_atomic(Path(cfg.page), lambda out: out.write(text.encode()))
    print(text)


def page(cfg: DictConfig, table: pd.DataFrame, validation_questions: int) -> str:
    """The whole page: one row an option, the cheapest that waits for the image named."""
    rows = [[each["option"], *(_cell(each.get(key), key) for key in FIGURES)] for each in table.to_dict("records")]
    waiting = table[(table["withheld_less_seen"] < 0) & (table["dose_slope"] > 0)]
    best = waiting.sort_values("mean_cost")["option"].iloc[0] if len(waiting) else None
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


def _cell(value: float | None, key: str) -> str:
    if value is None or value != value:
        return "–"
    return str(int(value)) if key == "inputs" else f"{value:+.4f}" if key == "dose_slope" else f"{value:.3f}"


if __name__ == "__main__":
    main()
