"""Attention between image and text, layer by layer, and the stages it falls into: `python -m analysis.stages`.

Reads the data in batches, writes one row per sample and layer, and makes from that table the curves with their bands,
the stage verdict (`docs/stage_verdict.md`), the same per question kind, and attention maps of a few samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib import pyplot as plt
from omegaconf import DictConfig

from dyvte.batch import Batch
from dyvte.data import Dataset, Sample, build_dataset
from dyvte.errors import ConfigError, ModelError
from dyvte.instrument.attention import CURVES, MEASURES, AttentionProbe
from dyvte.instrument.role_attention import ENTROPIES
from dyvte.instrument.views import view
from dyvte.layout import ANSWER, VISUAL
from dyvte.mllm import MLLM
from dyvte.runs import distributed, runner, store
from dyvte.runs.config import command, load_model

from .plots import attention as plots
from .statistics import stages as statistics
from .statistics.bands import Band, mean_band
from .statistics.stages import StageVerdict

ENDPOINT = "enrichment_no_sink"
"""What the verdict looks at, fixed before any data were seen."""
TABLE = "layers"
LEVEL = 0.95
Bands = dict[str, Band]


# ------------------------------------------------------------------------ measuring


def forward(mllm: MLLM, batch: Batch) -> None:
    """Run the model for the sake of its attention: no cache, and logits of no more than the last position."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(type(mllm.model).forward).parameters:
        options["logits_to_keep"] = 1
    mllm.model(**batch, **options)


@torch.no_grad()
def measure(mllm: MLLM, samples: list[Sample]) -> dict[str, pd.DataFrame]:
    """The table of one batch: a row per sample and layer, statistics averaged over heads.

    The reference answers, where all samples have one, are teacher-forced behind the prompts; with causal attention
    this leaves the prompt's statistics as they are and adds the attention of the answer on the image.
    """
    answers = [sample.answer for sample in samples if sample.answer is not None]
    batch = mllm.encode(
        [sample.image for sample in samples],
        [sample.question for sample in samples],
        answers if len(answers) == len(samples) else None,
    )
    with AttentionProbe(mllm, layout=batch.layout) as probe:
        forward(mllm, batch)
    stats = probe.stats
    values = {f"{curve}_{name}": stats.curve(curve, name) for name in MEASURES for curve in CURVES}
    values |= {f"answer_cross_{name}": getattr(stats, name)[..., ANSWER, VISUAL] for name in MEASURES}
    values |= {name: getattr(stats, name) for name in ENTROPIES}
    labels = pd.DataFrame(
        {"id": sample.id, "image_id": sample.image_id, "kind": sample.kind, "layer": layer}
        for sample in samples
        for layer in range(mllm.num_layers)
    )
    table = labels.assign(**{name: value.mean(-1).flatten().numpy() for name, value in values.items()})
    _check(mllm, table, batch)
    # A layer whose mask shows the question no visual token has no enrichment; that its attention is 0 is known.
    for name in ("cross_enrichment", "cross_enrichment_no_sink"):
        table.loc[table["cross_mass"] == 0, name] = 0.0
    return {TABLE: table}


def _check(mllm: MLLM, table: pd.DataFrame, batch: Batch) -> None:
    expected = np.repeat(batch.layout.has_image.cpu().numpy(), mllm.num_layers)
    broken = table[expected & table["cross_mass"].isna()]
    if len(broken):
        row = broken.iloc[0]
        raise ModelError(
            f"attention of sample {row['id']!r} is not a number in layer {row['layer']}: {mllm.dtype} overflowed "
            "(set model.dtype=float32 or bfloat16)"
        )


def choose(dataset: Dataset, count: int, ids: list[str] | None) -> list[Sample]:
    """Samples to draw maps of: those named, or the first ones with an image, one of each question kind in turn.

    Raises:
        ConfigError: an id in `ids` is not in the data.
    """
    chosen: list[Sample] = []
    again: list[Sample] = []
    for sample in dataset.readable():
        if len(chosen) >= (count if ids is None else len(ids)):
            break
        if ids is not None:
            if sample.id in ids:
                chosen.append(sample)
        elif sample.image is not None:
            new_kind = sample.kind not in {each.kind for each in chosen}
            (chosen if new_kind else again).append(sample)
            if len(again) >= 64 * count:  # the data may hold one kind only
                break
    if ids is not None and (missing := set(ids) - {sample.id for sample in chosen}):
        raise ConfigError(f"maps.ids: no usable sample {sorted(missing)[0]!r} in the data")
    return chosen if ids is not None else [*chosen, *again][:count]


