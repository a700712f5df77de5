"""Attention between image and text: the table of `analysis.stages`, and where single samples look."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.data import Dataset, Sample
from dyvte.data.video import Video
from dyvte.errors import ConfigError, ModelError
from dyvte.instrument.attention import CURVES, MEASURES, AttentionProbe
from dyvte.instrument.role_attention import ENTROPIES
from dyvte.instrument.sweep import greedy_answer_ids
from dyvte.instrument.video_frames import NO_FRAME, frame_grid, frame_numbers, frame_shares
from dyvte.instrument.views import view
from dyvte.layout import ANSWER, INSTRUCTION, VISUAL
from dyvte.mllm import MLLM

from ..statistics.bands import long_table
from .runs import columns_of
from .token_attention import run_for_attention, token_attention

LAYERS_TABLE, HEADS_TABLE, FRAMES_TABLE = "layers", "heads", "frames"
LABELS = ("id", "image_id", "kind")
QUERIES, SINKS = ("last", "instruction"), ("mark", "leave_out")
CONTRIBUTIONS = ("contribution_norm", "contribution_share")
MAP_PARTS = {"number": "token", "frame": "frame"}
"""What tells several maps of one sample apart: key of the record, and what the figure's name says."""
HEAD_MEASURES = ("mass", "enrichment_no_sink")
"""What is kept of every head: how much of its attention is on the image, and what the verdict looks at."""


@torch.no_grad()
def measure_attention(
    mllm: MLLM, samples: list[Sample], contributions: bool = False, heads: bool = False
) -> dict[str, pd.DataFrame]:
    """The tables of one batch: a row per sample and layer, statistics averaged over heads; of videos, also `frames`.

    Reference answers, where there are some, are teacher-forced behind the prompts; with causal attention this leaves
    the prompt's statistics as they are and adds the attention of the answer on the image.

    Args:
        contributions: also what the image writes into the instruction, the image and the answer.
        heads: also the table `heads`, a row per sample, layer and head: the question's attention on the image.
    """
    answers = [sample.answer for sample in samples]
    batch = mllm.encode(
        [sample.image for sample in samples],
        [sample.question for sample in samples],
        answers if any(answer is not None for answer in answers) else None,
    )
    with AttentionProbe(mllm, layout=batch.layout, contributions=contributions) as probe:
        run_for_attention(mllm, batch)
    stats = probe.stats
    values = {f"{curve}_{name}": stats.mean_curve(curve, name) for name in MEASURES for curve in CURVES}
    for name in MEASURES:
        of_answer = getattr(stats, name)[..., ANSWER, VISUAL]
        values[f"answer_cross_{name}"] = stats.mean_over_heads(of_answer, name, ANSWER)
    values |= {name: getattr(stats, name).nanmean(-1) for name in ENTROPIES}
    if contributions:
        queries = {"cross": INSTRUCTION, "visual": VISUAL, "answer_cross": ANSWER}
        values |= {
            f"{curve}_{name}": getattr(stats, name)[..., query, VISUAL]
            for name in CONTRIBUTIONS
            for curve, query in queries.items()
        }
    table = long_table(columns_of(samples, *LABELS), values, "layer")
    has_image = np.repeat(batch.layout.has_image.cpu().numpy(), mllm.num_layers)
    broken = table[has_image & table["cross_mass"].isna() & table["layer"].isin(mllm.attention_layers)]
    if len(broken):
        row = broken.iloc[0]
        raise ModelError(
            f"attention of sample {row['id']!r} is not a number in layer {row['layer']}: {mllm.dtype} overflowed "
            "(set model.dtype=float32 or bfloat16)"
        )
    # A layer whose mask shows the question no visual token has no enrichment; that its attention is 0 is known.
    for name in ("cross_enrichment", "cross_enrichment_no_sink"):
        table.loc[table["cross_mass"] == 0, name] = 0.0
    tables = {LAYERS_TABLE: table}
    if (of_frames := frames_table(mllm, batch, samples, stats.received_last)) is not None:
        tables[FRAMES_TABLE] = of_frames
    if not heads:
        return tables
    of_heads = {name: stats.curve("cross", name) for name in HEAD_MEASURES}
    of_heads["enrichment_no_sink"] = of_heads["enrichment_no_sink"].masked_fill(of_heads["mass"] == 0, 0.0)
    return tables | {HEADS_TABLE: long_table(columns_of(samples, "id"), of_heads, "layer", "head")}


