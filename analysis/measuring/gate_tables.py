"""Tables about gates: what they look at (Table 3 of the paper), and what they were trained on (Table 6).

One label set of training questions serves all gates, and one of the asked questions says what each of their exits makes
of the answers, so no gate runs the model again. An exit that gates choose here is the one that `DynamicExit` takes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from dyvte.data.base import build_dataset
from dyvte.errors import DataError
from dyvte.evaluate import reference_labels
from dyvte.gates.labels import LabelSet, LabelSettings, collect_labels
from dyvte.gates.metrics import at_exit, first_exit
from dyvte.gates.module import Gates, load_gates
from dyvte.gates.training import gate_probabilities
from dyvte.instrument.states import STATUS_PARTS
from dyvte.mllm import MLLM
from dyvte.runs import distributed
from dyvte.runs.config import load_model
from dyvte.runs.store import RunFolder, fingerprint
from dyvte.runs.terminal import progress
from dyvte.train import Split, fit_gates, split_labels

from ..statistics.bands import rate_band
from ..statistics.markdown import heading, markdown_table, percent_with_limits, published, write_table_page
from .runs import fill_shards, run_facts


@dataclass(frozen=True)
class Variant:
    """Gates to compare, which look at parts of the status.

    Attributes:
        kind: the kind of question that they are trained on alone; None for all.
        source: folder or Hub id of gates that are there already, which are not trained.
    """

    name: str
    status: tuple[str, ...] = ()
    kind: str | None = None
    source: str | None = None


def gate_table(cfg: DictConfig) -> dict[str, Any] | None:
    """Train the gates of an experiment, compare their exits, and write the table; None but in the first process.

    Raises:
        ModelError: ready gates are for a model of another width or depth.
        DataError: a kind of question has too few training questions.
    """
    mllm, dataset = load_model(cfg), build_dataset(cfg.data)
    asked = reference_labels(mllm, dataset, cfg, STATUS_PARTS)
    training = training_labels(mllm, cfg)
    settings = {
        "experiment": OmegaConf.to_container(cfg.experiment, resolve=True),
        "recipe": OmegaConf.to_container(cfg.recipe, resolve=True),
        "training": json.loads((training.folder.path / "fingerprint.json").read_text()),
        "validation_share": cfg.validation_share,
        "train_samples": cfg.train_samples,
        "max_new_tokens": cfg.max_new_tokens,
    }
    folder = RunFolder.open(cfg.output_dir, fingerprint(mllm, dataset, cfg, **settings), cfg, cfg.overwrite)
    if not distributed.is_main():
        return None
    split = split_labels(training, cfg)

    def made_and_asked(variant: Variant) -> tuple[dict[str, pd.DataFrame], int]:
        gates = load_gates(variant.source) if variant.source else train_variant(mllm, variant, split, cfg)
        gates.check(mllm)
        exits = first_exit(gate_probabilities(gates, asked.status(list(gates.status))), gates.thresholds())
        about = pd.DataFrame([{"gates": variant.name, "status": "+".join(gates.status)}])
        return {"exits": outcome_of(exits, asked).assign(gates=variant.name), "gates": about}, len(asked)

    fill_shards(folder, progress(cfg.experiment.name, "sets of gates", variants(cfg.experiment, split)), made_and_asked)
    return report(cfg, mllm, folder, asked)


def training_labels(mllm: MLLM, cfg: DictConfig) -> LabelSet:
    """The label set that gates are trained on, made or finished."""
    own = copy.deepcopy(cfg)
    with open_dict(own):
        own.data = cfg.gate_training.data
    known = LabelSettings(cfg.max_new_tokens, status=STATUS_PARTS)
    return collect_labels(mllm, build_dataset(own.data), own, cfg.gate_training.labels_dir, known, "labels to train on")


def variants(experiment: DictConfig, split: Split) -> list[Variant]:
    """The gates of an experiment, in order."""
    found = []
    for status in experiment.statuses:
        name = " + ".join(each.replace("_", " ") for each in status)
        found.append(Variant(name, tuple(status)))
        if experiment.train_on_kinds:
            kinds = sorted(set(split.column("kind", torch.cat([split.train, split.validation]))))
            found += [Variant(f"{name}, trained on {kind} alone", tuple(status), kind) for kind in kinds]
    return found + [Variant(f"gates of {source}", source=str(source)) for source in experiment.other_gates]


def train_variant(mllm: MLLM, variant: Variant, split: Split, cfg: DictConfig) -> Gates:
    """Train gates after the recipe; their threshold too is chosen on questions of the variant's kind."""
    if variant.kind is not None:
        parts = {}
        for name in ("train", "validation"):
            rows = getattr(split, name)
            wanted = torch.tensor([kind == variant.kind for kind in split.column("kind", rows)], dtype=torch.bool)
            parts[name] = rows[wanted]
            if len(parts[name]) < 2:
                raise DataError(f"too few {name} questions of kind {variant.kind!r}: raise gate_training.data.limit")
        split = replace(split, **parts)
    return fit_gates(mllm, split, cfg, list(variant.status)).gates


