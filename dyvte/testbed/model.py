"""The testbed's architecture: a small ``LlavaForConditionalGeneration`` and its sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dyvte.testbed.tokenizer import BOS, EOS, IMAGE, PAD, vocabulary
from dyvte.testbed.world import IMAGE_SIZE

QUERY_KEY_GAIN = 3.0
COPY_NOISE = 0.02


@dataclass(frozen=True)
class TestbedSizes:
    """Sizes of the small model. Widths must divide by their number of heads, the image by the patch size."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    patch_size: int = 8
    vision_layers: int = 3
    vision_width: int = 128
    vision_heads: int = 4
    layers: int = 12
    width: int = 160
    heads: int = 5
    mlp_width: int = 432
    max_positions: int = 1024

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image."""
        return (IMAGE_SIZE // self.patch_size) ** 2


def llava_config(text: LlamaConfig, vision: CLIPVisionConfig, image_token_id: int) -> LlavaConfig:
    """A LLaVA of this decoder and tower; the tower's last layer is used, its class token dropped."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def build_config(sizes: TestbedSizes) -> LlavaConfig:
    """LLaVA configuration of the testbed."""
    words = vocabulary()
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.max_positions,
        initializer_range=0.04,
        bos_token_id=words.index(BOS),
        eos_token_id=words.index(EOS),
        pad_token_id=words.index(PAD),
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=IMAGE_SIZE,
        patch_size=sizes.patch_size,
        projection_dim=sizes.vision_width,
    )
    return llava_config(text, vision, words.index(IMAGE))


@torch.no_grad()
def initialise_decoder(model: LlavaForConditionalGeneration) -> None:
    """Start the decoder's heads as copiers: what a head attends to, it hands on, and the read-out can say it.

    From a plain start, training stays for thousands of steps where answers name attributes that are in the image, of
    the wrong object. Value and output matrices whose product is near the identity (the "mimetic" start of Trockman and
    Kolter, ICML 2023), wider query and key matrices, and a read-out that begins as the word embeddings end that stay
    within a few hundred steps (docs/testbed.md).
    """
    decoder = model.model.language_model
    width = decoder.config.hidden_size
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.q_proj.weight.mul_(QUERY_KEY_GAIN)
        attention.k_proj.weight.mul_(QUERY_KEY_GAIN)
        rotation = torch.linalg.qr(torch.randn(width, width))[0]
        for projection, start in ((attention.v_proj, rotation), (attention.o_proj, rotation.T)):
            projection.weight.copy_(start + COPY_NOISE * torch.randn(width, width))
    model.lm_head.weight.copy_(decoder.embed_tokens.weight)


def build_model(sizes: TestbedSizes, seed: int) -> LlavaForConditionalGeneration:
    """A freshly initialised testbed in float32."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(sizes))
    initialise_decoder(model)
    model.generation_config.max_new_tokens = 64
    model.generation_config.do_sample = False
    return model
