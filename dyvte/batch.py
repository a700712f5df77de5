"""Model inputs with the role of every position."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput

from dyvte.data.video import Video
from dyvte.errors import DyvteWarning, UnsupportedError
from dyvte.layout import PADDING, TokenLayout
from dyvte.model_parts import CACHE_NAMES

IGNORE_INDEX = -100
"""Padding of answer ids and labels, as in `torch.nn.CrossEntropyLoss`."""

Image = Any  # PIL.Image.Image; Pillow is only needed by whoever opens the images

Media = Any  # Image, dyvte.data.video.Video, or several of them

Rows = int | slice | Sequence[int] | Tensor


class Batch(dict[str, Any]):
    """Model inputs, to be passed as `model(**batch)`, with the role of every position in `layout`.

    `batch["input_ids"]` is an input; `batch[2:5]`, `batch[[0, 3]]` and `batch[mask]` are batches of some of the rows,
    their images included; `Batch.cat` puts batches together again.

    Attributes:
        layout: role of every position.
        images: number of images of each row, where it is known (from `MLLM.encode`), else None.

    Example:
        >>> ids = torch.tensor([[1, 7, 7, 5], [1, 7, 7, 6]])
        >>> batch = Batch({"input_ids": ids}, TokenLayout.from_input_ids(ids, None, [7]))
        >>> batch[1:]["input_ids"].tolist()
        [[1, 7, 7, 6]]
    """

    layout: TokenLayout
    images: tuple[int, ...] | None

    def __init__(self, inputs: dict[str, Any], layout: TokenLayout, images: Sequence[int] | None = None) -> None:
        super().__init__(inputs)
        self.layout = layout
        self.images = None if images is None else tuple(images)

    def __getitem__(self, key: Any) -> Any:
        """An input by its name, or some rows as a batch.

        Raises:
            UnsupportedError: an input cannot be told apart by rows.
        """
        return super().__getitem__(key) if isinstance(key, str) else self._rows(key)

    def _rows(self, key: Rows) -> Batch:
        everything = torch.arange(len(self.layout.roles))
        chosen = everything[key.cpu() if isinstance(key, Tensor) else key].reshape(-1)
        inputs = {name: self._rows_of(name, value, chosen) for name, value in self.items()}
        if not self.layout.visual[chosen.to(self.layout.roles.device)].any():  # models take no empty images
            inputs = {n: v for n, v in inputs.items() if not (isinstance(v, Tensor) and v.numel() == 0)}
        images = None if self.images is None else [self.images[row] for row in chosen.tolist()]
        return Batch(inputs, TokenLayout(self.layout.roles[chosen.to(self.layout.roles.device)]), images)

    def _rows_of(self, name: str, value: Any, chosen: Tensor) -> Any:
        """One input of the chosen rows: its lines are told apart by rows, images, or shares of the visual tokens."""
        shape = self["input_ids"].shape
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, ModelOutput):
            return type(value)(**{key: self._rows_of(f"{name}.{key}", each, chosen) for key, each in value.items()})
        if isinstance(value, dict):  # what an encoder made of images, by their kind
            return {kind: self._rows_of(f"{name}[{kind!r}]", each, chosen) for kind, each in value.items()}
        if isinstance(value, list) and len(value) == sum(counts := self._images_of_rows()):
            stops = list(itertools.accumulate(counts))
            return [value[at] for row in chosen.tolist() for at in range(stops[row] - counts[row], stops[row])]
        if not isinstance(value, Tensor):
            raise UnsupportedError(f"rows of a batch cannot be taken: {name} is a {type(value).__name__}, not a tensor")
        at = chosen.to(value.device)
        if value.shape[:2] == shape:
            return value[at]
        if value.ndim == 3 and value.shape[1:] == shape:  # positions in several dimensions
            return value[:, at]
        axis = self._image_axis(value)
        parts = self._lines_of_rows(value, axis) if value.ndim else None
        if parts is None:
            raise UnsupportedError(
                f"rows of a batch cannot be taken: which of the {tuple(value.shape)} of {name} belong to which row is "
                "unknown; encode the rows with MLLM.encode"
            )
        lines = value.split(parts, axis)
        return torch.cat([lines[row] for row in chosen.tolist()], axis) if len(chosen) else value.narrow(axis, 0, 0)

    def _image_axis(self, value: Tensor) -> int:
        """Where images follow each other: of MiniCPM-V's patches [1, channels, size, size * patches] along the last."""
        sizes = self.get("target_sizes")
        packed = sizes is not None and value.ndim == 4 and value.shape[3] == value.shape[2] * int(sizes.prod(1).sum())
        return 3 if packed else 0

    def _images_of_rows(self) -> list[int]:
        """Images of each row: as it was encoded, else its stretches of visual tokens."""
        starts = self.layout.visual & ~torch.nn.functional.pad(self.layout.visual, (1, 0))[:, :-1]
        return list(self.images) if self.images is not None else starts.sum(1).tolist()

    def _lines_of_rows(self, value: Tensor, axis: int) -> list[int] | None:
        """How many of an input's lines along an axis belong to each row; None if that cannot be told."""
        visual, length, images = self.layout.visual, value.shape[axis], self._images_of_rows()
        stacked = value.ndim > 4 and value.shape[:2] == (len(visual), max(images)) and "image_sizes" not in self
        if stacked:  # [B, images, ...], as Idefics and SmolVLM have them
            return [1] * length
        if sum(images) == length:
            return images
        tokens = visual.sum(1).tolist()
        total = max(sum(tokens), 1)
        if all(length * count % total == 0 for count in tokens) and sum(tokens):
            return [length * count // total for count in tokens]
        return [1] * length if length == len(visual) else None

    @classmethod
    def cat(cls, batches: Sequence[Batch]) -> Batch:
        """The rows of several batches of one model as one batch, the shorter ones padded on the left.

        Raises:
            ValueError: no batch, or batches with different inputs.
        """
        names = [name for batch in batches for name in batch]
        for batch in batches:  # a batch without images lacks their inputs
            if (missing := set(names) - set(batch)) and batch.layout.visual.any():
                raise ValueError(
                    f"Batch.cat takes batches with the same inputs; one lacks {', '.join(sorted(missing))}"
                )
        if not batches:
            raise ValueError("Batch.cat needs at least one batch")
        length = max(batch["input_ids"].shape[1] for batch in batches)
        padded = [batch._padded_to(length) for batch in batches]
        inputs: dict[str, Any] = {}
        for name in dict.fromkeys(names):
            owners = [batch for batch in padded if name in batch]
            first, shape = owners[0][name], owners[0]["input_ids"].shape
            positions = isinstance(first, Tensor) and first.ndim == 3 and first.shape[1:] == shape
            values = [batch[name] for batch in owners]
            axis = 1 if positions else owners[0]._image_axis(first) if isinstance(first, Tensor) else 0
            inputs[name] = torch.cat(values, axis) if isinstance(first, Tensor) else first
        images = [batch.images for batch in batches]
        known = None if any(each is None for each in images) else [count for each in images for count in each or ()]
        return cls(inputs, TokenLayout(torch.cat([batch.layout.roles for batch in padded])), known)

    def _padded_to(self, length: int) -> Batch:
        shape = self["input_ids"].shape
        missing = length - shape[1]
        inputs = dict(self)
        inputs.setdefault("attention_mask", torch.ones_like(self["input_ids"]))
        for name, value in inputs.items():
            if missing and isinstance(value, Tensor) and shape == value.shape[-2:] and value.ndim < 4:
                inputs[name] = torch.nn.functional.pad(value, (missing, 0))
        return Batch(inputs, TokenLayout(torch.nn.functional.pad(self.layout.roles, (missing, 0), value=PADDING)))

    def followed_by(self, answer_ids: Tensor) -> dict[str, Any]:
        """Inputs of the prompts, padded on the left, with answers [B, A] behind them (-100 at padding)."""
        batch = self.left_padded() if self.layout.padding[:, -1].any() else self
        real = answer_ids != IGNORE_INDEX
        extension = {"input_ids": answer_ids.masked_fill(~real, 0), "attention_mask": real.long()}
        types, visual = batch.get("token_type_ids"), batch.layout.visual
        if types is not None and visual.any() and not types[visual].any():
            # Types that do not mark the image mark the prefix (PaliGemma), which answers are not part of.
            extension["token_type_ids"] = torch.ones_like(answer_ids)
        inputs = dict(batch)
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.shape == batch["input_ids"].shape:  # others say "text": 0
                tail = extension.get(name, torch.zeros_like(answer_ids)).to(value.dtype)
                inputs[name] = torch.cat([value, tail], dim=1)
        return inputs

    def without_cache(self, model: Any) -> dict[str, Any]:
        """Inputs of one pass of a model whose states, not logits, are looked at: as few logits as it can make."""
        inputs = {name: value for name, value in self.items() if name not in ("labels", *CACHE_NAMES)}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1
        return {**inputs, "use_cache": False}

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.items()}
        return Batch(moved, self.layout.to(device), self.images)

    def left_padded(self) -> Batch:
        """The same batch with its padding moved to the left, where `generate` needs it."""
        return self._rolled((~self.layout.padding).flip(1).int().argmax(1))

    def right_padded(self) -> Batch:
        """The same batch with its padding moved to the right."""
        return self._rolled(-self.layout.first_token)

    def _rolled(self, shift: Tensor) -> Batch:
        """The batch with row b moved `shift[b]` positions to the right, wrapping around."""
        if not shift.any():
            return self
        length = self["input_ids"].shape[1]
        columns = (torch.arange(length, device=shift.device) - shift[:, None]) % length
        rolled = dict(self)
        for name, value in self.items():
            if isinstance(value, Tensor) and value.shape == self["input_ids"].shape:
                rolled[name] = value.gather(1, columns.to(value.device))
        return Batch(rolled, TokenLayout(self.layout.roles.gather(1, columns)), self.images)


