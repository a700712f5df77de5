"""Maps of parts: where a model looks while it writes each token of its answer, and in each frame of a video."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.data import Sample
from dyvte.data.video import Video
from dyvte.errors import ConfigError
from dyvte.instrument.sweep import greedy_answer_ids
from dyvte.instrument.video_frames import NO_FRAME, frame_grid, frame_numbers
from dyvte.instrument.views import view
from dyvte.mllm import MLLM

from .token_attention import token_attention

SINKS = ("mark", "leave_out")


@torch.no_grad()
def answer_maps(
    mllm: MLLM, sample: Sample, max_new_tokens: int = 16, sinks: str = "mark"
) -> tuple[list[dict[str, Any]], npt.NDArray[Any]] | None:
    """A map for every generated token, the end token included; None where visual tokens have no place in the image.

    Args:
        mllm: the model.
        sample: with an image.
        max_new_tokens: of the answer.
        sinks: what becomes of patches that are sinks (`analysis.measuring.token_attention`): `mark` them, or
            `leave_out` the attention on them, of the map and of its share.

    Returns:
        Records like those of `attention_map`, with `token` and `number`; `maps` is the mean over heads of the attention
        of the query that predicts the token, `heads` [L, H] the share of each head's attention on the image, `sinks`
        [L, rows, columns] where the sinks are. And the image as the model saw it.

    Raises:
        ConfigError: `sinks` is neither.
    """
    if sinks not in SINKS:
        raise ConfigError(f"maps.sinks is {sinks!r}; choose mark or leave_out")
    batch = mllm.encode([sample.image], [sample.question])
    place = view(mllm, batch)
    if place is None:
        return None
    answer = greedy_answer_ids(mllm, batch, max_new_tokens)
    found = token_attention(mllm, batch, answer)
    here = batch.layout.visual[0].cpu().nonzero().flatten()
    rows, is_sink = found.rows[..., here], found.sinks[:, here]  # [L, H, A, V], [L, V]
    if sinks == "leave_out":
        rows = rows.masked_fill(is_sink[:, None, None], 0.0)
    visual = rows.mean(1)  # [L, A, V]
    texts = [mllm.decode([[token]])[0] for token in answer[0].tolist()]
    whole = mllm.decode([answer[0].tolist()])[0]
    records = [
        {
            "id": sample.id,
            "kind": sample.kind,
            "question": sample.question,
            "reference": sample.answer,
            "answer": whole,
            "query": "answer",
            "number": number,
            "token": text or "(end of the answer)",
            "mass": visual[:, number].sum(1).numpy(),
            "heads": np.round(rows[:, :, number].sum(-1).double().numpy(), 6),
            "maps": np.round(place.arrange(visual[:, number]).double().numpy(), 6),
            "sinks": place.arrange(is_sink).numpy(),
            "sinks_are": sinks,
        }
        for number, text in enumerate(texts)
    ]
    image = np.asarray(sample.image, dtype=np.float32) / 255 if place.image is None else place.image
    return records, image


def frame_maps(
    mllm: MLLM, sample: Sample, batch: Batch, received: Tensor, record: dict[str, Any]
) -> list[tuple[dict[str, Any], npt.NDArray[Any]]]:
    """A map for each frame of a sample's video; none where the tokens of its frames form no grid.

    Args:
        mllm: the model.
        sample: with a video.
        batch: the sample.
        received: [L, N] attention on every position.
        record: what the maps have in common.

    Returns:
        For each frame `record` with `maps` [L, rows, columns], `mass` [L] on the frame, `frame` counted from 0 and
        `frames`, how many there are; and the frame as a picture. Where a family merges frames in time, the first of
        those that were merged is shown.
    """
    assert isinstance(sample.image, Video)
    numbers = frame_numbers(mllm, batch)[0]
    grid = frame_grid(batch, numbers)
    if grid is None:
        return []
    there = (numbers != NO_FRAME).cpu()
    maps = received[:, there].unflatten(1, (-1, *grid)).double().numpy()  # [L, F, rows, columns]
    pictures = [np.asarray(each.convert("RGB"), dtype=np.float32) / 255 for each in sample.image.frames]
    count = maps.shape[1]
    return [
        (
            record | {"frame": frame, "frames": count, "mass": of_frame.sum((1, 2)), "maps": np.round(of_frame, 6)},
            pictures[frame * len(pictures) // count],
        )
        for frame, of_frame in enumerate(maps.swapaxes(0, 1))
    ]
