"""The model families of `conf/model/`: their configs, full-size copies on the meta device, and small copies."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

import dyvte
import dyvte.conversion.downsample  # makes a model known to transformers
from dyvte import MLLM, Batch
from dyvte.runs.config import config_folder

SMALL_VOCABULARY = 256
"""Rows of the embedding of a small copy; its special tokens get the last ids."""

WORDS = 7
"""Text tokens before the image of the small copies' prompts, and as many after it."""


@dataclass(frozen=True)
class Architecture:
    """Published hyper-parameters of a model, from `conf/model/_architecture/`.

    Attributes:
        config: fields of its `config.json`.
        inputs: what it gets for one image, as `conf/model/_architecture/_base.yaml` says.
        visual_tokens: what these inputs become.
        tflops: published TFLOPs of a prefill with `text_tokens`, from and to; None where none are published.
    """

    name: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    num_layers: int
    visual_tokens: int
    tflops: tuple[float, float] | None
    text_tokens: int


def names() -> list[str]:
    """Models whose hyper-parameters are known."""
    folder = config_folder() / "model" / "_architecture"
    return sorted(file.stem for file in folder.glob("[!_]*.yaml"))


def architecture(name: str) -> Architecture:
    """The published hyper-parameters of a model in `conf/model/`."""
    folder = config_folder() / "model" / "_architecture"
    settings: dict[str, Any] = {}
    for file in ("_base", name):
        settings |= yaml.safe_load((folder / f"{file}.yaml").read_text())
    del settings["defaults"]
    return Architecture(name, **settings)


def build_config(settings: dict[str, Any]) -> Any:
    """A transformers config from the fields of its `config.json`."""
    settings = copy.deepcopy(settings)
    for key in ("text_config", "vision_config", "audio_config"):
        if isinstance(part := settings.get(key), dict):
            part_type = part.pop("model_type")
            settings[key] = CONFIG_MAPPING[part_type](**part)
    model_type = settings.pop("model_type")
    if model_type in ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"):  # these take their parts as dictionaries only
        settings |= {key: settings[key].to_dict() for key in ("text_config", "vision_config")}
    return CONFIG_MAPPING[model_type](**settings)


TIMM_TOWERS = ("timm_wrapper", "gemma3n_vision")
"""Model types of vision towers that the package timm provides."""


class TimmStandIn(nn.Module):
    """In place of a tower of timm, which needs not be installed: what it gives has the published shape."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, config.hidden_size, 1)

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Features [images, hidden size, 16, 16] of pixels [images, 3, height, width]."""
        small = nn.functional.adaptive_avg_pool2d(pixel_values, 16)
        return BaseModelOutputWithPooling(last_hidden_state=self.project(small))


@contextmanager
def without_timm() -> Iterator[None]:
    """Within the block models whose vision tower is of timm are built with a stand-in for it."""
    from_config = AutoModel.from_config

    def build(config: Any, **settings: Any) -> nn.Module:
        return TimmStandIn(config) if config.model_type in TIMM_TOWERS else from_config(config, **settings)

    with mock.patch.object(AutoModel, "from_config", build):
        yield


def full_size(known: Architecture) -> MLLM:
    """The model in full size on the meta device: it has shapes and no weights."""
    with torch.device("meta"), without_timm():
        return dyvte.wrap(AutoModelForImageTextToText.from_config(build_config(known.config), dtype=torch.bfloat16))


_SMALL_PARTS: dict[str, Any] = {
    "full_attn_idxs": [1, 3],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": SMALL_VOCABULARY,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "laurel_rank": 8,
}
"""Of a small copy's decoder, where it has them."""
_SMALL_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "depth": 4,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0, 2],
    "fullatt_block_indexes": [1, 3],
}
"""The same of its vision tower."""


def small_settings(known: Architecture) -> dict[str, Any]:
    """Its config with narrow and few layers; what an image becomes (patches, tiles, merging) stays as it is."""
    settings = copy.deepcopy(known.config)
    text, vision = settings["text_config"], settings["vision_config"]
    grouped = text["num_key_value_heads"] < text["num_attention_heads"]
    text |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6 if text.get("sliding_window") else 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if grouped else 4,
        "head_dim": 16,
        "vocab_size": SMALL_VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    text |= {name: value for name, value in _SMALL_PARTS.items() if text.get(name)}
    if text.get("num_kv_shared_layers"):  # the last ones, each after one of its kind
        text |= {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3}
    if "query_pre_attn_scalar" in text:
        text["query_pre_attn_scalar"] = 16
    rotary = text.get("rope_parameters", {})
    if "mrope_section" in rotary:
        half = int(16 * rotary.get("partial_rotary_factor", 1.0)) // 2
        side = half * 3 // 8
        rotary["mrope_section"] = [half - 2 * side, side, side]
    vision |= {name: value for name, value in _SMALL_VISION.items() if name in vision}
    if settings["model_type"] == "minicpmv4_6":
        settings["insert_layer_id"] = 1  # the layer of the tower behind which patches merge
    if "audio_config" in settings:
        settings["audio_config"] |= {"hidden_size": 32, "conf_num_hidden_layers": 1}
    if "projection_hidden_size" in settings:
        settings["projection_hidden_size"] = vision["hidden_size"]
    tokens = sorted((key for key in settings if key.endswith(("token_id", "token_index"))), key=settings.__getitem__)
    settings |= {key: SMALL_VOCABULARY - len(tokens) + number for number, key in enumerate(tokens)}
    return settings


def small_copy(known: Architecture, attn_implementation: str = "sdpa") -> MLLM:
    """A narrow and shallow random copy in float32 on the CPU, whose attention is far from uniform."""
    with torch.random.fork_rng(), without_timm():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(
            build_config(small_settings(known)), dtype=torch.float32, attn_implementation=attn_implementation
        )
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return dyvte.wrap(model)


def image_inputs(known: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of one random image."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Callable[[list[int]], Tensor]] = {
        "pixel_values": lambda shape: torch.randn(*shape, generator=generator),
        "pixel_attention_mask": lambda shape: torch.ones(*shape, dtype=torch.long),
        "image_position_ids": _grid,
    }
    return {name: made.get(name, torch.tensor)(value) for name, value in known.inputs.items()}


def _grid(size: list[int]) -> Tensor:
    """[1, rows * columns, 2] column and row of every patch."""
    rows, columns = size
    place = torch.arange(rows * columns)
    return torch.stack([place % columns, place // columns], dim=-1)[None]


@torch.no_grad()
def count_visual_tokens(mllm: MLLM, inputs: dict[str, Tensor]) -> int:
    """How many visual tokens the vision side makes of one image."""
    features = mllm.model.get_image_features(**inputs).pooler_output
    return sum(len(each) for each in features) if not isinstance(features, Tensor) else features.shape[:-1].numel()


def prompt(
    mllm: MLLM, known: Architecture, num_visual: int, before: int = WORDS, after: int = WORDS, seed: int = 0
) -> Batch:
    """Random text, an image, random text, as a batch of one."""
    text = torch.randint(3, 200, (before + after,), generator=torch.Generator().manual_seed(seed)).tolist()
    middle = [mllm.image_token_id] * num_visual
    ids = torch.tensor([[*text[:before], *middle, *text[before:]]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image_inputs(known, seed)}
    types = (ids == mllm.image_token_id).long()
    model_type = mllm.model.config.model_type
    if model_type == "gemma3":
        inputs["token_type_ids"] = types
    if "mm_token_type_ids" in inspect.signature(mllm.model.forward).parameters and "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = types.int()
    return mllm.batch(**inputs)