def padded_answers(rows: Sequence[Sequence[int]]) -> Tensor:
    """Answer ids [B, A] from those of each row, -100 at padding."""
    answers = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(answers, batch_first=True, padding_value=IGNORE_INDEX)


def image_rows(images: Sequence[Media | None] | None, questions: Sequence[str]) -> tuple[list[list[Image]], list[Any]]:
    """The images of every question, and its videos, each a list of frames."""
    if isinstance(questions, str):
        raise TypeError("questions must be a list of strings, one a sample, not a single string")
    if images is None:
        images = [None] * len(questions)
    if len(images) != len(questions):
        raise ValueError(f"got {len(images)} entries of images for {len(questions)} questions; give one a question")
    rows = [[] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]
    films = [[list(each.frames) for each in row if isinstance(each, Video)] for row in rows]
    return [[each for each in row if not isinstance(each, Video)] for row in rows], films


def warn_if_question_precedes_image(
    placeholder: str | None, prompts: Sequence[str], questions: Sequence[str], rows: Sequence[Sequence[Image]]
) -> None:
    """Warn of a prompt format that puts the question first: then the text after the image does not hold it."""
    for prompt, question, row in zip(prompts, questions, rows, strict=True):
        asked = question.strip()
        if row and placeholder and asked and prompt.rfind(placeholder) > prompt.rfind(asked) >= 0:
            warnings.warn(
                "the prompt puts the question before the image: text after the image is the template only, so text "
                "status and cross attention do not see the question",
                DyvteWarning,
                stacklevel=3,
            )
            return
