"""`python -m analysis.gate_recipes`: options of the gates' recipe side by side on validation data, and their page."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from dyvte.data.base import build_dataset
from dyvte.gates.labels import LabelSet, collect_labels
from dyvte.gates.training import gate_probabilities
from dyvte.gates.validation import AGREEMENTS, threshold_frontier
from dyvte.mllm import MLLM
from dyvte.runs import distributed
from dyvte.runs.config import command, load_model
from dyvte.runs.store import RunFolder, write_atomic
from dyvte.train import Split, fit_gates, label_settings, split_labels

from .measuring.runs import run_facts
from .statistics.bands import Band, ImageBootstrap
from .statistics.gates.recipes import cost_differences
from .statistics.markdown import markdown_table, with_limits

FIGURES = ("mean_cost", "cost_at_0.985", "cost_at_0.99", "cost_at_0.995", "withheld_less_seen", "dose_slope", "inputs")
"""Of every option, from `dyvte.gates.validation`; `inputs` is the numbers that a gate looks at."""
IMAGE_COLUMNS = ["withheld less seen", "slope", "inputs"]
SEED = "seed"
"""Key of an option beside those of the recipe: of the training alone, the questions are held out as for all others."""
SAID = "said"
"""Table of an option's folder: what every gate says of every validation question."""


@command("gate_recipes")
def main(cfg: DictConfig) -> str | None:
    """Train and compare the options that `conf/gate_recipes.yaml` names."""
    mllm, dataset = load_model(cfg), build_dataset(cfg.data)
    labels = collect_labels(mllm, dataset, cfg, cfg.labels.dir, label_settings(cfg.labels))
    options: dict[str, Any] = OmegaConf.to_container(cfg.options, resolve=True)  # type: ignore[assignment]
    folders = {name: option_folder(cfg, labels, changes) for name, changes in options.items()}
    if not distributed.is_main():
        return None
    rows, frontiers = [], {}
    for name, (folder, own) in folders.items():
        split = split_labels(labels, OmegaConf.merge(own, {"seed": cfg.seed}))  # type: ignore[arg-type]
        if not (file := folder.path / "summary.json").is_file():
            train_option(cfg, folder, own, split, mllm)
        rows.append({"option": name, **json.loads(file.read_text())})
        said = torch.from_numpy(folder.read_table(SAID).to_numpy(copy=True))
        asked = labels.agree[split.validation], labels.cost[split.validation]
        frontiers[name] = threshold_frontier(said, *asked, own.recipe.caution)
        print(", ".join([name, *(f"{key} {rows[-1][key]:.4g}" for key in FIGURES if key in rows[-1])]))
    table = pd.DataFrame(rows)
    images = split.column("image_id", split.validation)
    bootstrap = ImageBootstrap(images, cfg.bootstrap, cfg.seed)
    apart = cost_differences(frontiers, next(iter(folders)), bootstrap, AGREEMENTS)
    text = page(cfg, table, apart, len(images), bootstrap.num_images)
    if cfg.page is not None:
        write_atomic(Path(cfg.page), lambda out: out.write(text.encode()))
    print(text)
    best = cheapest_that_waits(table)
    return f"the cheapest option that waits for the image: {best}." if best else "no option waits for the image."


def train_option(cfg: DictConfig, folder: RunFolder, own: DictConfig, split: Split, mllm: MLLM) -> None:
    """Train gates as an option says, and write what they say of the validation questions and what they reach there."""
    started, parts = time.perf_counter(), list(own.recipe.status)
    fit = fit_gates(mllm, split, own, parts)
    said = gate_probabilities(fit.gates, split.labels.status(parts)[split.validation])
    folder.write_table(SAID, pd.DataFrame(said.numpy(), columns=[f"gate_{k}" for k in range(1, mllm.num_layers)]))
    folder.write_summary(
        **run_facts(cfg, mllm),
        num_samples=len(split.labels),
        training_seconds=round(time.perf_counter() - started, 1),
        inputs=fit.gates.shift.shape[1],
        **fit.validation,
    )