def frames_table(mllm: MLLM, batch: Batch, samples: Sequence[Sample], received: Tensor) -> pd.DataFrame | None:
    """A row per sample with a video, layer and frame: its share of the attention on the video; None without videos.

    `received` [B, L, H, N] is what every position receives from the prompt's last token.
    """
    rows = [row for row, sample in enumerate(samples) if isinstance(sample.image, Video)]
    if not rows:
        return None
    shares = frame_shares(received, frame_numbers(mllm, batch)).double().cpu().numpy()
    tables = []
    for row in rows:
        found = shares[row][:, np.isfinite(shares[row]).any(0)]  # [L, F] of as many frames as this video has
        labels = columns_of(samples[row : row + 1], *LABELS) | {"frames": [found.shape[1]]}
        tables.append(long_table(labels, {"share": found[None]}, "layer", "frame"))
    return pd.concat(tables, ignore_index=True)


def choose_samples(dataset: Dataset, count: int, ids: list[str] | None, setting: str = "maps.ids") -> list[Sample]:
    """Samples to draw maps of: those named, or the first ones with an image, one of each question kind in turn."""
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
        raise ConfigError(f"{setting}: no usable sample {min(missing)!r} in the data")
    return chosen if ids is not None else [*chosen, *again][:count]


Map = tuple[dict[str, Any], npt.NDArray[Any]]
"""What a map says, and the picture that it lies over [height, width, 3] from 0 to 1."""


def attention_map(mllm: MLLM, sample: Sample, query: str) -> Map | None:
    """Attention on the image in every layer, and the image as the model saw it; None where tokens have no place in it.

    The attention is that of the `last` prompt token, or the mean over the `instruction`.
    """
    return next(iter(attention_maps(mllm, sample, query)), None)


@torch.no_grad()
def attention_maps(mllm: MLLM, sample: Sample, query: str) -> list[Map]:
    """`attention_map` of an image, or one of each frame of a video (`frame_maps`); none where tokens have no place."""
    if query not in QUERIES:
        raise ConfigError(f"whose attention: {query!r}; choose last or instruction")
    batch = mllm.encode([sample.image], [sample.question])
    place = None if isinstance(sample.image, Video) else view(mllm, batch)
    if place is None and not isinstance(sample.image, Video):
        return []
    with AttentionProbe(mllm, layout=batch.layout) as probe:
        run_for_attention(mllm, batch)
    received = getattr(probe.stats, f"received_{query}")[0].mean(1)  # [L, N]
    record = _record(sample, mllm.generate(batch)[0], query)
    if place is None:
        return frame_maps(mllm, sample, batch, received, record)
    visual = received[:, batch.layout.visual[0].cpu()]
    image = _picture(sample.image) if place.image is None else place.image
    maps = np.round(place.arrange(visual).double().numpy(), 6)
    return [(record | {"mass": visual.sum(1).numpy(), "maps": maps}, image)]


def _record(sample: Sample, answer: Any, query: str) -> dict[str, Any]:
    """What every map says."""
    asked = {"id": sample.id, "kind": sample.kind, "question": sample.question, "reference": sample.answer}
    return asked | {"answer": answer, "query": query}


def _picture(image: Any) -> npt.NDArray[Any]:
    """An image as [height, width, 3] from 0 to 1."""
    return np.asarray(image, dtype=np.float32) / 255


