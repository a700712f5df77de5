"""Peculiar decoders, and what dyvte says to each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

import dyvte
import dyvte.conversion.downsample  # makes a model known to transformers
from benchmarks.architectures import SMALL_VOCABULARY, _without, build_config
from dyvte.errors import DyvteError
from dyvte.instrument.hooks import check_model

# ------------------------------------------------------------------------ refusals


def peculiar() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Families whose decoders need a decision: name, what is peculiar, a small config."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": SMALL_VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    siglip = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 2,
        "vision_use_head": False,
    }
    yield (
        "paligemma",
        "prefix-LM: the whole prompt sees itself in both directions",
        {
            "model_type": "paligemma",
            "text_config": {"model_type": "gemma", **text},
            "vision_config": {**siglip, "projection_dim": 64},
            "image_token_index": 250,
            "projection_dim": 64,
        },
    )
    yield (
        "mllama",
        "the decoder reads the image through cross-attention layers",
        {
            "model_type": "mllama",
            "text_config": {
                "model_type": "mllama_text_model",
                **_without(text, "head_dim"),
                "cross_attention_layers": [1, 3],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                "model_type": "mllama_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 8,
                "patch_size": 2,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
            },
            "image_token_index": 250,
        },
    )
    yield (
        "qwen3_5",
        "linear-attention layers between full ones",
        {
            "model_type": "qwen3_5",
            "text_config": {
                "model_type": "qwen3_5_text",
                **text,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
            },
            "vision_config": {"model_type": "qwen3_5_vision", "depth": 2, "hidden_size": 32, "num_heads": 2},
            "image_token_id": 250,
            "video_token_id": 251,
            "vision_start_token_id": 252,
            "vision_end_token_id": 253,
        },
    )
    yield (
        "lfm2_vl",
        "convolution layers between attention layers",
        {
            "model_type": "lfm2_vl",
            "text_config": {"model_type": "lfm2", **_without(text, "head_dim"), "full_attn_idxs": [1, 3]},
            "vision_config": {**_without(siglip, "image_size"), "model_type": "siglip2_vision_model"},
            "image_token_id": 250,
        },
    )
    yield (
        "gemma4 (E2B, E4B)",
        "the last layers reuse the keys of earlier ones",
        {
            "model_type": "gemma4",
            "text_config": {
                "model_type": "gemma4_text",
                **text,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "vocab_size_per_layer_input": SMALL_VOCABULARY,
                "hidden_size_per_layer_input": 16,
            },
            "vision_config": {"model_type": "gemma4_vision", "hidden_size": 32, "num_hidden_layers": 2},
            "image_token_id": 250,
        },
    )


def verdict(settings: dict[str, Any]) -> str:
    """`works` for a family that can be driven, else the reason why it is refused."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(build_config(settings))
    try:
        check_model(dyvte.wrap(model))
    except DyvteError as refusal:
        return str(refusal)
    return "works"
