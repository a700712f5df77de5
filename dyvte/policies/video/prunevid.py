"""What stands still in a video is averaged over time, what is alike in a frame is clustered, and the question selects.

PruneVid (arXiv 2412.16117; code Visual-AI/PruneVid): frames are cut into segments by clustering their means (DPC-KNN,
a quarter as many clusters as frames; of each cluster the longest stretch counts, the rest joins its longer neighbour).
A place whose patches have a mean pairwise cosine above 0.8 within the segment is static: its patches become their mean
over time. The static places of a segment, and the others of each frame, are clustered by DPC-KNN to half as many where
there are more than 14. Before layer 11 of 32 the tokens stay, 40% of the static and of the other ones of every segment,
whose largest attention is highest: without rotary positions and causal mask, over heads and text tokens.
Keys of those that leave are not seen by generated tokens in the first layers either.

On a still image, which is a segment of one frame, nothing is static: it is clustered to half and selected from.

Unverified: that the attention is a softmax over all keys; the rounding of 40%, here to the nearest and at least one.

Deviations: a mean takes the place of its cluster's centre, a static one of the segment's first frame, where the code
lines up means by segment and cluster. Ties go to the earlier token, where the code draws noise. The text after the last
image asks. Keys that generated tokens do not see stay in the KV cache of the first layers, where the code takes them
out. Position ids are the original ones, where the code counts anew before the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from dyvte.errors import ConfigError
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.decoder.stages import in_proportion, keep_projections, projected, projection_of
from dyvte.policies.merging.density_peaks import cluster_means, density_peaks
from dyvte.policies.method import Source
from dyvte.policies.scorer import number_kept, top
from dyvte.policies.token_scores import attention_rows
from dyvte.policies.video.clips import clips

LAYER, DEPTH = 11, 32
"""The paper's layer before which tokens are selected, and the layers of its decoder."""
NEIGHBOURS = 7
"""That density is measured by."""
FEW = 14
"""Tokens up to which a frame's are left as they are."""


