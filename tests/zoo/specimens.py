"""Small random models of every image-text-to-text architecture, with inputs whose visual tokens are random features.

An architecture that takes `mm_encoder_outputs` gets its visual tokens through them, so no tower runs; what towers do is
tested with the real pixels of `families.py`. The few others get pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from benchmarks.architectures import without_timm
from dyvte.model_parts import VISUAL_MARKS, visual_token_ids_of

from .configs import PAD, small_config

NAMES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
"""Every image-text-to-text architecture of the installed transformers."""

FIRST_WORD, LAST_WORD = 3, 90
"""Ids of ordinary text."""

ONE_TENSOR = ("chameleon", "ovis2")
"""Architectures that take the visual tokens of all images as one tensor [n, d] as it is."""

ONE_BATCH = ("video_llava",)
"""Architectures that take the visual tokens as one tensor [images, n, d], the same number n of each."""

PREFIX = ("paligemma",)
"""Architectures whose token types tell the prompt (0) from the answer (1), not the image from text."""

ROW_ENDS = ("hunyuan_vl",)
"""Architectures that put a visual token behind each row of an image."""

VISION_START = 123
"""Stands before the image: some architectures look for it."""

MERGE = 2
"""Patches a side that become one visual token, in all small configurations that merge patches."""


class Features(tuple[Tensor, ...]):
    """Visual tokens image by image: some architectures put them together themselves, others ask for one tensor."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cat(self), name)


@dataclass(frozen=True)
class Row:
    """One prompt: text, one image, text.

    Attributes:
        before, after: ids of the text.
        grid: rows and columns of visual tokens.
        seed: of the visual tokens.
    """

    before: list[int]
    grid: tuple[int, int]
    after: list[int]
    seed: int


ALONE = ("hunyuan_vl", "kosmos-2", "kosmos-2.5")
"""Architectures in which, in the model itself, a row of a batch is not the row alone: HunYuan counts the images of the
whole batch, Kosmos counts padding as positions when it generates."""


def rows_for(model_type: str) -> list[Row]:
    """The prompts on which an architecture is examined: two, or one where the model cannot tell rows apart."""
    return random_rows(1 if model_type in ALONE else 2)


def random_rows(count: int, seed: int = 0) -> list[Row]:
    """Prompts of different lengths with images of different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> list[int]:
        return torch.randint(FIRST_WORD, LAST_WORD, (length,), generator=generator).tolist()

    return [
        Row([*words(3), VISION_START], (2, 2 + index % 2), words(5 + 2 * index), seed + index) for index in range(count)
    ]


def build_model(name: str, attn_implementation: str | None = None, **changes: Any) -> nn.Module:
    """A small random model of an architecture, in float32, whose attention is far from uniform."""
    config = small_config(name, **changes)
    cls = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])
    with torch.random.fork_rng(), without_timm():
        torch.manual_seed(0)
        model = cls._from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


WITHOUT_TOKEN = 100
"""Stands where the features go in models that have no image token."""

FRAMES = 4
"""Of a video, as InstructBLIP-Video takes it."""

QUERYING = {"blip-2": 1, "instructblip": 1, "instructblipvideo": FRAMES}
"""Architectures whose querying transformer makes a fixed number of tokens from pixels: images of a prompt."""


def pixel_inputs(model: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Random pixels, and what the querying transformer reads beside them."""
    count = QUERYING[model.config.model_type]
    pixels = torch.stack(
        [torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(row.seed)) for row in rows]
    )
    inputs = {"pixel_values": pixels if count > 1 else pixels[:, 0]}
    if "qformer_input_ids" in inspect.signature(model.forward).parameters:
        ids = torch.full((len(rows), 2), FIRST_WORD)
        inputs |= {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
    return inputs


def visual_tokens(model: Any, row: Row) -> int:
    """How many visual tokens the image of a prompt has."""
    config = model.config
    if config.model_type in QUERYING:
        return config.num_query_tokens * QUERYING[config.model_type]
    if hasattr(config, "latent_query_num"):
        return config.latent_query_num
    height, width = row.grid
    return height * (width + (model.config.model_type in ROW_ENDS))


def make_inputs(model: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Inputs of some prompts as one batch, padded on the left."""
    names = set(inspect.signature(model.forward).parameters)
    image_token = next(iter(visual_token_ids_of(model, None)), WITHOUT_TOKEN)
    lines = [[*row.before, *[image_token] * visual_tokens(model, row), *row.after] for row in rows]
    length = max(map(len, lines))
    ids = torch.tensor([[PAD] * (length - len(line)) + line for line in lines])
    mask = torch.tensor([[0] * (length - len(line)) + [1] * len(line) for line in lines])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in names:
            inputs[name] = torch.zeros_like(ids) if model.config.model_type in PREFIX else (ids == image_token).int()
    if "image_grid_thw" in names:
        inputs["image_grid_thw"] = torch.tensor([[1, row.grid[0] * MERGE, row.grid[1] * MERGE] for row in rows])
    if model.config.model_type in QUERYING:
        return inputs | pixel_inputs(model, rows)
    if image_token == WITHOUT_TOKEN:
        features = torch.stack(list(encoder_output(model, rows).pooler_output))
        return inputs | {VISUAL_MARKS: (ids == image_token).long(), "image_embeds": features}
    inputs["mm_encoder_outputs"] = {"image": encoder_output(model, rows)}
    return inputs


def encoder_output(model: Any, rows: Sequence[Row]) -> ModelOutput:
    """What the vision side gives: random features [n, d] of every image, and those of DeepStack."""
    width = model.config.get_text_config(decoder=True).hidden_size

    def features(number: int) -> Features:
        return Features(
            torch.randn(
                visual_tokens(model, row), width, generator=torch.Generator().manual_seed(1000 * number + row.seed)
            )
            for row in rows
        )

    found = features(0)
    deepstack: list[Any] = [features(1), features(2)]
    if model.config.model_type == "granite4_vision":  # says which layer each is for
        deepstack = list(enumerate(deepstack))
    tokens: Any = found
    if model.config.model_type in (*ONE_TENSOR, *ONE_BATCH):
        tokens = torch.cat(found)
    return ModelOutput(
        pooler_output=tokens[None] if model.config.model_type in ONE_BATCH else tokens,
        last_hidden_state=found,
        deepstack_features=deepstack,
        visual_indicator_features=None,
        router_logits=None,
    )
