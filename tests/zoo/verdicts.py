"""What dyvte does with every image-text-to-text architecture of transformers. `test_zoo.py` holds it to this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """Nothing in it: works.

    Attributes:
        refused: words of the one-line refusal of `dyvte.wrap`, by the nature of the architecture.
        fails: words of the error that a check raises, by its name (`checks.CHECKS`); "" where nothing is raised.
        changes: of the small configuration, for a variant; with `architecture`.
        architecture: of which a variant is one.
    """

    refused: str = ""
    fails: dict[str, str] = field(default_factory=dict)
    architecture: str = ""
    changes: dict[str, Any] = field(default_factory=dict)


NOT_EXAMINED = ("apertus1p5", "hy_v4_vl", "inkling2_loop")
"""Architectures that came with transformers 5.24."""
BROKEN = {"5.24.0": ("llama4",)}
"""Architectures whose own forward call raises in some version of transformers."""

WORKS = Verdict()
ENCODER_DECODER = Verdict(refused="encoder-decoder")
NO_IMAGE_TOKEN = Verdict(refused="input_ids have no position for them")
CROSS_ATTENTION = Verdict(refused="reads its encoder through cross-attention")
DRIVES = ("exits", "sweep", "mixed exits", "kept tokens", "generation", "lens", "knock-out")
"""Checks of what drives decoder layers."""
CONVOLVED_KEYS = Verdict(fails=dict.fromkeys(DRIVES, "it convolves the keys that it attends to"))
"""Only the probe works."""
CHOSEN_BLOCKS = Verdict(fails={"knock-out": "chooses its keys in blocks or pools"})
"""Works; but no single score can be cut."""

VERDICTS: dict[str, Verdict] = {
    "aria": WORKS,
    "aya_vision": WORKS,
    "blip": CROSS_ATTENTION,
    "blip-2": WORKS,
    "chameleon": WORKS,
    "cohere2_vision": WORKS,
    "cohere_compass": WORKS,
    "cosmos3_edge": WORKS,
    "cosmos3_omni": WORKS,
    "deepseek_ocr2": WORKS,
    "deepseek_vl": WORKS,
    "deepseek_vl_hybrid": WORKS,
    "diffusion_gemma": Verdict(refused="by diffusion"),
    "dots3_note": WORKS,
    "emu3": WORKS,
    "ernie4_5_vl_moe": WORKS,
    "evolla": CROSS_ATTENTION,
    "exaone4_5": WORKS,
    "fast_vlm": WORKS,
    "florence2": ENCODER_DECODER,
    "fuyu": WORKS,
    "gemma3": WORKS,
    "gemma3n": WORKS,
    "gemma4": WORKS,
    "gemma4_unified": WORKS,
    "git": NO_IMAGE_TOKEN,
    "glm46v": WORKS,
    "glm4v": WORKS,
    "glm4v_moe": WORKS,
    "glm5_next": CHOSEN_BLOCKS,
    "glm_ocr": WORKS,
    "glmga": WORKS,
    "got_ocr2": WORKS,
    "granite4_vision": WORKS,
    "granite_docling": WORKS,
    "hunyuan_vl": WORKS,
    "hyperclovax_vision_v2": WORKS,
    "idefics": CROSS_ATTENTION,
    "idefics2": WORKS,
    "idefics3": WORKS,
    "inkling2": CONVOLVED_KEYS,
    "inkling_mm_model": CONVOLVED_KEYS,
    "instructblip": WORKS,
    "instructblipvideo": WORKS,
    "internvl": WORKS,
    "janus": WORKS,
    "kimi_k25": WORKS,
    "kosmos-2": WORKS,
    "kosmos-2.5": WORKS,
    "lfm2_vl": WORKS,
    "lfm3_vl": WORKS,
    "lighton_ocr": WORKS,
    "llama4": WORKS,
    "llava": WORKS,
    "llava_next": WORKS,
    "llava_next_video": WORKS,
    "llava_onevision": WORKS,
    "minicpm_ocr": WORKS,
    "minicpmv4_6": WORKS,
    "minicpmv4_7": WORKS,
    "minimax_m3_vl": WORKS,
    "mistral3": WORKS,
    "mistral4": Verdict(refused="has no image side"),
    "mistral_large4": WORKS,
    "mllama": CROSS_ATTENTION,
    "molmo2": WORKS,
    "muse_glimmer": WORKS,
    "muse_spark": WORKS,
    "nemotron_h_omni": WORKS,
    "ovis2": WORKS,
    "paddleocr_vl": WORKS,
    "paligemma": WORKS,
    "perception_lm": WORKS,
    "pi0": Verdict(refused="actions of a robot by diffusion"),
    "pix2struct": ENCODER_DECODER,
    "pp_chart2table": WORKS,
    "pp_formulanet": ENCODER_DECODER,
    "qianfan_ocr": WORKS,
    "qwen2_5_omni_thinker": WORKS,
    "qwen2_5_vl": WORKS,
    "qwen2_vl": WORKS,
    "qwen3_5": WORKS,
    "qwen3_5_moe": WORKS,
    "qwen3_omni_moe_thinker": WORKS,
    "qwen3_vl": WORKS,
    "qwen3_vl_moe": WORKS,
    "qwen4_exp": CHOSEN_BLOCKS,
    "shieldgemma2": WORKS,
    "smolvlm": WORKS,
    "step3p7": WORKS,
    "t5gemma2": ENCODER_DECODER,
    "udop": ENCODER_DECODER,
    "unlimited_ocr": WORKS,
    "video_llama_3": WORKS,
    "video_llava": WORKS,
    "vipllava": WORKS,
    "vision-encoder-decoder": ENCODER_DECODER,
}


def _variant(
    architecture: str, *, refused: str = "", looked_at: str = "", like: Verdict = WORKS, **changes: Any
) -> Verdict:
    """A decoder like another one, or that `wrap` refuses, or that can only be looked at, with the reason's words."""
    fails = dict.fromkeys(DRIVES, looked_at) if looked_at else like.fails
    return Verdict(refused, fails, architecture, changes)