def outcome_of(exits: Tensor, asked: LabelSet) -> pd.DataFrame:
    """What leaving at exits [n] makes of every question's answer and cost."""
    tables = {"correct": asked.correct, "agree": asked.agree, "cost": asked.cost}
    return pd.DataFrame(
        {
            "id": asked.samples["id"],
            "exit_layer": exits.where(asked.has_image, torch.tensor(0)).numpy(),
            **{name: at_exit(table, exits).double().numpy() for name, table in tables.items()},
        }
    )


def report(cfg: DictConfig, mllm: MLLM, folder: RunFolder, asked: LabelSet) -> dict[str, Any]:
    """One row a set of gates, the full model first: accuracy with its interval, exit layer, cost; and by kind."""
    exits, about = folder.read_table("exits"), folder.read_table("gates")
    images = asked.samples["image_id"].tolist()
    kinds = asked.samples["kind"].astype(str).to_numpy()
    has_image = asked.has_image.numpy()
    full = outcome_of(torch.full((len(asked),), asked.num_layers), asked).assign(agree=1.0)
    known = about.set_index("gates")["status"]
    table: list[dict[str, Any]] = []
    by_kind: list[dict[str, Any]] = []
    for name, own in {"full model": full, **dict(list(exits.groupby("gates", sort=False)))}.items():
        band = rate_band(own["correct"], images)
        table.append(
            {
                "gates": name,
                "status": known.get(name, ""),
                "questions": len(images),
                "accuracy": float(band.mean),
                "accuracy_low": float(band.low),
                "accuracy_high": float(band.high),
                "agreement": float(own["agree"].mean()),
                "mean_exit_layer": float(own["exit_layer"][has_image].mean()),
                "cost": float(own["cost"].mean()),
            }
        )
        of_kinds = own.rename(columns={"correct": "accuracy", "agree": "agreement"}).groupby(kinds)
        for kind, rows in of_kinds[["accuracy", "agreement", "exit_layer"]]:
            by_kind.append({"gates": name, "kind": str(kind), "questions": len(rows), **rows.mean()})
    folder.write_table("comparison", pd.DataFrame(table))
    folder.write_table("kinds", pd.DataFrame(by_kind))
    note = f"{len(images)} questions about {len(set(images))} images; intervals 95%, clustered by image"
    write_table_page(folder, markdown(cfg, table, by_kind, note))
    return folder.write_summary(
        **run_facts(cfg, mllm),
        num_samples=len(images),
        experiment=cfg.experiment.name,
        rows=table,
        kinds=by_kind,
        in_words=cheapest_gates_in_words(table),
    )


def cheapest_gates_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """The cheapest of the gates that keep most answers."""
    gates = [row for row in rows if row["gates"] != "full model"]
    best = max(gates, key=lambda row: (round(row["agreement"], 2), -row["cost"]))
    return (
        f"of {len(gates)} sets of gates, {best['gates']} keeps most answers ({best['agreement']:.1%}), at "
        f"{best['cost']:.0%} of the full model's decoder FLOPs."
    )


def markdown(
    cfg: DictConfig, table: Sequence[Mapping[str, Any]], by_kind: Sequence[Mapping[str, Any]], note: str
) -> list[str]:
    """The lines of the page to put into a document."""
    rows = [
        [
            row["gates"],
            percent_with_limits(row, "accuracy"),
            f"{100 * row['agreement']:.1f}",
            f"{row['mean_exit_layer']:.2f}",
            f"{row['cost']:.3f}",
        ]
        for row in table
    ]
    head = ["gates", "accuracy", "same answer as full model", "mean exit layer", "decoder FLOPs"]
    lines = [*heading(cfg, note), *markdown_table(head, rows)]
    if cfg.experiment.by_kind:
        cells = {
            (each["gates"], each["kind"]): f"{100 * each['agreement']:.1f}, {each['exit_layer']:.1f}"
            for each in by_kind
        }
        counts = {each["kind"]: each["questions"] for each in by_kind}
        kinds = sorted(counts)
        rows = [[row["gates"], *(cells[row["gates"], kind] for kind in kinds)] for row in table]
        lines += ["", "Same answer as the full model (%), and mean exit layer, by kind of question asked:", ""]
        lines += markdown_table(["gates", *(f"{kind} (n = {counts[kind]:,})" for kind in kinds)], rows)
    return [*lines, *published(cfg.experiment)]
