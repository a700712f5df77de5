"""Sliding windows over new tokens, which see the whole prompt besides."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dyvte.instrument.cache import KeptLayer

REFERENCE = ("UnlimitedOcrDynamicReferenceSlidingWindowLayer",)
"""Cache layers of reference sliding-window attention (Unlimited OCR)."""


class KeptReferenceLayer(KeptLayer):
    """A `KeptLayer` that never forgets what stayed of the prompt."""

    keeps_prompt = True
    _layer_type = None  # of the class: it is not to be made for a kind of layer

    def __init__(self, replaced: DynamicLayer) -> None:
        super().__init__(replaced)
        self._layer_type = replaced._layer_type  # by which the model finds who knows the prompt's length

    @property
    def prefill_length(self) -> int | None:
        """Length of the prompt, as transformers' own layer has it."""
        return self._prompt_length or None

    def set_prefill_length(self, prefill_length: int) -> None:
        """Told before a prefill; `finish_prefill` says it afterwards."""

    def reset(self) -> None:
        """Forget everything, the length that the replaced layer was told too."""
        super().reset()
        self.replaced.reset()

    def get_max_length(self) -> int:
        """Length at which the window begins to forget."""
        assert self.sliding_window is not None
        return self._prompt_length + self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the model's mask covers, and how many new tokens the window has left behind."""
        assert self.sliding_window is not None
        gone = max(self.length - self._prompt_length - self.sliding_window + 1, 0)
        return self.length - gone + query_length, gone

    def mask_columns(self, position: Tensor, num_queries: int) -> Tensor:
        """Where the model's mask has the keys at some positions: the prompt's, then the window's."""
        gone = self.get_mask_sizes(num_queries)[1]
        later = position - gone
        return torch.where(position < self._prompt_length, position, later.where(later >= self._prompt_length, -1))
