"""The transformers model that a LLaVA checkpoint becomes, and which source tensor each of its tensors is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, LlavaConfig

from dyvte.conversion.downsample import LlavaDownsampleConfig
from dyvte.conversion.source import EXPORT_HINT, Source, tower_image_size
from dyvte.conversion.weights import Entry, StoredTensor
from dyvte.errors import ModelError


def target_config(source: Source, image_token_id: int, vocabulary: int) -> LlavaConfig:
    """Config of the transformers model; the vocabulary counts rows of the embedding, image placeholder included."""
    text = source.text_config
    text.vocab_size = vocabulary
    vision = tower_config(source)
    has_class_token = vision.model_type != "siglip_vision_model"
    keep = source.keeps_class_token or not has_class_token
    config_class = LlavaDownsampleConfig if source.projector_type == "mlp_downsample" else LlavaConfig
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_id,
        image_seq_length=num_visual_tokens(source, vision),
        # A single linear layer is the two-layer projector with no activation and the identity as its second layer.
        projector_hidden_act="linear" if source.projector_type == "linear" else "gelu",
        vision_feature_layer=int(source.config.get("mm_vision_select_layer", -2)),
        vision_feature_select_strategy="full" if keep else "default",
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    dtypes = [each.dtype for each in source.text.values()]
    config.dtype = max(set(dtypes), key=dtypes.count)
    return config


def tower_config(source: Source) -> Any:
    """Config of the vision tower, as transformers knows it."""
    given = source.tower_config
    model_type = str(given.get("model_type", ""))
    if model_type in ("intern_vit_6b", "intern_vit"):
        if abs(given.get("layer_norm_eps", 1e-6) - 1e-6) > 1e-12 and given.get("qk_normalization", True):
            raise ModelError(f"{source.tower_folder}: layer_norm_eps of InternViT must be 1e-6 to be converted")
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
        return CONFIG_MAPPING["internvl_vision"](
            **{name: given[name] for name in sizes},
            attention_bias=given.get("qkv_bias", False),
            use_qk_norm=given.get("qk_normalization", True),
            hidden_act=given.get("hidden_act", "gelu"),
            norm_type=given.get("norm_type", "rms_norm"),
            layer_norm_eps=given.get("layer_norm_eps", 1e-6),
            image_size=tower_image_size(source, given["patch_size"]),
        )
    known = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
    model_type = known.get(model_type, model_type)
    if model_type not in known.values():
        raise ModelError(
            f"{source.tower_folder}: vision tower of type {model_type!r} is none of CLIP, SigLIP, InternViT; "
            f"{EXPORT_HINT}"
        )
    fields = set(CONFIG_MAPPING[model_type]().to_dict()) - {"model_type", "architectures", "transformers_version"}
    settings = {key: value for key, value in given.items() if key in fields}
    if model_type == "siglip_vision_model":
        settings["vision_use_head"] = False  # LLaVA reads hidden states; the pooling head would only cost time
    config = CONFIG_MAPPING[model_type](**settings)
    config.image_size = tower_image_size(source, config.patch_size)
    return config


def num_visual_tokens(source: Source, vision: Any) -> int:
    """Visual tokens of one image."""
    side = side_of(vision.image_size) // side_of(vision.patch_size)
    if source.projector_type == "mlp_downsample":
        return ((side + 1) // 2) ** 2
    has_class_token = vision.model_type != "siglip_vision_model"
    return side**2 + (source.keeps_class_token and has_class_token)


def side_of(size: Any) -> int:
    """The side of a square that a config gives as a number or as height and width."""
    return size[0] if isinstance(size, (tuple, list)) else size


def plan(source: Source, config: LlavaConfig, dtype: torch.dtype | None) -> list[Entry]:
    """Every tensor of the target, in an order that opens each source file once.

    A floating-point type converts those of another; source tensors must be there, of the sizes that the configs say.
    """
    with torch.device("meta"):
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in AutoModelForImageTextToText.from_config(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    # Towers come with poolers, heads and buffers that LLaVA does not use.
    made = {each.name: each for each in _all(source, config) if each.name in expected}
    missing = sorted(set(expected) - set(made))
    if missing:
        raise ModelError(f"{source.folder}: {len(missing)} tensors are not in the checkpoint, the first: {missing[0]}")
    for name, entry in made.items():
        origin = entry.origin
        if entry.shape != expected[name]:
            raise ModelError(
                f"{origin.file.path}: {origin.name} has shape {origin.shape}; the configs ask for {expected[name]} "
                f"({name})"
            )
        if dtype is not None and entry.dtype.is_floating_point:
            made[name] = replace(entry, dtype=dtype)

    def place(entry: Entry) -> tuple[str, ...]:
        file = entry.origin.file.path
        return file.name, str(file), entry.origin.name, entry.name

    return sorted(made.values(), key=place)


def _all(source: Source, config: LlavaConfig) -> Iterator[Entry]:
    for name, origin in source.text.items():
        target = name if name.startswith("lm_head.") else name.replace("model.", "model.language_model.", 1)
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            rows = config.text_config.vocab_size
            yield Entry(target, (rows, *origin.shape[1:]), origin.dtype, origin, partial(_with_mean_rows, rows))
        else:
            yield _as_is(target, origin)
    if config.vision_config.model_type == "internvl_vision":
        yield from _intern_vit(source.tower)
    else:
        for name, origin in source.tower.items():
            yield _as_is(f"model.vision_tower.{name}", origin)
    yield from _projector(source)


def _as_is(target: str, origin: StoredTensor) -> Entry:
    return Entry(target, origin.shape, origin.dtype, origin)


def _with_mean_rows(rows: int, weight: Tensor) -> Tensor:
    """New rows are the mean of the old ones: the logit of a placeholder is a mean of logits, never the largest."""
    if rows <= len(weight):
        return weight
    mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


_INTERN_VIT = (
    (r"embeddings\.class_embedding", "embeddings.cls_token"),
    (r"embeddings\.position_embedding", "embeddings.position_embeddings"),
    (r"embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"encoder\.layers\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.projection_layer."),
    (r"encoder\.layers\.(\d+)\.attn\.([qk])_norm\.", r"encoder.layer.\1.attention.\2_norm."),
    (r"encoder\.layers\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"encoder\.layers\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"encoder\.layers\.(\d+)\.ls([12])$", r"encoder.layer.\1.lambda_\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.", r"encoder.layer.\1.mlp."),
)


def _intern_vit(tower: dict[str, StoredTensor]) -> Iterator[Entry]:
    for name, origin in tower.items():
        joint = re.fullmatch(r"encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if joint:
            shape = (origin.shape[0] // 3, *origin.shape[1:])
            for part, letter in enumerate("qkv"):
                target = f"model.vision_tower.encoder.layer.{joint[1]}.attention.{letter}_proj.{joint[2]}"
                yield Entry(target, shape, origin.dtype, origin, partial(_third, part))
            continue
        for pattern, replacement in _INTERN_VIT:
            if re.match(pattern, name):
                yield _as_is("model.vision_tower." + re.sub(pattern, replacement, name, count=1), origin)
                break


def _third(part: int, joint: Tensor) -> Tensor:
    return joint.chunk(3)[part]


_PROJECTOR_LAYERS = {
    "mlp2x_gelu": {"0": "linear_1", "2": "linear_2"},
    "mlp_downsample": {"1": "layer_norm", "2": "linear_1", "4": "linear_2"},
}


def _projector(source: Source) -> Iterator[Entry]:
    prefix = "model.multi_modal_projector."
    if source.projector_type != "linear":
        layers = _PROJECTOR_LAYERS[source.projector_type]
        for name, origin in source.projector.items():
            number, _, kind = name.partition(".")
            if number in layers:
                yield _as_is(f"{prefix}{layers[number]}.{kind}", origin)
        return
    for name, origin in source.projector.items():
        kind = name.removeprefix("0.")
        size = origin.shape[0]
        yield _as_is(f"{prefix}linear_1.{kind}", origin)
        make = torch.zeros_like if kind == "bias" else lambda weight: torch.eye(len(weight))
        yield Entry(f"{prefix}linear_2.{kind}", (size,) * len(origin.shape), origin.dtype, origin, make)
