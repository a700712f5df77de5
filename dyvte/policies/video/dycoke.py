"""Patches that a frame shares with an earlier one leave before the decoder; generated tokens see few of the rest.

DyCoke (arXiv 2411.15024; code KD-TAO/DyCoke): frames come in fours. The second is compared with the first, the fourth
with the third and the third with the first, place by place by cosine, and of each the share 1 - K of the patches that
resemble the earlier frame least stays. While decoding, layers from L on use the share 1 - P of the visual keys, those
that the last token attends to most in the layer before; the choice is made anew once the cosine of that row of
attention with the one that it was made by falls below 0.9. K = P = 0.7 and L = 3 are those of the code's README.

On a still image, which is one frame, nothing leaves before the decoder, and decoding is as above.

Deviations: tokens stay in the order of the prompt, where the code has them by similarity. Every group of four is
compared, an incomplete one too, where the code leaves out the last group's third frame and loses an odd last frame. As
in the paper a choice stays in use while it holds, where the code falls back on all keys. A row's own attention decides
in a batch. Keys that are not chosen stay in the KV cache, as in the code, and are masked, so that decoding is not
faster. Position ids are the original ones unless `positions="contiguous"`, which is what the code has. Under beam
search a choice belongs to a place in the beam.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import ConfigError, UnsupportedError
from dyvte.mllm import MLLM
from dyvte.policies.attention_policy import watch_steps
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.method import Source
from dyvte.policies.positions import check_positions, make_contiguous, shifted_decoding
from dyvte.policies.scorer import top
from dyvte.policies.token_scores import drop_lowest
from dyvte.policies.video.clips import clips

COMPARED_WITH = (0, 1, 2, 1)
"""How many frames before it each of four is compared with; the first with none."""


@dataclass
class DyCoke(Policy):
    """Leave out what repeats an earlier frame, and most visual keys while decoding.

    Attributes:
        repeated: share of the tokens of a frame that is compared with an earlier one which stays; the paper's 1 - K.
        decoded: share of the visual keys that generated tokens see; the paper's 1 - P.
        layer: the first layer, 1..L-1, in which they do.
        similar: cosine of two rows of attention down to which a choice of keys holds.
        positions: as in `ScorerPolicy`.

    Example:
        >>> with dyvte.DyCoke()(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "dycoke"
    label = "DyCoke"
    has_published_setting = True
    source = Source("2411.15024", "KD-TAO/DyCoke")
    acts = "thins"
    meets_budgets = False
    watches_steps = True

    repeated: float = 0.3
    decoded: float = 0.3
    layer: int = 3
    similar: float = 0.9
    positions: str = "kept"

    def __post_init__(self) -> None:
        for name in ("repeated", "decoded"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"DyCoke: {name} is a share 0..1, got {getattr(self, name)}")

    def check(self, mllm: MLLM) -> None:
        """Refuse a layer that has none before it, and positions that the model has no exact meaning for."""
        self.check_layer(self.layer, mllm, first=1)
        check_positions("DyCoke", self.positions, mllm)

    @contextmanager
    def hooks(self, mllm: MLLM, run: PolicyRun) -> Iterator[None]:
        """As `Policy.hooks`; also refuses models whose attention cannot be watched."""

        def see(row: Tensor) -> None:
            if run.prefill is not None:
                self._choose_keys(run.prefill, row)

        shifted = shifted_decoding(mllm, run) if self.positions == "contiguous" else nullcontext()
        with watch_steps(mllm, self.layer - 1, see), shifted:
            yield

    @torch.no_grad()
    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Compare frames."""
        if layer:
            return
        leaving = torch.zeros_like(prefill.kept)
        for row, places in clips(prefill.frames):
            leaving[row, places[repeats(prefill.hidden[row, places], self.repeated)]] = True
        prefill.drop(leaving)
        if self.positions == "contiguous":
            make_contiguous(prefill)

    def _choose_keys(self, prefill: Prefill, row: Tensor) -> None:
        """The last token's attention [B, T] in the layer before says which keys the next layers hide."""
        visual, key = prefill.kept & prefill.layout.visual, (id(self), "row")
        row = row[:, : visual.shape[1]] * visual
        if (chosen_by := prefill.state.get(key)) is not None:
            holds = torch.cosine_similarity(row, chosen_by, dim=1) >= self.similar
            row = torch.where(holds[:, None], chosen_by, row)
        prefill.state[key] = row
        prefill.state[id(self), "hidden"] = drop_lowest(row, visual, (visual.sum(1) * self.decoded).long())

    def hidden_keys(self, layer: int, prefill: Prefill) -> Tensor | None:
        """Those that the step's token attends to less in the layer before."""
        if layer < self.layer:
            return None
        hidden: Tensor | None = prefill.state.get((id(self), "hidden"))
        if hidden is None:
            raise UnsupportedError(
                f"DyCoke: decoder layer {self.layer - 1} does not show its attention while decoding, which chooses keys"
            )
        return hidden


def repeats(frames: Tensor, stays: float) -> Tensor:
    """[T, n] boolean: tokens of frames [T, n, d] that repeat those of an earlier frame, all but a share of each."""
    found = torch.zeros(frames.shape[:2], dtype=torch.bool, device=frames.device)
    for number, frame in enumerate(frames.float()):
        back = COMPARED_WITH[number % len(COMPARED_WITH)]
        if back:
            alike = torch.cosine_similarity(frame, frames[number - back].float(), dim=1)
            found[number] = ~top(-alike, int(stays * len(alike)))
    return found
