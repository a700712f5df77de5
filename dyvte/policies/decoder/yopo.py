"""Visual tokens attend to their neighbours only, and leave half way.

YOPO (arXiv 2410.06169; code ZhangAIPI/YOPO_MLLM_Pruning) prunes computation, not tokens. Built here: attention of
visual tokens on visual tokens of the same image within a window of the grid (5 x 5), and no visual token seen from
layer 20 of 40 on, which is an exit.

Deviations: heads without attention on the image and half of the hidden neurons of visual tokens are left out in the
paper, by calibration and, for LLaVA, fine-tuning; neither is built. Within the window the causal mask holds, where the
code lifts it. Hidden keys get no weight and the others share it, where the code for LLaVA zeroes weights. The window
saves nothing by itself: as in the code it is a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.errors import ConfigError
from dyvte.instrument.hooks import Selection
from dyvte.instrument.role_attention import allowed_pairs
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.method import Source
from dyvte.policies.token_scores import check_square, images, place_in_image


@dataclass
class YOPO(Policy):
    """A window among visual tokens, then an exit.

    Attributes:
        keep: share of the decoder layers that see visual tokens.
        window: side of the window in tokens, odd.

    Example:
        >>> with dyvte.YOPO()(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "yopo"
    label = "YOPO, window and exit"
    source = Source("2410.06169", "ZhangAIPI/YOPO_MLLM_Pruning", "pruning of heads and neurons is not built")
    needs = ("square grid",)
    acts = "exits"

    keep: float = 0.5
    window: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1 or self.window < 1 or self.window % 2 == 0:
            raise ConfigError(f"YOPO: keep is a share 0..1 and window odd, got {self.keep} and {self.window}")

    def exit_layer(self, mllm: MLLM) -> int:
        """Decoder layers that see visual tokens."""
        return round(self.keep * mllm.num_layers)

    def shares(self, mllm: MLLM) -> list[float]:
        """All before the exit, none behind it."""
        return [float(layer < self.exit_layer(mllm)) for layer in range(mllm.num_layers)]

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Refuse images without a grid; leave at the exit."""
        if layer == 0:
            check_square("YOPO", place_in_image(prefill.layout.visual)[1])
        if layer == self.exit_layer(prefill.mllm):
            prefill.drop(prefill.layout.visual)

    @contextmanager
    def hooks(self, mllm: MLLM, run: PolicyRun) -> Iterator[None]:
        """Give the layers before the exit a mask with the window."""
        windowed = {each for each in mllm.attentions[: self.exit_layer(mllm)] if each is not None}

        def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            prefill = run.prefill
            if module not in windowed or prefill is None or prefill.running is None:  # a deep copy is not in it
                return None
            hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            window = getattr(module, "sliding_window", None)
            allowed, bias = allowed_pairs(kwargs.get("attention_mask"), hidden.shape[1], True, window, hidden.device)
            seen = within_window(prefill.layout.visual, prefill.running, self.window // 2)
            if allowed is None:
                allowed = torch.ones_like(seen).tril()
            mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
            mask = mask if bias is None else mask + bias[:, 0]
            mask = mask.masked_fill(~(allowed & seen), torch.finfo(hidden.dtype).min)
            return args, {**kwargs, "attention_mask": mask[:, None]}

        with ExitStack() as stack:
            for attention in windowed:
                stack.enter_context(attention.register_forward_pre_hook(hide, with_kwargs=True))
            yield


def within_window(visual: Tensor, selection: Selection, radius: int) -> Tensor:
    """[b, n, n] whether a query may see a key: always, unless both are of one image and too far apart on its grid."""
    place, size = place_in_image(visual)
    side = size.sqrt().round().long().clamp(min=1)
    image, row, column = (
        selection.pack(each) for each in (images(visual), place.div(side, rounding_mode="floor"), place % side)
    )
    apart = torch.maximum(*((each[:, :, None] - each[:, None]).abs() for each in (row, column)))
    inside = (image[:, :, None] == image[:, None]) & (image >= 0)[:, :, None]
    return ~inside | (apart <= radius)