@torch.no_grad()
def attention_map(mllm: MLLM, sample: Sample, query: str) -> tuple[dict[str, Any], npt.NDArray[Any]] | None:
    """Attention on the image in every layer, and the image as the model saw it; None where tokens have no place in it.

    Args:
        mllm: the model.
        sample: with an image.
        query: `last` prompt token, or mean over the `instruction`.
    """
    batch = mllm.encode([sample.image], [sample.question])
    place = view(mllm, batch)
    if place is None:
        return None
    with AttentionProbe(mllm, layout=batch.layout) as probe:
        forward(mllm, batch)
    received = getattr(probe.stats, f"received_{query}")[0].mean(1)  # [L, N]
    visual = received[:, batch.layout.visual[0].cpu()]
    shown = place.arrange(visual)
    image = np.asarray(sample.image, dtype=np.float32) / 255 if place.image is None else place.image
    record = {
        "id": sample.id,
        "kind": sample.kind,
        "question": sample.question,
        "reference": sample.answer,
        "answer": mllm.generate(batch)[0],
        "query": query,
        "mass": visual.sum(1).numpy(),
        "maps": np.round(shown.double().numpy(), 6),
    }
    return record, image


# ----------------------------------------------------------------------- summarising


def by_layer(table: pd.DataFrame, column: str) -> npt.NDArray[np.float64]:
    """A column of the table as `[samples, layers]`."""
    return table[column].to_numpy(np.float64).reshape(-1, table["layer"].max() + 1)


def bands(table: pd.DataFrame, columns: Mapping[str, str], n_boot: int, seed: int) -> Bands:
    """Mean curve with a pointwise 95% band for each column, keyed by `columns`' keys; columns without data left out."""
    images = table.loc[table["layer"] == 0, "image_id"].to_numpy()
    curves = np.stack([by_layer(table, column) for column in columns.values()], axis=1)  # [n, columns, L]
    band = mean_band(curves, images, LEVEL, n_boot, seed)
    return {
        name: Band(band.mean[index], band.low[index], band.high[index])
        for index, name in enumerate(columns)
        if np.isfinite(band.mean[index]).any()
    }


def verdict(table: pd.DataFrame, cfg: DictConfig, level: float = LEVEL) -> StageVerdict:
    """The stage verdict on the rows of `table`."""
    cross, visual, text = (by_layer(table, f"{curve}_{ENDPOINT}") for curve in CURVES)
    images = table.loc[table["layer"] == 0, "image_id"].to_numpy()
    return statistics.stage_verdict(
        cross, visual, text, images, level=level, n_boot=cfg.bootstrap, n_perm=cfg.permutations, seed=cfg.seed
    )


def as_lists(curves: Bands) -> dict[str, dict[str, list[float]]]:
    """Bands as plain data for the summary."""
    return {name: band.to_dict() for name, band in curves.items()}


def long_table(groups: Mapping[str, Mapping[str, Bands]]) -> pd.DataFrame:
    """Every curve of every group (`all` and the question kinds) in long form."""
    rows = [
        pd.DataFrame(
            {
                "kind": kind,
                "measure": name,
                "curve": curve,
                "layer": np.arange(len(band.mean)),
                **band.to_dict(),
            }
        )
        for kind, of_measures in groups.items()
        for name, curves in of_measures.items()
        for curve, band in curves.items()
    ]
    return pd.concat(rows, ignore_index=True)


# --------------------------------------------------------------------------- command


@command("stages")
def main(cfg: DictConfig) -> None:
    """Measure, summarise and draw; continues where an earlier run of the same command was stopped."""
    if cfg.maps.query not in ("last", "instruction"):
        raise ConfigError(f"maps.query is {cfg.maps.query!r}; choose last or instruction")
    dataset = build_dataset(cfg.data)
    mllm = load_model(cfg)
    folder = store.RunFolder.open(cfg.output_dir, store.fingerprint(mllm, dataset, cfg), cfg, overwrite=cfg.overwrite)
    batches = runner.consecutive_batches(len(dataset), cfg.batch_size)
    runner.run(folder, dataset, batches, partial(measure, mllm), f"{cfg.model.name} on {cfg.data.name}")
    if not distributed.is_main():
        return
    summary = report(cfg, folder, mllm, dataset)
    stages = summary["stages"]
    print(f"stages: {stages['verdict']}" + "".join(f"\n  {reason}" for reason in stages["reasons"]))
    if stages["boundaries"]:
        print(f"  stages begin at layers {stages['boundaries']}, 95% intervals {stages['boundaries_ci']}")
    failed = f", {summary['num_failed']} left out (failures.jsonl)" if summary["num_failed"] else ""
    print(f"{summary['num_samples']} samples{failed}; results in {folder.path}")