@dataclass
class PruneVid(Policy):
    """Merge over time and within frames, then keep what the question attends to.

    Attributes:
        selected: share of the merged tokens of each group that the decoder keeps.
        segments: number of segments of a video over its frames.
        static: mean cosine over time above which a place stands still.
        clustered: share of the tokens of a frame that clustering leaves.
        layer: before which tokens are selected, 1..L-1; None for 11 of 32, in proportion.

    Example:
        >>> with dyvte.PruneVid()(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "prunevid"
    label = "PruneVid"
    has_published_setting = True
    source = Source("2412.16117", "Visual-AI/PruneVid", "keys of the selecting softmax; the rounding of its share")
    acts = "thins"
    meets_budgets = False

    selected: float = 0.4
    segments: float = 0.25
    static: float = 0.8
    clustered: float = 0.5
    layer: int | None = None

    def __post_init__(self) -> None:
        for name in ("selected", "segments", "clustered"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"PruneVid: {name} is a share above 0, up to 1, got {getattr(self, name)}")

    def layer_of(self, mllm: MLLM) -> int:
        """The layer before which tokens are selected in this model."""
        return in_proportion([LAYER], DEPTH, mllm.num_layers)[0] if self.layer is None else self.layer

    def check(self, mllm: MLLM) -> None:
        """Refuse a layer that has none before it, or attention without projections of its own."""
        layer = self.layer_of(mllm)
        self.check_layer(layer, mllm, first=1)
        projection_of(mllm, layer - 1, "q_proj")

    def hooks(self, mllm: MLLM, run: PolicyRun) -> AbstractContextManager[None]:
        """Keep queries and keys of the layer before the selection."""
        return keep_projections(self, mllm, run, [self.layer_of(mllm) - 1], "q_proj", "k_proj")

    @torch.no_grad()
    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Merge before the first layer, select before another."""
        if layer == 0:
            self._merge(prefill)
        if layer == self.layer_of(prefill.mllm):
            self._select(layer, prefill)

    def _merge(self, prefill: Prefill) -> None:
        leaving, hidden = torch.zeros_like(prefill.kept), prefill.hidden.clone()
        group = torch.full_like(prefill.input_ids, -1)
        for row, places in clips(prefill.frames):
            states, stay, number = self.merged(hidden[row, places])
            hidden[row, places] = states
            leaving[row, places[~stay]] = True
            group[row, places] = number + group[row].amax() + 1
        prefill.state[id(self), "group"] = group
        prefill.hidden = hidden
        prefill.drop(leaving)

    def merged(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of a clip of frames [T, n, d] after merging.

        Returns:
            States [T, n, d], which of them stay [T, n], and the number of the segment's group [T, n] that each is of.
        """
        states, stay = frames.clone(), torch.ones_like(frames[..., 0], dtype=torch.bool)
        group = torch.zeros_like(stay, dtype=torch.long)
        for number, (start, stop) in enumerate(self.segments_of(frames)):
            still = similarity_over_time(frames[start:stop]) > self.static  # of a single frame not a number
            states[start, still] = frames[start:stop, still].mean(0)
            stay[start + 1 : stop, still] = False
            group[start:stop] = 2 * number + still
            for frame, places in [(start, still), *((each, ~still) for each in range(start, stop))]:
                index = places.nonzero().flatten()
                if len(index) > FEW:
                    left = max(int(len(index) * self.clustered), 1)
                    centres, means = cluster_means(states[frame, index], left, NEIGHBOURS)
                    states[frame, index[centres]] = means
                    stay[frame, index] = False
                    stay[frame, index[centres]] = True
        return states, stay, group

    def segments_of(self, frames: Tensor) -> list[tuple[int, int]]:
        """First frame of every segment of frames [T, n, d], and the one behind its last."""
        number = max(int(len(frames) * self.segments), 1)
        return stretches(density_peaks(frames.float().mean(1), number, NEIGHBOURS)[1].tolist())

    def _select(self, layer: int, prefill: Prefill) -> None:
        query, key = (projected(self, prefill, layer - 1, name) for name in ("q_proj", "k_proj"))
        attention, group = prefill.mllm.attention_of(layer - 1), prefill.state[id(self), "group"]
        scale = getattr(attention, "scaling", query.shape[3] ** -0.5)
        left, leaving = prefill.kept & prefill.layout.visual, torch.zeros_like(prefill.kept)
        for row in left.any(1).nonzero().flatten().tolist():
            asking = query[row : row + 1, :, prefill.layout.text_status_positions[row]]
            seen = prefill.kept[row].expand(1, asking.shape[2], -1)
            score = attention_rows(asking, key[row : row + 1], seen, scale).amax((0, 1, 2))
            for each in group[row, left[row]].unique().tolist():
                at = (left[row] & (group[row] == each)).nonzero().flatten()
                number = max(number_kept(float(self.selected), len(at)), 1)
                leaving[row, at[~top(score[at], number)]] = True
        prefill.state[id(self), "hidden"] = leaving
        prefill.drop(leaving)

    def hidden_keys(self, layer: int, prefill: Prefill) -> Tensor | None:
        """In the layers before the selection, what it took out."""
        return prefill.state[id(self), "hidden"] if layer < self.layer_of(prefill.mllm) else None


def similarity_over_time(frames: Tensor) -> Tensor:
    """[n] mean cosine of all pairs of frames [T, n, d] at every place; not a number for a single frame."""
    unit, number = nn.functional.normalize(frames.float(), dim=-1), len(frames)
    if number == 1:
        return unit.new_full(unit.shape[1:2], torch.nan)
    return (unit.sum(0).square().sum(-1) - number) / (number * (number - 1))


def stretches(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Segments [start, stop) of frames from the cluster of each: what does not follow on its like goes to a neighbour.

    The longest stretches of every cluster stay, if longer than one frame; each gap goes to the longer segment beside
    it, the one before of equal ones; one segment if none stays.

    Example:
        >>> stretches([0, 0, 0, 1, 0, 1, 1])
        [(0, 5), (5, 7)]
    """
    runs = [(label, len(list(run))) for label, run in groupby(labels)]
    longest = {label: max(size for other, size in runs if other == label) for label in labels}
    kept = [(label if size == longest[label] > 1 else None, size) for label, size in runs]
    joined = [(label, sum(size for _, size in run)) for label, run in groupby(kept, key=lambda each: each[0])]
    found: list[tuple[int | None, int]] = []
    for number, (label, size) in enumerate(joined):
        before = found[-1] if found else (None, 0)
        behind = joined[number + 1] if number + 1 < len(joined) else (None, 0)
        if label is None:
            label = behind[0] if behind[1] > before[1] else before[0]
        if found and label == before[0]:
            size += found.pop()[1]
        found.append((label, size))
    ends = [sum(size for _, size in found[: number + 1]) for number in range(len(found))]
    return list(zip([0, *ends], ends, strict=False))