def option_folder(cfg: DictConfig, labels: LabelSet, changes: dict[str, Any]) -> tuple[RunFolder, DictConfig]:
    """The folder of an option, whose name follows from its settings, and its configuration."""
    own, of_recipe = cfg.copy(), dict(changes)
    own.seed = of_recipe.pop(SEED, cfg.seed)
    own.recipe = OmegaConf.merge(cfg.recipe, of_recipe)
    settings = {
        "labels": json.loads((labels.folder.path / "fingerprint.json").read_text()),
        "recipe": OmegaConf.to_container(own.recipe, resolve=True),
        "validation_share": cfg.validation_share,
        "seed": own.seed,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return RunFolder.open(Path(cfg.output_dir) / digest, settings, cfg), own


def page(cfg: DictConfig, table: pd.DataFrame, apart: Mapping[str, Band], questions: int, images: int) -> str:
    """The whole page: one row an option, the cheapest that waits for the image named.

    Args:
        table: `option` and `FIGURES` of every option, the one that all are compared with first.
        apart: mean cost of every other option less that of the first.
    """
    base = table["option"].iloc[0]
    differences = {name: with_limits(band.to_dict(), "+.3f", "mean") for name, band in apart.items()}
    rows = []
    for each in table.to_dict("records"):
        mean, *rest = (_cell(each.get(key), key) for key in FIGURES)
        rows.append([each["option"], mean, differences.get(each["option"], ""), *rest])
    best = cheapest_that_waits(table)
    shared: Sequence[str] = cfg.recipe.training.counterfactual
    lines = [
        "# Options of the gates' recipe",
        "",
        f"`python -m analysis.gate_recipes data.limit={cfg.data.limit} page=docs/gate_recipes.md` wrote this page. "
        f"{questions:,} held-out questions of `{cfg.data.name}` about {images:,} images that no gate was trained on; "
        "none of them is asked in [gate_claims.md](gate_claims.md). Every option changes one thing about gates that "
        f"look at {', '.join(cfg.recipe.status)} and learn from other runs ({', '.join(shared)}); one gate a layer of "
        f"width {cfg.recipe.width}, trained once (seed {cfg.seed}).",
        "",
        "Cost is decoder FLOPs over the full model's at equal agreement with its answers, whatever the threshold; "
        f"`mean` is over the three, and `less {base}` what an option costs more than the first, with 95% intervals "
        f"that hold for all options at once (paired bootstrap over images, {cfg.bootstrap:,} draws; how much another "
        "seed of the training changes is a row of its own). p(exit) of a status that never saw the image less that of "
        "the full model's is below 0, and the slope of p(exit) over the layers that saw the image above 0, where gates "
        "wait for the image.",
        "",
        *markdown_table(
            ["option", "mean", f"less {base}", *(f"at {each:.1%}" for each in AGREEMENTS), *IMAGE_COLUMNS], rows
        ),
        "",
        *_in_words(apart),
        f"Cheapest of those that wait for the image: **{best}**." if best else "No option waits for the image.",
    ]
    return "\n".join(lines) + "\n"


def cheapest_that_waits(table: pd.DataFrame) -> str | None:
    """The option of least cost among those whose gates wait for the image."""
    waiting = table[(table["withheld_less_seen"] < 0) & (table["dose_slope"] > 0)]
    return str(waiting.sort_values("mean_cost")["option"].iloc[0]) if len(waiting) else None


def _in_words(apart: Mapping[str, Band]) -> list[str]:
    """Which options are cheaper or dearer than the first beyond chance."""
    cheaper = [name for name, band in apart.items() if band.high < 0]
    dearer = [name for name, band in apart.items() if band.low > 0]
    known = [f"{word}: {', '.join(names)}" for word, names in (("Cheaper", cheaper), ("Dearer", dearer)) if names]
    return [*(f"{each} (the interval excludes 0)." for each in known), ""] if known else []


def _cell(value: float | None, key: str) -> str:
    if value is None or value != value:
        return "–"
    return str(int(value)) if key == "inputs" else f"{value:+.4f}" if key == "dose_slope" else f"{value:.3f}"


if __name__ == "__main__":
    main()
