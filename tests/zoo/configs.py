"""Small configurations of every image-text-to-text architecture of transformers, made from the defaults of its classes.

A configuration class is built with the fields of `TEXT` or `VISION` that it has, and so are the configurations inside
it; what is peculiar to a family is in `CHANGES`. So a new architecture needs an entry only where it is peculiar.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 128
IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN = 120, 121, 122
WIDTH, HEADS, HEAD_SIZE, LAYERS = 64, 4, 16, 4

SHARED: dict[str, Any] = {
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "vocab_size": VOCABULARY,
}

MIXTURE_OF_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "share_expert_dim": 32,
    "moe_hidden_size": 32,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

LATENT_ATTENTION: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

RECURRENT: dict[str, Any] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
}

TEXT: dict[str, Any] = {
    **SHARED,
    **MIXTURE_OF_EXPERTS,
    **LATENT_ATTENTION,
    **RECURRENT,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": 512,
}
"""Fields of a text decoder."""

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 8,
    "patch_size": 2,
    "out_hidden_size": WIDTH,
    "projection_dim": 32,
}
"""Fields of a vision tower; also of audio towers, perceivers and the like."""

TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "image_token_index": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "video_token_index": VIDEO_TOKEN,
    "audio_token_id": AUDIO_TOKEN,
    "audio_token_index": AUDIO_TOKEN,
    "vision_start_token_id": 123,
    "vision_end_token_id": 124,
    "boi_token_id": 123,
    "eoi_token_id": 124,
}

M_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
"""Rotary positions in three dimensions: sections of half a head."""

CHANGES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": IMAGE_TOKEN, "IMGIMGBS": 100}},
    "chameleon_vqgan": {
        "embed_dim": 4,
        "num_embeddings": 16,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": (1, 1),
        "resolution": 8,
    },
    "emu3": {"vocabulary_map": {"<image>": IMAGE_TOKEN, "<|extra_200|>": 99, "<|visual token 000000|>": 100}},
    "emu3_vqgan": {"codebook_size": 16, "base_channels": 32, "channel_multiplier": (1, 1), "attn_resolutions": ()},
    "janus_vqgan": {
        "embed_dim": 4,
        "num_embeddings": 16,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": (1, 1),
        "image_token_embed_dim": 32,
        "projection_dim": 64,
    },
    "janus_vision_model": {"num_image_tokens": 4, "projection_dim": WIDTH},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 12,
        "rope_parameters": {"sliding_attention": M_ROPE, "full_attention": M_ROPE},
    },
    "cosmos3_edge_text": {"rope_parameters": M_ROPE},
    "cosmos3_edge": {"projector_hidden_size": 64},
    "deepseek_ocr2_sam_vision_model": {
        "output_channels": 16,
        "downsample_channels": [32, 32],
        "mlp_dim": 32,
        "global_attn_indexes": (1,),
    },
    "unlimited_ocr_sam_vision_model": {
        "output_channels": 16,
        "downsample_channels": (32, 32),
        "mlp_dim": 32,
        "global_attn_indexes": (1,),
    },
    "unlimited_ocr_text": {"sliding_window": 12, "num_key_value_heads": HEADS},
    "sam_vision_model": {"output_channels": 16, "mlp_dim": 32},
    "pp_formulanet_vision": {
        "output_channels": 16,
        "mlp_dim": 32,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 64,
        "decoder_hidden_size": 64,
    },
    "pp_formulanet_text": {"decoder_ffn_dim": 64, "decoder_layers": 4, "decoder_attention_heads": 4, "d_model": 64},
    "dots3_note_text": {
        "num_key_value_heads": HEADS,
        "head_dim": 16,
        "sliding_window": 12,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 16,  # with few, many keys score 0 alike
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense"] * 2,
        "per_layer_config": {},
        "adapter_in_dim": 32,
        "adapter_out_dim": WIDTH,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": WIDTH, "downsample_hidden_size": 8},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 16],
        "rope_parameters": {**M_ROPE, "mrope_section": [3, 3, 2]},
    },
    "florence_vision": {
        "patch_size": (7, 3, 3, 3),
        "depths": (1, 1, 1, 1),
        "embed_dim": (8, 8, 8, 16),
        "num_heads": (2, 2, 2, 2),
        "num_groups": (2, 2, 2, 2),
        "projection_dim": WIDTH,
    },
    "glm5_next_text": {
        "num_key_value_heads": HEADS,
        "qk_rope_head_dim": 0,
        "qk_nope_head_dim": 16,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "index_head_dim": 16,
        "index_n_heads": 16,
        "index_topk": 8,
        "index_kpool": 2,
        "hc_mult": 2,
    },
    "gemma4_text": {
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "sliding_window": 12,
    },
    "gemma4_unified_text": {"global_head_dim": 32, "sliding_window": 12},
    "diffusion_gemma_text": {"global_head_dim": 32, "sliding_window": 12},
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCABULARY - 8,
        "hidden_size_per_layer_input": 8,
        "sliding_window": 12,
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * LAYERS,
        "activation_sparsity_pattern": None,
    },
    "lfm2": {"full_attn_idxs": [1, 3]},
    "gemma3_text": {"sliding_window": 12},
    "bart": {
        "d_model": 64,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
    "pix2struct_text_model": {"d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4},
    "pix2struct_vision_model": {"seq_len": 64, "d_ff": 64, "d_kv": 16},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "2/4",
        "image_grid_pinpoints": [[8, 8]],
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl_vision": {"max_image_size": 32, "max_vit_seq_len": 64, "text_hidden_size": WIDTH},
    "inkling2_vision": {"text_hidden_size": WIDTH, "projection_hidden_dim": 32},
    "inkling2_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": HEAD_SIZE,
        "sliding_window_size": 12,
        "unpadded_vocab_size": VOCABULARY,
    },
    "inkling_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": HEAD_SIZE,
        "sliding_window_size": 12,
    },
    "inkling_vision": {"text_hidden_size": WIDTH},
    "inkling_audio": {"text_hidden_size": WIDTH, "n_mel_bins": 4, "mel_vocab_size": 4},
    "blip-2": {"num_query_tokens": 4},
    "instructblip": {"num_query_tokens": 4},
    "instructblipvideo": {"num_query_tokens": 4},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "kosmos_2_text_model": {
        "embed_dim": WIDTH,
        "layers": LAYERS,
        "ffn_dim": 96,
        "attention_heads": HEADS,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "kosmos_2_5_text_model": {
        "embed_dim": WIDTH,
        "layers": LAYERS,
        "ffn_dim": 96,
        "attention_heads": HEADS,
        "dropout": 0.0,
    },
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 32, "max_num_patches": 16},
    "llama4_vision_model": {"vision_output_dim": WIDTH, "projector_input_dim": 32, "projector_output_dim": WIDTH},
    "minimax_m3_vl": {"projector_hidden_size": 32},
    "molmo2_vision": {"num_position_embeddings": 16, "image_size": [8, 8]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0], "text_hidden_size": WIDTH},
    "molmo2": {"image_patch_id": IMAGE_TOKEN, "image_start_token_id": 123, "image_end_token_id": 124},
    "muse_glimmer": {"out_hidden_size": 32 * 4, "projector_hidden_size": 32},
    "muse_spark": {"out_hidden_size": 32 * 4, "projector_hidden_size": 32},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": (8, 8, 8, 8), "depths": (1, 1, 1, 1)},
    "radio": {"max_img_size": 8},
    "nemotron_h": {
        "moe_shared_expert_intermediate_size": 32,
        "time_step_min": 1e-9,  # clamps time steps in a prefill, but not in the model's own decoding step by step
        "layers_block_type": ["mamba", "attention", "moe", "mamba", "attention", "mlp"],
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "n_group": 1, "topk_group": 1},
    "qwen2_5_omni_audio_encoder": {
        "encoder_layers": 1,
        "encoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "output_dim": WIDTH,
    },
    "nemotron_h_omni": {
        "vision_hidden_size": 32,
        "projector_hidden_size": 32,
        "image_token_id": IMAGE_TOKEN,
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "udop": {"d_ff": 64, "d_kv": 16, "num_layers": 2, "d_model": 64},
    "qwen3_omni_moe_audio_encoder": {
        "downsample_hidden_size": 8,
        "output_dim": WIDTH,
        "encoder_layers": 1,
        "encoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
    },
    **{
        f"{name}_text": {"rope_parameters": M_ROPE}
        for name in (
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen3_vl",
            "qwen3_vl_moe",
            "qwen2_5_omni",
            "qwen3_omni_moe",
            "glm4v",
            "glm_ocr",
            "paddleocr_vl",
            "hunyuan_vl",
        )
    },
    "glm4v_moe_text": {"rope_parameters": {**M_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "paddleocr_vl_text": {"rope_parameters": M_ROPE},
    "mistral_large4_text": {
        "head_dim": 8,
        "num_key_value_heads": HEADS,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 16,
    },
    "deepseek_v3": {"head_dim": 8, "num_key_value_heads": HEADS},
    "timm_wrapper": {"hidden_size": 32, "model_args": {"embed_dim": 32}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 123},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 123},
    "step3p5": {"sliding_window": 12},
}
"""Of some model types (whole models or parts): fields that their sizes do not follow from."""


def small_config(model_type: str, **changes: Any) -> Any:
    """The small configuration of an architecture; `changes` are of its fields or, as a dictionary, of a part's.

    A part may also get another `model_type` than the default one.
    """
    return _small(CONFIG_MAPPING[model_type], "model", changes)


def _small(cls: Any, role: str, changes: dict[str, Any] | None = None) -> Any:
    default, known = cls(), {each.name for each in dataclasses.fields(cls)}
    changes = dict(changes or {})
    fields = {"model": {**TEXT, **TOKENS}, "text": TEXT, "vision": VISION}[role]
    settings = {name: value for name, value in fields.items() if name in known}
    peculiar = dict(CHANGES.get(cls.model_type, {}))
    for name in cls.sub_configs or {}:
        part = getattr(default, name, None)
        change = changes.pop(name, peculiar.pop(name, {}))
        if not isinstance(change, dict):
            settings[name] = change
        elif part is not None:
            kind = "text" if name.startswith(("text", "decoder", "encoder")) else "vision"
            model_type = change.get("model_type")
            own = {key: value for key, value in change.items() if key != "model_type"}
            settings[name] = _small(CONFIG_MAPPING[model_type] if model_type else type(part), kind, own)
    return cls(**settings | peculiar | changes)
