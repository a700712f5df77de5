"""Samples for the layer slider: where the model looks in every layer, what it answers, and when the image leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.colors import to_hex
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from dyvte.batch import Batch
from dyvte.data import Sample, build_dataset
from dyvte.data.video import Video
from dyvte.errors import ConfigError, UnsupportedError
from dyvte.gates.module import SHIPPED_GATES, load_gates
from dyvte.instrument.sweep import exit_sweep, greedy_answer_ids
from dyvte.instrument.sweep.criteria import exit_depth, paper_labels
from dyvte.instrument.video_frames import frame_numbers
from dyvte.instrument.views import view
from dyvte.mllm import MLLM
from dyvte.policies.exits.dynamic_exit import DynamicExit, exit_probabilities
from dyvte.runs.config import load_model
from dyvte.runs.store import model_fingerprint

from ..measuring.attention import QUERIES, attention_maps, choose_samples
from ..measuring.lens import patch_words
from ..plots.attention import darkest, frame_in_words, relative_maps
from ..plots.style import data_address
from .runs import FinishedRun

MAX_NEW_TOKENS, COLOURS = 64, 32


@dataclass(frozen=True)
class Samples:
    """What the slider shows.

    Attributes:
        records: one a sample or frame, plain data for the page.
        gates: where the gates are from; None without gates.
    """

    records: list[dict[str, Any]]
    gates: str | None
    notes: list[str]


def palette() -> list[str]:
    """Colours from no attention to much, those of the figures."""
    return [to_hex(each) for each in sns.color_palette("rocket_r", COLOURS)]


def look_at_samples(cfg: DictConfig, runs: Sequence[FinishedRun]) -> Samples:
    """Load the model and look at some samples of the data that the stages run was made on (without it, of `cfg.data`).

    Raises:
        ConfigError: `samples.query` or `samples.ids` are not possible.
        DyvteError: model, data or gates cannot be loaded.
    """
    if cfg.samples.query not in QUERIES:
        raise ConfigError(f"samples.query is {cfg.samples.query!r}; choose {' or '.join(QUERIES)}")
    by_step = {run.step: run for run in runs}
    stages = by_step.get("stages")
    saved = None if stages is None else stages.config.get("data")
    # a run folder may be somebody else's
    dataset = build_dataset(cfg.data) if saved is None else build_dataset(OmegaConf.create(saved), True, cfg.data)
    mllm = load_model(cfg)
    notes = []
    weights = model_fingerprint(mllm)["weights"]
    others = [run.name for run in runs if run.weights not in (None, weights)]
    if others:
        notes.append(
            f"The maps show the model as it is now (weights {weights}); it has changed since these runs: "
            f"{', '.join(others)}. Run them again."
        )
    source, policy = gates_for(cfg, by_step.get("train")), None
    if source is not None:
        policy = DynamicExit(load_gates(source))
        policy.check(mllm)
    records = []
    for sample in choose_samples(dataset, cfg.samples.count, cfg.samples.ids, "samples.ids"):
        records += look_at(mllm, sample, cfg.samples.query, policy)
    records.sort(key=lambda record: -(record["exit_depth"] or 0))  # what needs the image longest comes first
    if "exits" in by_step and not others:
        add_answers(records, by_step["exits"])
    if not records:
        notes.append("No map to show: no sample has an image whose visual tokens have a known place in it.")
    return Samples(records, source, notes)


def gates_for(cfg: DictConfig, train: FinishedRun | None) -> str | None:
    """The gates that `samples.gates` names."""
    chosen = cfg.samples.gates
    if chosen != "auto":
        return None if chosen is None else str(chosen)
    if train is not None and (train.path / "gates").is_dir():
        return str(train.path / "gates")
    return cfg.model.name if cfg.model.name in SHIPPED_GATES else None


@torch.no_grad()
def look_at(mllm: MLLM, sample: Sample, query: str, policy: DynamicExit | None) -> list[dict[str, Any]]:
    """One sample as plain data, of a video each frame; none where visual tokens have no place in the image."""
    found = attention_maps(mllm, sample, query)
    if not found:
        return []
    batch = mllm.encode([sample.image], [sample.question])
    left: dict[str, Any] = {"exit_layer": None, "exit_answer": None, "gates": {}}
    if policy is not None:
        left = under_gates(mllm, batch, policy)
    of_sample = {"exit_depth": depth_of(mllm, batch), "answers": {}, **left}
    words = words_of(mllm, sample, batch)
    return [content_of(*each) | said | of_sample for each, said in zip(found, words, strict=True)]


def content_of(record: Mapping[str, Any], image: npt.NDArray[Any]) -> dict[str, Any]:
    """What the slider shows of a map."""
    relative = relative_maps(record["maps"])
    content = {key: record[key] for key in ("id", "kind", "question", "reference", "answer", "query")}
    return content | {
        "part": frame_in_words(record),
        "image": data_address(Image.fromarray((255 * np.clip(image, 0, 1)).round().astype(np.uint8)), optimize=True),
        "rows": relative.shape[1],
        "columns": relative.shape[2],
        "mass": [round(float(each), 5) for each in record["mass"]],
        "maps": [[round(float(each), 2) for each in layer.flat] for layer in relative],
        "top": darkest(relative),
    }


def words_of(mllm: MLLM, sample: Sample, batch: Batch) -> list[dict[str, Any]]:
    """What each patch of each map says after each layer: `says [L + 1][rows * columns]` counts in the list `words`.

    Both are empty where a lens cannot be applied.
    """
    place = None if isinstance(sample.image, Video) else view(mllm, batch)
    if place is None:
        frames = frame_numbers(mllm, batch)[0, batch.layout.visual[0]]
        orders = [(frames == frame).nonzero().flatten().tolist() for frame in range(int(frames.amax()) + 1)]
    else:
        orders = [place.arrange(torch.arange(int(batch.layout.visual.sum()))).flatten().tolist()]
    try:
        said, _ = patch_words(mllm, sample)
    except UnsupportedError:
        return [{"words": [], "says": []} for _ in orders]
    found = []
    for order in orders:
        number: dict[str, int] = {}
        says = [[number.setdefault(layer[patch], len(number)) for patch in order] for layer in said]
        found.append({"words": list(number), "says": says})
    return found


def depth_of(mllm: MLLM, batch: Batch) -> int | None:
    """First exit layer from which answer and cross-entropy stay; None where one pass cannot compute all exits."""
    try:
        sweep = exit_sweep(mllm, batch, greedy_answer_ids(mllm, batch, MAX_NEW_TOKENS), entropy=False)
    except UnsupportedError:
        return None
    sweep = sweep.up_to_ties()
    return int(exit_depth(paper_labels(sweep.agree, sweep.nll))[0])


def under_gates(mllm: MLLM, batch: Batch, policy: DynamicExit) -> dict[str, Any]:
    """Where the gates take the image out, what they said until then, and the answer."""
    with policy(mllm) as run:
        (answer,) = mllm.generate(batch, max_new_tokens=MAX_NEW_TOKENS)
        exit_layer = int(run.exit_layers[0])
        asked = {k: float(each[0]) for k, each in exit_probabilities(run).items() if k <= exit_layer}
    return {
        "exit_layer": exit_layer,
        "exit_answer": answer,
        "gates": {str(k): [round(each, 4), round(policy.thresholds[k - 1], 4)] for k, each in asked.items()},
    }


def add_answers(records: Sequence[dict[str, Any]], run: FinishedRun) -> None:
    """Add what the exits run recorded as the answer of each sample under every exit."""
    file = run.path / "exits.parquet"
    if not file.is_file():
        return
    table = pd.read_parquet(file, columns=["id", "exit_layer", "answer"])
    for record in records:
        rows = table[table["id"] == record["id"]].dropna()
        record["answers"] = {str(k): answer for k, answer in zip(rows["exit_layer"], rows["answer"], strict=True)}