def report(cfg: DictConfig, folder: store.RunFolder, mllm: MLLM, dataset: Dataset) -> dict[str, Any]:
    """Everything that follows from the table: curves, verdicts, maps, figures, summary."""
    table = folder.read_table(TABLE)
    if table["cross_mass"].isna().all():
        raise ConfigError(
            f"no sample of the data ({cfg.data.name}) has an image: there is no attention on it to look at"
        )
    # Data without kinds call every sample "all", which would repeat the curves of all samples.
    kinds = {str(kind): rows for kind, rows in table.groupby("kind", sort=True) if kind != "all"}
    samples = table[table["layer"] == 0]
    curves = {
        name: bands(table, {curve: f"{curve}_{name}" for curve in (*CURVES, "answer_cross")}, cfg.bootstrap, cfg.seed)
        for name in MEASURES
    }
    endpoint_columns = {curve: f"{curve}_{ENDPOINT}" for curve in CURVES}
    of_kind = {kind: bands(rows, endpoint_columns, cfg.bootstrap, cfg.seed) for kind, rows in kinds.items()}
    of_kind = {kind: found for kind, found in of_kind.items() if "cross" in found}
    entropies = bands(table, {name: name for name in ENTROPIES}, cfg.bootstrap, cfg.seed)
    # Many kinds are many chances of a false finding: Bonferroni.
    level = 1 - (1 - LEVEL) / max(1, len(of_kind))
    overall = verdict(table, cfg)

    folder.write_table(
        "curves",
        long_table(
            {
                "all": {**curves, **{name: {"text": band} for name, band in entropies.items()}},  # of the question
                **{kind: {ENDPOINT: found} for kind, found in of_kind.items()},
            }
        ),
    )
    title = f"{cfg.model.name} on {cfg.data.name}"
    footnote = plots.band_note(len(samples), samples["image_id"].nunique(), LEVEL)
    figures = {"stages": plots.stages(curves[ENDPOINT], overall.to_dict(), title, footnote)}
    figures["measures"] = plots.measures(curves, title, footnote)
    if len(of_kind) > 1:
        counts = {kind: int((kinds[kind]["layer"] == 0).sum()) for kind in of_kind}
        figures["kinds"] = plots.small_multiples(of_kind, counts, f"{title}, by question kind", footnote)
    maps = []
    for sample in choose(dataset, cfg.maps.count, cfg.maps.ids):
        found = attention_map(mllm, sample, cfg.maps.query)
        if found is not None:
            record, image = found
            maps.append(record)
            figures[f"map_{file_name(sample.id)}"] = draw_map(record, image)
    for name, figure in figures.items():
        folder.save_figure(name, figure)
    return folder.write_summary(
        model=cfg.model.name,
        data=cfg.data.name,
        num_layers=mllm.num_layers,
        num_images=samples["image_id"].nunique(),
        endpoint=ENDPOINT,
        curves={curve: curves[ENDPOINT][curve].mean for curve in CURVES if curve in curves[ENDPOINT]},
        bands={name: as_lists(found) for name, found in curves.items()},
        entropy=as_lists(entropies),
        stages=overall.to_dict(),
        kinds={
            kind: {
                "num_samples": int((kinds[kind]["layer"] == 0).sum()),
                "num_images": kinds[kind]["image_id"].nunique(),
                "bands": {ENDPOINT: as_lists(found)},
                "stages": verdict(kinds[kind], cfg, level).to_dict(),
            }
            for kind, found in of_kind.items()
        },
        maps=maps,
        figures=sorted(figures),
    )


def draw_map(record: Mapping[str, Any], image: npt.NDArray[Any]) -> plt.Figure:
    """The figure of one attention map."""
    whose = "the prompt's last token" if record["query"] == "last" else "the question (mean over its tokens)"
    reference = "" if record["reference"] is None else f" (reference: {record['reference']})"
    return plots.attention_maps(
        image,
        record["maps"],
        record["mass"],
        f"{record['question']}\nanswer: {record['answer']}{reference}",
        f"attention of {whose}, mean over heads; percentages: share of it on the image",
    )


def file_name(sample_id: str) -> str:
    """A sample id as part of a file name."""
    return "".join(each if each.isalnum() or each in "-_" else "-" for each in Path(sample_id).name)[:60]


if __name__ == "__main__":
    main()