VARIANTS: dict[str, Verdict] = {
    "step3p7, unequal heads": _variant("step3p7", text_config={"num_sliding_attention_heads": 6}),
    "gemma4, shared keys (E2B, E4B)": _variant(
        "gemma4",
        text_config={"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma3n, keys of its own in every layer": _variant("gemma3n", text_config={"num_kv_shared_layers": 0}),
    "gemma4, values are keys (31B)": _variant(
        "gemma4", text_config={"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    ),
    "gemma4, mixture of experts (26B-A4B)": _variant("gemma4", text_config={"enable_moe_block": True}),
    "glm46v, mixture of experts (GLM-4.6V)": _variant(
        "glm46v",
        text_config={
            "model_type": "glm4v_moe_text",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "internvl, mixture of experts (InternVL3.5-30B-A3B)": _variant("internvl", text_config={"model_type": "qwen3_moe"}),
    "internvl, attention sinks (InternVL3.5-20B, GPT-OSS)": _variant(
        "internvl", text_config={"model_type": "gpt_oss", "sliding_window": 12}
    ),
    "llava, sliding windows (Mistral)": _variant("llava", text_config={"model_type": "mistral", "sliding_window": 12}),
    "llava, scaled rotary positions (YaRN)": _variant(
        "llava",
        text_config={
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "paligemma, soft caps (PaliGemma 2, Gemma 2)": _variant(
        "paligemma", text_config={"model_type": "gemma2", "sliding_window": 12, "query_pre_attn_scalar": 16}
    ),
    "granite4_vision, scaled residuals and logits": _variant(
        "granite4_vision",
        text_config={
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "blip-2, encoder-decoder inside (FLAN-T5)": _variant(
        "blip-2",
        refused="encoder-decoder",
        text_config={"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4},
    ),
    "lfm2_vl, convolutions with a bias": _variant(
        "lfm2_vl", looked_at="adds a bias at padding too", text_config={"conv_bias": True}
    ),
    "mistral_large4, keys that an earlier layer chose": _variant(
        "mistral_large4",
        looked_at="attends to keys that an earlier layer chose",
        text_config={"index_skip_topk_offset": 1, "index_topk_freq": 2},
    ),
    "minimax_m3_vl, sparse": _variant(
        "minimax_m3_vl",
        like=CHOSEN_BLOCKS,
        text_config={
            "layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 4,  # all blocks are chosen: `test_indexed_keys.py` makes it a real choice
        },
    ),
    "qwen4_exp, several indexed layers": _variant(
        "qwen4_exp",
        like=CHOSEN_BLOCKS,
        text_config={"layer_types": [*["indexed_attention"] * 2, "linear_attention", "indexed_attention"]},
    ),
    "glm5_next, several indexed layers": _variant(
        "glm5_next", like=CHOSEN_BLOCKS, text_config={"layer_types": ["indexed_attention", "linear_attention"] * 2}
    ),
    "llama4, scaled queries": _variant(
        "llama4", text_config={"no_rope_layers": [1, 0, 1, 0], "floor_scale": 64, "attn_scale": 0.7}
    ),
}
"""Of some architectures, decoders that their published checkpoints have and the small default does not."""
