"""Attention between image and text, layer by layer, and the stages it falls into: `python -m analysis.stages`.

Curves with their bands, the stage verdict (`docs/stage_rules.md`), both by question kind, and maps of a few samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig

from dyvte.data import Dataset, build_dataset
from dyvte.errors import ConfigError
from dyvte.instrument.attention import CURVES, MEASURES
from dyvte.instrument.role_attention import ENTROPIES
from dyvte.mllm import MLLM
from dyvte.runs import store
from dyvte.runs.config import command, load_model

from .measuring.attention import (
    CONTRIBUTIONS,
    FRAMES_TABLE,
    HEAD_MEASURES,
    HEADS_TABLE,
    LAYERS_TABLE,
    Map,
    answer_maps,
    attention_maps,
    choose_samples,
    map_name,
    measure_attention,
)
from .measuring.runs import finish_run, measure_dataset, run_facts
from .plots.attention import draw_attention_map, draw_measures, draw_stages_by_kind, draw_three_stages
from .plots.heads import draw_contributions, draw_frames, draw_heads
from .statistics.attention.contributions import compare_looking_and_writing, looking_and_writing_in_words
from .statistics.attention.frames import summarise_frames
from .statistics.attention.heads import heads_in_words, summarise_heads
from .statistics.bands import LEVEL, Array, Band, ImageBootstrap, bands_table, bands_to_dict, keyed_array, mean_band
from .statistics.segments import registered_split, stage_splits
from .statistics.stages import StageVerdict, stage_verdict
from .statistics.verdicts import verdict_in_words, verdict_word

ENDPOINT, BESIDE = "enrichment_no_sink", "mass"
"""What the verdict looks at, fixed before any data were seen; and what the same claims are made of beside it."""
Bands = dict[str, Band]


@command("stages")
def main(cfg: DictConfig) -> str | None:
    """Measure, summarise and draw; continues where an earlier run of the same command was stopped."""
    dataset = build_dataset(cfg.data)
    mllm = load_model(cfg)
    extras: dict[str, Any] = {name: True for name in ("contributions", "heads") if cfg[name]}
    folder = measure_dataset(cfg, mllm, dataset, partial(measure_attention, mllm, **extras), **extras)
    return None if folder is None else verdict_in_words(summarize_stages(cfg, folder, mllm, dataset)["stages"])


def outline(summary: Mapping[str, Any]) -> str:
    """What the verdict rests on and what else was found, for the terminal."""
    stages, silent = summary["stages"], summary["layers_without_attention"]
    lines = [f"layers that do not attend: {', '.join(map(str, silent))}"] if silent else []
    lines += [f"also: {reason}" for reason in stages["reasons"][1:]]
    lines += [f"{claim.replace('_', ' ')}: {verdict_word(found)}" for claim, found in stages["claims"].items()]
    lines.append(f"of the raw attention mass: {verdict_word(summary['stages_by_mass']['verdict'])}")
    parts = [name for name in ("contributions", "heads", "frames") if summary[name]]
    lines += [f"{part}: {summary[part]['in_words']}" for part in parts]
    if stages["boundaries"]:
        lines.append(f"95% intervals of the boundaries: {stages['boundaries_ci']}")
    return "\n".join(lines)


class LayerTable:
    """The table `layers` with its columns as `[n, L]` by sample and layer, whatever the order of its rows.

    Attributes:
        table: a row per sample and layer.
        ids: of the n samples.
        bootstrap: over their images.
    """

    def __init__(self, table: pd.DataFrame, draws: int = 1000, seed: int = 0) -> None:
        self.table = table
        self.ids, images = table.drop_duplicates("id")[["id", "image_id"]].to_numpy().T
        self.bootstrap = ImageBootstrap(images, draws, seed)

    def of_kinds(self) -> dict[str, LayerTable]:
        """One table a question kind; empty for data without kinds, whose samples are all called "all"."""
        groups, draws = self.table.groupby("kind", sort=True), (self.bootstrap.draws, self.bootstrap.seed)
        return {str(kind): LayerTable(rows, *draws) for kind, rows in groups if kind != "all"}

    def by_layer(self, column: str) -> Array:
        """`[n, L]`."""
        return keyed_array(self.table, column, self.ids, "layer")

    def bands(self, columns: Mapping[str, str]) -> Bands:
        """Mean curve with a pointwise 95% band for each column, by the keys of `columns`; without empty ones."""
        curves = np.stack([self.by_layer(column) for column in columns.values()], axis=1)  # [n, columns, L]
        band = mean_band(curves, self.bootstrap)
        return {name: band[index] for index, name in enumerate(columns) if np.isfinite(band.mean[index]).any()}

    def verdict(self, level: float = LEVEL, measure: str = ENDPOINT) -> StageVerdict:
        """The stage verdict on these samples."""
        cross, visual = (self.by_layer(f"{curve}_{measure}") for curve in ("cross", "visual"))
        return stage_verdict(cross, visual, self.bootstrap, level)


def summarize_stages(cfg: DictConfig, folder: store.RunFolder, mllm: MLLM, dataset: Dataset) -> dict[str, Any]:
    """Everything that follows from the table: curves, verdicts, maps, figures, summary."""
    layers = LayerTable(folder.read_table(LAYERS_TABLE), cfg.bootstrap, cfg.seed)
    if layers.table["cross_mass"].isna().all():
        raise ConfigError(
            f"no sample of the data ({cfg.data.name}) has an image: there is no attention on it to look at"
        )
    curves = {
        name: layers.bands({curve: f"{curve}_{name}" for curve in (*CURVES, "answer_cross")}) for name in MEASURES
    }
    entropies = layers.bands({name: name for name in ENTROPIES})
    endpoint_columns = {curve: f"{curve}_{ENDPOINT}" for curve in CURVES}
    of_kinds = ((kind, rows, rows.bands(endpoint_columns)) for kind, rows in layers.of_kinds().items())
    kinds = {kind: (rows, found) for kind, rows, found in of_kinds if "cross" in found}
    # Many kinds are many chances of a false finding: Bonferroni.
    level = 1 - (1 - LEVEL) / max(1, len(kinds))
    everything = {**curves, **{name: {"text": band} for name, band in entropies.items()}}  # entropies of the question
    groups = {"all": everything, **{kind: {ENDPOINT: found} for kind, (_, found) in kinds.items()}}
    folder.write_table("curves", curves_table(groups))
    maps = maps_of(cfg, mllm, dataset)
    content = {
        **run_facts(cfg, mllm),
        "layers_without_attention": sorted({*range(mllm.num_layers)} - {*mllm.attention_layers}),
        **layers.bootstrap.counts(),
        "endpoint": ENDPOINT,
        "curves": {curve: curves[ENDPOINT][curve].mean for curve in CURVES if curve in curves[ENDPOINT]},
        "bands": {name: bands_to_dict(found) for name, found in curves.items()},
        "entropy": bands_to_dict(entropies),
        "stages": layers.verdict().to_dict(),
        "stages_by_mass": layers.verdict(measure=BESIDE).to_dict(),
        "kinds": {
            kind: rows.bootstrap.counts()
            | {"bands": {ENDPOINT: bands_to_dict(found)}, "stages": rows.verdict(level).to_dict()}
            for kind, (rows, found) in kinds.items()
        },
        "maps": [record for record, _ in maps],
        "contributions": contributions_of(layers) if cfg.contributions else None,
        "heads": heads_of(layers, folder.read_table(HEADS_TABLE)) if cfg.heads else None,
        "frames": frames_of(folder, cfg),
    }
    return finish_run(folder, content, partial(draw, maps), outline)


def draw(maps: Sequence[Map], summary: Mapping[str, Any]) -> dict[str, Figure]:
    """All figures, by file name, from the maps and what `summary.json` will say."""
    figures = {"stages": draw_three_stages(summary), "measures": draw_measures(summary)}
    parts = {"contributions": draw_contributions, "heads": draw_heads, "frames": draw_frames}
    figures |= {name: of_part(summary) for name, of_part in parts.items() if summary[name]}
    if len(summary["kinds"]) > 1:
        figures["kinds"] = draw_stages_by_kind(summary)
    return figures | {map_name(record): draw_attention_map(record, image) for record, image in maps}


def maps_of(cfg: DictConfig, mllm: MLLM, dataset: Dataset) -> list[Map]:
    """The maps that are drawn: what `attention_maps` or `answer_maps` says."""
    asked = cfg.maps
    maps: list[Map] = []
    for sample in choose_samples(dataset, asked.count, asked.ids):
        if asked.query == "answer":
            maps += answer_maps(mllm, sample, asked.max_new_tokens, asked.sinks)
        else:
            maps += attention_maps(mllm, sample, asked.query)
    return maps


def frames_of(folder: store.RunFolder, cfg: DictConfig) -> dict[str, Any] | None:
    """Which frame of the videos is looked at; None where no sample showed one."""
    if not (folder.path / f"{FRAMES_TABLE}.parquet").is_file():
        return None
    return summarise_frames(folder.read_table(FRAMES_TABLE), cfg.bootstrap, cfg.seed)


def contributions_of(layers: LayerTable) -> dict[str, Any]:
    """The curves of what the image writes, and how they go with those of attention on it."""
    curves = ("cross", "visual", "answer_cross")
    bands = {name: layers.bands({curve: f"{curve}_{name}" for curve in curves}) for name in CONTRIBUTIONS}
    looking, writing = (layers.by_layer(f"cross_{name}") for name in ("mass", "contribution_share"))
    found = compare_looking_and_writing(looking, writing, layers.bootstrap)
    words = looking_and_writing_in_words(found)
    return {"bands": {name: bands_to_dict(each) for name, each in bands.items()}, **found, "in_words": words}


def heads_of(layers: LayerTable, table: pd.DataFrame) -> dict[str, Any]:
    """What the heads do, at the registered split of the layers."""
    mass, enrichment = (keyed_array(table, name, layers.ids, "layer", "head") for name in HEAD_MEASURES)
    split = registered_split(mass.shape[1]) if len(stage_splits(mass.shape[1])) else None
    found = summarise_heads(mass, enrichment, split, layers.bootstrap)
    return {**found, "in_words": heads_in_words(found)}


def curves_table(groups: Mapping[str, Mapping[str, Bands]]) -> pd.DataFrame:
    """Every curve of every group (`all` and the question kinds) in long form."""
    curves = (
        ({"kind": kind, "measure": name, "curve": curve}, band)
        for kind, of_measures in groups.items()
        for name, curves in of_measures.items()
        for curve, band in curves.items()
    )
    return bands_table(curves, "layer")


if __name__ == "__main__":
    main()
