"""One question about one image, looked at from every side: what the page shows is read off this."""

from __future__ import annotations

import math
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dyvte.batch import Batch
from dyvte.errors import ConfigError
from dyvte.instrument.causal import LogitLens, logit_lens
from dyvte.instrument.sweep import ExitSweep, exit_sweep
from dyvte.instrument.views import View, view
from dyvte.mllm import MLLM

from ..measuring.token_attention import TokenAttention, token_attention

LENS_TOP = 3
"""Words that a patch shows."""

WIDEST_GRID = 32
"""Columns, at most, of patches whose place in the image is not known."""


@dataclass(frozen=True)
class PatchGrid:
    """How the visual tokens lie over the image.

    Attributes:
        numbers: [rows, columns] number of the visual token in each cell, counted from 0 along the sequence.
        image: [height, width, 3] from 0 to 255 what the cells cover.
        placed: False where the model's patches have no known place: the cells are then in the order of the sequence.
    """

    numbers: npt.NDArray[np.int64]
    image: npt.NDArray[np.uint8]
    placed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.numbers.shape[0], self.numbers.shape[1]

    def arrange(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A value of every visual token [..., V] as a map [..., rows, columns]."""
        return values[..., self.numbers]

    def patches_in(self, rectangle: Sequence[int]) -> list[int]:
        """Numbers of the visual tokens in a rectangle (top, left, bottom, right), its last row and column included."""
        top, left, bottom, right = rectangle
        rows, columns = self.shape
        if not (0 <= top <= bottom < rows and 0 <= left <= right < columns):
            raise ConfigError(
                f"the region (top, left, bottom, right) = {tuple(rectangle)} does not lie in {rows} rows and {columns} "
                "columns, counted from 0"
            )
        return sorted(self.numbers[top : bottom + 1, left : right + 1].flatten().tolist())


def patch_grid(mllm: MLLM, batch: Batch, image: Image.Image) -> PatchGrid:
    """The grid of one prompt with one image; see `dyvte.instrument.views.view` for which models' places are known."""
    count = int(batch.layout.visual.sum())
    if count == 0:
        raise ConfigError("the prompt holds no visual token: ask about an image")
    found = view(mllm, batch)
    placed = found is not None
    if found is None:
        columns = next(each for each in range(min(WIDEST_GRID, count), 0, -1) if count % each == 0)
        found = View(count // columns, columns, None)
    pixels = np.asarray(image.convert("RGB")) if found.image is None else (255 * found.image).round().astype(np.uint8)
    if not placed:
        pixels = np.full_like(pixels, 255)  # patches beside an image that they do not belong to would mislead
    return PatchGrid(found.arrange(torch.arange(count)).numpy(), pixels, placed)


@dataclass(frozen=True)
class Reading:
    """Everything about one question that needs the model only once. V visual tokens, L layers, A answer tokens.

    Attributes:
        answer_ids: [1, A] the full model's greedy answer, end token included where it came.
        words: the answer's tokens as text; the end token is `END`.
        attention: of every answer token.
        lens, lens_words: what every patch says after each layer; its words are [L + 1][V][LENS_TOP].
        sweep: the answer under every exit.
    """

    question: str
    batch: Batch
    answer_ids: Tensor
    words: list[str]
    grid: PatchGrid
    attention: TokenAttention
    lens: LogitLens
    lens_words: list[list[list[str]]]
    sweep: ExitSweep
    end_ids: list[int]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.attention.rows.shape[0]

    @property
    def num_heads(self) -> int:
        """H."""
        return self.attention.rows.shape[1]

    @property
    def _visual(self) -> Tensor:
        """[V] positions of the visual tokens."""
        return self.batch.layout.visual[0].nonzero()[:, 0].cpu()

    def on_image(self, token: int) -> npt.NDArray[np.float32]:
        """[L, H, V] attention of an answer token on every visual token."""
        return self.attention.rows[:, :, token, self._visual].numpy()

    def layer_that_looks(self, token: int) -> int:
        """The layer in which an answer token has most of its attention, mean over heads, on the image."""
        return int(np.nan_to_num(self.on_image(token).sum(-1).mean(1)).argmax())

    def attention_map(self, token: int, layer: int, head: int | None) -> npt.NDArray[np.float32]:
        """[rows, columns] attention of an answer token on the image in a layer, of one head or mean over heads."""
        found = self.on_image(token)[layer]
        return self.grid.arrange(found.mean(0) if head is None else found[head])

    def sink_map(self, layer: int) -> npt.NDArray[np.bool_]:
        """[rows, columns] which patches are sinks in a layer."""
        return self.grid.arrange(self.attention.sinks[layer, self._visual].numpy())

    def on_first_token(self, token: int) -> npt.NDArray[np.float32]:
        """[L, H] attention of an answer token on the sequence's first position, the common sink."""
        return self.attention.rows[:, :, token, int(self.batch.layout.first_token[0])].numpy()


END = "<end>"


def token_words(mllm: MLLM, ids: Sequence[int], end_ids: Sequence[int]) -> list[str]:
    """Each token as text; the end token as `END`, an empty piece as its name in the vocabulary."""
    words = []
    for each in ids:
        text = mllm.tokenizer.decode([each])
        words.append(END if each in end_ids else text if text.strip() else mllm.tokenizer.convert_ids_to_tokens(each))
    return words


def end_tokens(mllm: MLLM) -> list[int]:
    """Ids that end an answer."""
    found = mllm.model.generation_config.eos_token_id
    return [] if found is None else [int(each) for each in np.atleast_1d(found)]


class _TokenQueue:
    """What `generate(streamer=...)` writes to: the prompt first, then token by token."""

    def __init__(self) -> None:
        self.waiting: queue.Queue[list[int] | None] = queue.Queue()
        self._prompt = True

    def put(self, ids: Tensor) -> None:
        """Take in generated ids."""
        if self._prompt:
            self._prompt = False
        else:
            self.waiting.put(ids.flatten().tolist())

    def end(self) -> None:
        """Nothing more comes."""
        self.waiting.put(None)


@torch.no_grad()
def stream_answer(mllm: MLLM, batch: Batch, max_new_tokens: int) -> Iterator[list[int]]:
    """The greedy answer of one prompt so far, each time that a token is added; the last list is all of it.

    The model runs in a thread of its own, which has ended when the iterator has.
    """
    tokens = _TokenQueue()

    def run() -> list[int]:
        try:
            return mllm.generate_ids(batch, max_new_tokens=max_new_tokens, streamer=tokens)[0]
        finally:
            tokens.end()

    so_far: list[int] = []
    with ThreadPoolExecutor(1) as thread:
        outcome = thread.submit(run)
        while (new := tokens.waiting.get()) is not None:
            so_far = [*so_far, *new]
            yield so_far
    ids = outcome.result()
    if ids != so_far:  # cut behind an image token that random weights made
        yield ids


@torch.no_grad()
def read_question(mllm: MLLM, image: Image.Image, question: str, batch: Batch, ids: Sequence[int]) -> Reading:
    """Look at an answered question from every side: three passes, none of which changes the model.

    Args:
        batch: the prompt of image and question.
        ids: the full model's greedy answer.

    Raises:
        ConfigError: no image, or an empty answer.
        UnsupportedError: the model's layers or its attention cannot be followed exactly.
    """
    if not ids:
        raise ConfigError("the model gave no token at all (max_new_tokens is 0?)")
    answer_ids = torch.tensor([list(ids)], device=mllm.device)
    end_ids = end_tokens(mllm)
    lens = logit_lens(mllm, batch, positions="visual", top=LENS_TOP)
    ids_of_lens = lens.ids[0].cpu()  # [L + 1, V, top]
    known = {each: mllm.tokenizer.decode([each]).strip() for each in ids_of_lens.unique().tolist()}
    return Reading(
        question=question,
        batch=batch,
        answer_ids=answer_ids,
        words=token_words(mllm, ids, end_ids),
        grid=patch_grid(mllm, batch, image),
        attention=token_attention(mllm, batch, answer_ids),
        lens=lens,
        lens_words=[[[known[each] for each in patch] for patch in layer] for layer in ids_of_lens.tolist()],
        sweep=exit_sweep(mllm, batch, answer_ids, entropy=False),
        end_ids=end_ids,
    )


def largest(values: npt.NDArray[Any]) -> float:
    """The largest finite value, at least a tiny positive number: what a colour scale ends at."""
    finite = values[np.isfinite(values)]
    return max(float(finite.max()), math.ulp(1.0)) if finite.size else math.ulp(1.0)