@torch.no_grad()
def answer_maps(mllm: MLLM, sample: Sample, max_new_tokens: int = 16, sinks: str = "mark") -> list[Map]:
    """A map for every generated token, the end token included; none where visual tokens have no place in the image.

    Like `attention_map`, with `token` and `number`; `maps` is the mean over heads of the attention of the query that
    predicts the token, `heads` [L, H] the share of each head's attention on the image, `sinks` [L, rows, columns] where
    the sinks are (`analysis.measuring.token_attention`): to `mark` them, or to `leave_out` the attention on them of map
    and share.
    """
    if sinks not in SINKS:
        raise ConfigError(f"maps.sinks is {sinks!r}; choose mark or leave_out")
    batch = mllm.encode([sample.image], [sample.question])
    place = view(mllm, batch)
    if place is None:
        return []
    answer = greedy_answer_ids(mllm, batch, max_new_tokens)
    found = token_attention(mllm, batch, answer)
    here = batch.layout.visual[0].cpu().nonzero().flatten()
    rows, is_sink = found.rows[..., here], found.sinks[:, here]  # [L, H, A, V], [L, V]
    if sinks == "leave_out":
        rows = rows.masked_fill(is_sink[:, None, None], 0.0)
    visual = rows.mean(1)  # [L, A, V]
    texts = [mllm.decode([[token]])[0] for token in answer[0].tolist()]
    whole = _record(sample, mllm.decode([answer[0].tolist()])[0], "answer")
    image = _picture(sample.image) if place.image is None else place.image
    records = (
        whole
        | {
            "number": number,
            "token": text or "(end of the answer)",
            "mass": visual[:, number].sum(1).numpy(),
            "heads": np.round(rows[:, :, number].sum(-1).double().numpy(), 6),
            "maps": np.round(place.arrange(visual[:, number]).double().numpy(), 6),
            "sinks": place.arrange(is_sink).numpy(),
            "sinks_are": sinks,
        }
        for number, text in enumerate(texts)
    )
    return [(record, image) for record in records]


def frame_maps(mllm: MLLM, sample: Sample, batch: Batch, received: Tensor, record: dict[str, Any]) -> list[Map]:
    """A map for each frame of a sample's video, from `received` [L, N]; none where tokens of frames form no grid.

    `record`, what the maps have in common, with `maps` [L, rows, columns], `mass` [L] on the frame, `frame` counted
    from 0 and `frames`, how many there are; and the frame as a picture. Where a family merges frames in time, the first
    of those that were merged is shown.
    """
    assert isinstance(sample.image, Video)
    numbers = frame_numbers(mllm, batch)[0]
    grid = frame_grid(batch, numbers)
    if grid is None:
        return []
    there = (numbers != NO_FRAME).cpu()
    maps = received[:, there].unflatten(1, (-1, *grid)).double().numpy()  # [L, F, rows, columns]
    pictures = [_picture(each.convert("RGB")) for each in sample.image.frames]
    count = maps.shape[1]
    return [
        (
            record | {"frame": frame, "frames": count, "mass": of_frame.sum((1, 2)), "maps": np.round(of_frame, 6)},
            pictures[frame * len(pictures) // count],
        )
        for frame, of_frame in enumerate(maps.swapaxes(0, 1))
    ]


def map_name(record: Mapping[str, Any]) -> str:
    """Name of the figure of a map.

    Example:
        >>> map_name({"id": "test-7"}), map_name({"id": "test-7", "frame": 2})
        ('map_test-7', 'map_test-7_frame_2')
    """
    part = next((f"_{word}_{record[key]}" for key, word in MAP_PARTS.items() if key in record), "")
    return f"map_{file_name(record['id'])}{part}"


def file_name(sample_id: str) -> str:
    """A sample id as part of a file name; different ids give different names.

    Example:
        >>> file_name("test-7"), file_name("train/7") == file_name("val/7")
        ('test-7', False)
    """
    name = "".join(each if each.isascii() and (each.isalnum() or each in "-_") else "-" for each in sample_id)
    if name == sample_id and len(name) <= 60:
        return name
    return f"{name[-40:]}-{hashlib.sha256(sample_id.encode(errors='surrogatepass')).hexdigest()[:8]}"
