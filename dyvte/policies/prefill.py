"""One prefill as a policy sees it: what every position is, and which of them the next layer will see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.cost.calls import together_is_cheaper
from dyvte.errors import UnsupportedError
from dyvte.instrument.hooks import Selection
from dyvte.instrument.video_frames import frame_numbers
from dyvte.layout import TokenLayout

if TYPE_CHECKING:
    from dyvte.mllm import MLLM


@dataclass
class Rows:
    """What the host knows of the rows of a prefill.

    Attributes:
        counts, text_counts: positions that a row keeps, and those of them that are text.
        seeing: whether a row keeps a visual position.
        ends_with_visual: whether some prompt has a visual token last.
        layers_with_image: layers so far that saw one.
        changed: since the selections were made.
        unknown: some positions left that only the device knows of.
    """

    counts: list[int]
    text_counts: list[int]
    seeing: list[bool]
    ends_with_visual: bool
    layers_with_image: list[int]
    changed: bool = False
    unknown: bool = False

    @classmethod
    def of(cls, layout: TokenLayout) -> Rows:
        """Before the first layer: one host synchronisation."""
        visual = layout.visual
        text, images, last = torch.stack(
            [layout.text.sum(1), visual.sum(1), visual.gather(1, layout.last_prompt[:, None])[:, 0].long()]
        ).tolist()
        counts = [one + other for one, other in zip(text, images, strict=True)]
        return cls(counts, text, [each > 0 for each in images], any(last), [0] * len(counts))

    def look(self, kept: Tensor, has_visual: Tensor) -> None:
        """Ask the device; what was kept never comes back, so equal numbers are equal positions."""
        counts, seeing = torch.stack([kept.sum(1), has_visual.long()]).tolist()
        self.changed |= counts != self.counts
        self.counts, self.seeing, self.unknown = counts, [bool(each) for each in seeing], False

    def leave(self, leaving: Sequence[bool]) -> None:
        """Rows without their image from here on."""
        for row, leaves in enumerate(leaving):
            if leaves:
                self.counts[row], self.seeing[row] = self.text_counts[row], False
        self.changed |= any(leaving)


@dataclass
class Prefill:
    """One prefill as a policy sees it.

    Attributes:
        mllm: the model.
        layout: role of every position of the prompts.
        hidden: [B, N, d] input states of the layer about to run, for every position (those that left keep the states
            they left with). A policy may assign changed states, as token merging does. Where a layer holds several
            streams (Gemma 3n's AltUp, hyper-connections) they stand side by side, [B, N, streams * d].
        key_bias: [B, N] added to the attention scores of a key from this layer on, or None.
        place: [B, N] the position whose rotary embedding a position takes from this layer on; None for its own.
        input_ids: [B, N] of the prompts.
        inputs: what the model, or its `generate`, was called with, while the prefill runs.
        state: for policies to remember things between the layers of one prefill.

    Example:
        >>> with dyvte.FastV(layer=2, keep=0.5)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> int((run.prefill.kept & run.prefill.layout.visual)[0].sum())
        72
    """

    mllm: MLLM
    layout: TokenLayout
    hidden: Tensor
    _kept: Tensor
    input_ids: Tensor
    key_bias: Tensor | None = None
    place: Tensor | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    state: dict[Any, Any] = field(default_factory=dict)
    _rows: Rows = field(init=False)
    _running: Selection | Literal["everything"] | None = None
    _selections: list[Selection] | None = None
    _together: Selection | None = None

    def __post_init__(self) -> None:
        self._rows = Rows.of(self.layout)

    @property
    def kept(self) -> Tensor:
        """[B, N] positions that the layer will see; padding never is. To read only: the host counts what leaves.

        Raises:
            UnsupportedError: it is assigned (the layers would not notice): `drop` and `drop_image` take positions out.
        """
        return self._kept

    @kept.setter
    def kept(self, _: Tensor) -> None:
        raise UnsupportedError(
            "Prefill.kept is for reading: take positions out with prefill.drop(mask) or .drop_image()"
        )

    def drop(self, positions: Tensor) -> None:
        """Take visual positions out of this layer and all later ones: one host synchronisation for all of a layer.

        Args:
            positions: [B, N] boolean; text positions in it stay where they are.
        """
        self._kept = self._kept & ~(positions & self.layout.visual)
        self._rows.unknown = True

    def drop_image(self, rows: Tensor | None = None) -> None:
        """Take all visual positions of some rows out of this layer and all later ones.

        Args:
            rows: [B] boolean, whose: one host synchronisation. None for all of them: none.
        """
        chosen = [True] * len(self.kept) if rows is None else rows.tolist()
        leaving = [leaves and sees for leaves, sees in zip(chosen, self._rows.seeing, strict=True)]
        if not any(leaving):
            return
        visual = self.layout.visual
        if rows is not None and leaving != self._rows.seeing:
            visual = visual & rows.to(visual.device)[:, None]
        self._kept = self._kept & ~visual
        self._rows.leave(leaving)

    @property
    def ends_with_visual(self) -> bool:
        """Whether some prompt has a visual token last, so that an exit would leave no text to answer from."""
        return self._rows.ends_with_visual

    @property
    def sees_image(self) -> bool:
        """Whether some row may still have visual positions, as far as the host knows without asking the device."""
        return any(self._rows.seeing)

    @property
    def has_visual(self) -> Tensor:
        """[B] whether the layer will see a visual position of the row."""
        return (self.kept & self.layout.visual).any(1)

    @property
    def layers_with_image(self) -> Tensor:
        """[B] number of layers so far that saw a visual position of the row; in the end its exit layer k."""
        return torch.tensor(self._rows.layers_with_image, device=self.kept.device)

    @property
    def frames(self) -> Tensor:
        """[B, N] the frame of every visual position, counted in a row from 0; -1 elsewhere (see `frame_numbers`).

        To be asked for while the prefill runs.

        Raises:
            UnsupportedError: the inputs of the videos do not say how their tokens are divided into frames.
        """
        return frame_numbers(self.mllm, Batch({**self.inputs, "input_ids": self.input_ids}, self.layout))

    @property
    def running(self) -> Selection | None:
        """While a layer runs, the positions that it runs on; None between layers.

        A layer runs once for rows with and once for rows without visual tokens, unless that is dearer than together.
        """
        if self._running == "everything":
            rows = torch.arange(len(self.kept), device=self.kept.device)
            position = torch.arange(self.kept.shape[1], device=self.kept.device)
            self._running = Selection(rows, position.expand_as(self.kept), self.kept)
        return None if isinstance(self._running, str) else self._running

    @contextmanager
    def running_on(self, selection: Selection | None) -> Iterator[None]:
        """Within the block a layer runs on these positions; None for all of them."""
        self._running = "everything" if selection is None else selection
        try:
            yield
        finally:
            self._running = None

    def selections(self) -> list[Selection] | None:
        """The kept positions, as one selection for rows with and one for rows without visual tokens.

        All rows are in one where that is cheaper (`dyvte.cost.calls`), padded to the longest. None as long as no row
        left any position out. Costs one host synchronisation after a `drop`.
        """
        rows = self._rows
        if rows.unknown:
            rows.look(self.kept, self.has_visual)
        if rows.changed:
            rows.changed = False
            self.forget()
            self._together = None
            self._selections = [
                Selection.of(self.kept, on_device, [rows.counts[row] for row in of_group], of_group)
                for of_group, on_device in self._groups_of_rows()
            ]
        return self._selections

    def selection_behind_padding(self) -> Selection | None:
        """The kept positions of all rows as one selection, padding in front: for layers that carry a running state."""
        if self.selections() is not None and self._together is None:
            self._together = Selection.behind_padding(self.kept, self._rows.counts)
        return self._together

    def count_layer(self) -> None:
        """A layer is about to run on the selections."""
        for row, sees in enumerate(self._rows.seeing):
            self._rows.layers_with_image[row] += sees

    def _groups_of_rows(self) -> list[tuple[tuple[int, ...], Tensor]]:
        """Rows with and rows without visual tokens, on the host and on the device, without sending any."""
        counts, device = self._rows.counts, self.kept.device
        groups = [
            tuple(row for row, sees in enumerate(self._rows.seeing) if sees == wanted) for wanted in (True, False)
        ]
        if not all(groups) or together_is_cheaper(self.mllm, [[counts[row] for row in each] for each in groups]):
            everyone = tuple(range(len(counts)))
            return [(everyone, torch.arange(len(everyone), device=device))]
        order = (~self.has_visual).to(torch.int8).argsort(stable=True)
        parts = order.split_with_sizes([len(each) for each in groups])
        return list(zip(groups, parts, strict=True))

    def places(self, selection: Selection) -> Selection | None:
        """Where the rotary embeddings of a selection come from, where that is not from its own positions."""
        if self.place is None:
            return None
        return Selection(selection.rows, selection.pack(self.place), selection.valid)

    def forget(self) -> None:
        """Let go of masks and tables packed for the layers."""
        for selection in (self._selections or []) + ([self._together] if self._together else []):
            selection.forget()
