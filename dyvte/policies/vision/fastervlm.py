"""The patches that the class token attends to most stay.

FasterVLM (arXiv 2412.01818, version 1; code Theia-4869/FasterVLM): mean over heads of the class token's attention in
the last encoder layer but one, the highest stay; in LLaVA-NeXT as many of every tile, and all newline tokens.

Deviations: `keep` is shared out over tiles by their size after cutting to the image, where the code takes a number of
every whole tile; without class token (SigLIP, Qwen) the mean attention that a patch receives takes its row's place;
position ids are the original ones unless `positions="contiguous"`, which is what the code has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dyvte.policies.method import Source
from dyvte.policies.vision.tiles import ByClassAttention


@dataclass
class FasterVLM(ByClassAttention):
    """Keep the tokens with most attention of the class token, and all separators.

    Example:
        >>> with dyvte.FasterVLM(keep=64)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "fastervlm"
    label = "FasterVLM"
    source = Source("2412.01818", "Theia-4869/FasterVLM")

    keeps_separators: ClassVar[bool] = True
