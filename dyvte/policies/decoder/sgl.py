"""What a small model looks at while it answers stays in the large one.

SGL (arXiv 2412.03324; code NUS-HPC-AI-Lab/SGL), its guided pruning: a smaller model with the same visual tokens answers
first. The attention that a token gets from the rows of the text after the image and of the answer, summed over all
layers and heads of the small model, ranks it; before layer int(0.3 L) the large model keeps the best.

Deviations: without a `guide` the model's own layers before the pruning stand in for the small model, with the rows of
the prompt alone. The guide's answer is teacher-forced in a second pass, which gives the rows that its decoding steps
had; the end token, which never was an input, has no row. The code also adds the row of the last visual token, which the
paper does not. The early exit to the small model's answer, whose score the code computes and never uses, is left out.
Of several images each keeps its share.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.cost.flops import overhead
from dyvte.errors import UnsupportedError
from dyvte.instrument.hooks import override_method
from dyvte.instrument.sweep import greedy_answer_ids
from dyvte.loading import load
from dyvte.mllm import MLLM
from dyvte.policies.attention_policy import AttentionPolicy, LayerAttention
from dyvte.policies.base import PolicyRun, Prefill
from dyvte.policies.decoder.stages import StagedScorer
from dyvte.policies.method import Source


@dataclass
class SGL(StagedScorer):
    """Prune by the attention of a small model that answers first.

    Attributes:
        keep: share of an image's tokens that stays.
        layers: where it acts; None for 9 of 32, in proportion.
        guide: the small model, or what `dyvte.load` takes; its prompts have the same visual tokens. None for the own
            layers before the pruning.
        answer_tokens: the guide's longest answer; 0 for the rows of the prompt alone.

    Example:
        >>> with dyvte.SGL(keep=0.4, guide=dyvte.load("llava_shapes"))(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "sgl"
    label = "SGL"
    source = Source("2412.03324", "NUS-HPC-AI-Lab/SGL")
    paper_layers = (9,)
    sums_layers = True

    keep: float = 0.3
    guide: MLLM | str | None = None
    answer_tokens: int = 64

    def watched_layers(self, mllm: MLLM) -> Collection[int]:
        """The own layers before the pruning, where no other model guides."""
        return range(self.layers_of(mllm)[0]) if self.guide is None else ()

    def look(self, layer: int, prefill: Prefill, attention: LayerAttention) -> Tensor:
        """Attention received from the text after the image."""
        return attention.received(prefill.layout.text_status_positions)

    @contextmanager
    def hooks(self, mllm: MLLM, run: PolicyRun) -> Iterator[None]:
        """As `ScorerPolicy.hooks`; with a guide, every prefill is answered by it first."""
        guide = _loaded(self.guide) if isinstance(self.guide, str) else self.guide
        with super().hooks(mllm, run), nullcontext() if guide is None else self._guided(mllm, guide, run):
            yield

    @contextmanager
    def _guided(self, mllm: MLLM, guide: MLLM, run: PolicyRun) -> Iterator[None]:
        """Within the block the guide answers before every prefill reaches the decoder."""
        encoder: Any = mllm.model.base_model
        encode = encoder.get_image_features
        pictures, types = dict[str, Tensor](), dict[str, Tensor]()

        def keep_pictures(*args: Any, **kwargs: Any) -> Any:
            pictures.clear()
            named = inspect.signature(encode).bind(*args, **kwargs).arguments
            given = {**named, **named.get("kwargs", {})}
            pictures.update({name: value for name, value in given.items() if isinstance(value, Tensor)})
            return encode(*args, **kwargs)

        def keep_types(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if module is mllm.model:
                types.clear()
                if "token_type_ids" in kwargs:  # Gemma 3 asks
                    types["token_type_ids"] = kwargs["token_type_ids"]

        def answer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if module is mllm.decoder and run.prefill is not None and run.prefill.layout.visual.any():
                with overhead():
                    received = self._guidance(guide, run.prefill, pictures, types)
                run.prefill.state[id(self), "seen"] = (0, received)

        with (
            override_method(encoder, "get_image_features", keep_pictures),
            mllm.model.register_forward_pre_hook(keep_types, with_kwargs=True),
            mllm.decoder.register_forward_pre_hook(answer, with_kwargs=True),
        ):
            yield

    def _guidance(self, guide: MLLM, prefill: Prefill, pictures: dict[str, Tensor], types: dict[str, Tensor]) -> Tensor:
        """[B, N] attention that every position of the prompts gets in the guide."""
        visual = prefill.layout.visual
        mask = (~prefill.layout.padding).long()
        prompts = guide.batch(input_ids=prefill.input_ids, attention_mask=mask, **pictures, **types)
        if not torch.equal(prompts.layout.visual.sum(1), visual.sum(1)) or not pictures:
            raise UnsupportedError(
                "SGL: the guide sees other visual tokens in these prompts, or the images did not come as pixels; it "
                "must share the model's image token and number of tokens an image"
            )
        answered = prompts
        if self.answer_tokens:
            answered = guide.append_answers(prompts, greedy_answer_ids(guide, prompts, self.answer_tokens))
        watch = _Received()
        with watch(guide, answered.layout):
            guide.model(**answered, use_cache=False)
        assert watch.received is not None
        received = torch.zeros(visual.shape, device=visual.device)
        received[visual] = watch.received[answered.layout.visual].to(received)
        return received


@dataclass
class _Received(AttentionPolicy):
    """Changes nothing; adds up what every position [B, N] gets, in all layers, from text after the image and answer."""

    received: Tensor | None = field(default=None, repr=False)

    def watched_layers(self, mllm: MLLM) -> Collection[int]:
        """All of them."""
        return range(mllm.num_layers)

    def see(self, layer: int, prefill: Prefill, attention: LayerAttention) -> None:
        """Add what this layer's rows give; the last token of an answer is no input of a decoding step."""
        roles = prefill.layout
        last = roles.answer & (roles.answer.flip(1).cumsum(1).flip(1) == 1)
        found = attention.unpacked(attention.received(roles.text_status_positions | roles.answer & ~last), prefill.kept)
        self.received = found if self.received is None else self.received + found

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Nothing leaves."""


@cache
def _loaded(name: str) -> MLLM:
    return load(name)
