"""Model inputs with the role of every position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyvte.layout import TokenLayout

IGNORE_INDEX = -100
"""Padding of answer ids and labels, as in `torch.nn.CrossEntropyLoss`."""

Image = Any  # PIL.Image.Image; Pillow is only needed by whoever opens the images


class Batch(dict[str, Any]):
    """Model inputs, to be passed as `model(**batch)`, with the role of every position in `layout`."""

    layout: TokenLayout

    def __init__(self, inputs: dict[str, Any], layout: TokenLayout) -> None:
        super().__init__(inputs)
        self.layout = layout

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.items()}
        return Batch(moved, self.layout.to(device))

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
        return Batch(rolled, TokenLayout(self.layout.roles.gather(1, columns)))
