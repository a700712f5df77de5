"""Small random models of many families, and random token-level inputs for them.

The models are built from configs, so no weights, processors or network are needed. Weights are drawn large enough that
attention is far from uniform and answers depend on the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dyvte.batch import Batch
from dyvte.layout import TokenLayout
from dyvte.loading import wrap
from dyvte.mllm import MLLM

PAD, BOS, EOS = 0, 1, 2
FIRST_TEXT, LAST_TEXT = 3, 99
VOCABULARY = 128
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 120, 121, 122, 123
IMAGE_SIZE, PATCH_SIZE = 8, 2

HIDDEN, HEAD_DIM = 64, 16
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def _text_config(model_type: str, num_layers: int, **changes: Any) -> Any:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        **IDS,
        **changes,
    }
    return CONFIG_MAPPING[model_type](**settings)


def _vision_config(model_type: str, **changes: Any) -> Any:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        **changes,
    }
    return CONFIG_MAPPING[model_type](**settings)


def _qwen_vision(model_type: str, **changes: Any) -> Any:
    return CONFIG_MAPPING[model_type](
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=PATCH_SIZE,
        spatial_merge_size=2,
        temporal_patch_size=1,
        out_hidden_size=HIDDEN,
        **changes,
    )


def _llava(num_layers: int) -> Any:
    return CONFIG_MAPPING["llava"](
        text_config=_text_config("llama", num_layers, num_key_value_heads=4),
        vision_config=_vision_config("clip_vision_model"),
        image_token_index=IMAGE_TOKEN,
    )


def _llava_next(num_layers: int) -> Any:
    return CONFIG_MAPPING["llava_next"](
        text_config=_text_config("mistral", num_layers, sliding_window=None),
        vision_config=_vision_config("clip_vision_model", image_size=4),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[4, 8], [8, 4], [8, 8]],
    )


def _llava_onevision(num_layers: int) -> Any:
    return CONFIG_MAPPING["llava_onevision"](
        text_config=_text_config("qwen2", num_layers),
        vision_config=_vision_config("siglip_vision_model", image_size=4, vision_use_head=False),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[4, 8], [8, 4], [8, 8]],
    )


def _qwen2_5_vl(num_layers: int) -> Any:
    return CONFIG_MAPPING["qwen2_5_vl"](
        text_config=_text_config(
            "qwen2_5_vl_text", num_layers, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}
        ).to_dict(),
        vision_config=_qwen_vision("qwen2_5_vl_vision", fullatt_block_indexes=[1], window_size=8).to_dict(),
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def _qwen3_vl(num_layers: int) -> Any:
    return CONFIG_MAPPING["qwen3_vl"](
        text_config=_text_config(
            "qwen3_vl_text",
            num_layers,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
        ).to_dict(),
        vision_config=_qwen_vision(
            "qwen3_vl_vision", deepstack_visual_indexes=[0, 1], num_position_embeddings=16
        ).to_dict(),
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def _internvl(num_layers: int) -> Any:
    return CONFIG_MAPPING["internvl"](
        text_config=_text_config("qwen2", num_layers),
        vision_config=_vision_config("internvl_vision"),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
    )


def _gemma3(num_layers: int) -> Any:
    """Alternates sliding-window and full layers; image tokens of one image see each other in both directions."""
    return CONFIG_MAPPING["gemma3"](
        text_config=_text_config(
            "gemma3_text",
            num_layers,
            sliding_window=12,
            layer_types=[("sliding_attention", "full_attention")[index % 2] for index in range(num_layers)],
            query_pre_attn_scalar=HEAD_DIM,
        ),
        vision_config=_vision_config("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )


def _mistral3(num_layers: int) -> Any:
    return CONFIG_MAPPING["mistral3"](
        text_config=_text_config("mistral", num_layers, sliding_window=None),
        vision_config=_vision_config("pixtral"),
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _idefics3(num_layers: int) -> Any:
    return CONFIG_MAPPING["idefics3"](
        text_config=_text_config("llama", num_layers),
        vision_config=_vision_config("idefics3_vision"),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        tie_word_embeddings=True,
    )


_CONFIGS: dict[str, Callable[[int], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "idefics3": _idefics3,
}


def build(family: str, seed: int = 0, num_layers: int = 4, attn_implementation: str = "sdpa") -> MLLM:
    """A small random model of a family, in float32 on the CPU, the same for the same arguments."""
    config = _CONFIGS[family](num_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(
            config, attn_implementation=attn_implementation, dtype=torch.float32
        )
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return wrap(model)


def _builder(family: str) -> Callable[..., MLLM]:
    def make(seed: int = 0, **kwargs: Any) -> MLLM:
        return build(family, seed, **kwargs)

    return make


FAMILIES: dict[str, Callable[..., MLLM]] = {family: _builder(family) for family in _CONFIGS}


# ------------------------------------------------------------------------ inputs


def _pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _one_image(mllm: MLLM, generator: torch.Generator) -> dict[str, Tensor]:
    """Model inputs of one image, with its first dimension the one to concatenate over images."""
    family = mllm.model.config.model_type
    if family in ("llava_next", "llava_onevision"):
        sizes = [(8, 8), (8, 4), (4, 8), (7, 5)]
        height, width = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        # one base view and the tiles of the smallest grid that holds the image, padded to five views
        return {
            "pixel_values": _pixels(generator, 1, 5, 3, 4, 4),
            "image_sizes": torch.tensor([[height, width]]),
        }
    if family.startswith("qwen"):
        grid = torch.tensor([[1, 4, int(torch.randint(1, 4, (), generator=generator)) * 2]])
        return {
            "pixel_values": _pixels(generator, int(grid.prod()), 3 * PATCH_SIZE**2),
            "image_grid_thw": grid,
        }
    inputs = {"pixel_values": _pixels(generator, 1, 3, IMAGE_SIZE, IMAGE_SIZE)}
    if family == "mistral3":
        inputs["image_sizes"] = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]])
    return inputs


@torch.no_grad()
def _num_visual_tokens(mllm: MLLM, image: dict[str, Tensor]) -> int:
    if mllm.model.config.model_type in ("idefics3", "smolvlm"):
        image = {"pixel_values": image["pixel_values"][None]}
    features = mllm.model.get_image_features(**image).pooler_output
    return features[0].shape[0]


def random_batch(
    mllm: MLLM,
    generator: torch.Generator,
    num_images: Sequence[int] = (1, 1),
    padding_side: str = "left",
    system_length: int | Sequence[int] = 3,
    question_length: int | Sequence[int] | None = None,
) -> Batch:
    """Random ids and images for a model from `FAMILIES`.

    Args:
        mllm: the model.
        generator: source of all randomness.
        num_images: images in every row; 0 makes a text-only row.
        padding_side: "left" or "right".
        system_length: text tokens before the first image, one number or one a row.
        question_length: text tokens after the last image; by default drawn from 4 to 9, differently for every row.
    """
    rows: list[list[int]] = []
    images: list[list[dict[str, Tensor]]] = []
    for row, count in enumerate(num_images):
        system = system_length if isinstance(system_length, int) else system_length[row]
        if question_length is None:
            question = int(torch.randint(4, 10, (), generator=generator))
        else:
            question = question_length if isinstance(question_length, int) else question_length[row]
        ids = _random_text(generator, system)
        of_row = [_one_image(mllm, generator) for _ in range(count)]
        for index, image in enumerate(of_row):
            if index:
                ids += _random_text(generator, 2)
            ids += [VISION_START, *[IMAGE_TOKEN] * _num_visual_tokens(mllm, image), VISION_END]
        rows.append(ids + _random_text(generator, question))
        images.append(of_row)

    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        columns = slice(length - len(ids), None) if padding_side == "left" else slice(len(ids))
        input_ids[row, columns] = torch.tensor(ids)
        attention_mask[row, columns] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **_merge_images(mllm, images)}
    family = mllm.model.config.model_type
    if family == "gemma3":
        inputs["token_type_ids"] = (input_ids == IMAGE_TOKEN).long()
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (input_ids == IMAGE_TOKEN).int()
    return mllm.batch(**inputs)


def _random_text(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(FIRST_TEXT, LAST_TEXT + 1, (length,), generator=generator).tolist()


def _merge_images(mllm: MLLM, images: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    flat = [image for row in images for image in row]
    if not flat:
        return {}
    if mllm.model.config.model_type in ("idefics3", "smolvlm"):  # rows are padded with black images
        most = max(map(len, images))
        pixels = torch.zeros(len(images), most, *flat[0]["pixel_values"].shape[1:])
        for row, of_row in enumerate(images):
            for column, image in enumerate(of_row):
                pixels[row, column] = image["pixel_values"][0]
        return {"pixel_values": pixels}
    packed = mllm.model.config.model_type.startswith("minicpm")  # patches of all images side by side
    axes = {"pixel_values": 3 if packed else 0}
    return {name: torch.cat([image[name] for image in flat], dim=axes.get(name, 0)) for name in flat[0]}


# -------------------------------------------------------------------- processors

QUESTION_WORDS = "what color is the square circle left of red blue green in this image ?"
WORDS = [*QUESTION_WORDS.split(), "USER", ":", "ASSISTANT", "user", "assistant"]

CHAT_TEMPLATE = (
    "{{% for message in messages %}}{{{{ message['role'] }}}} : "
    "{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image} {{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{end}{{% endfor %}}{{% if add_generation_prompt %}}assistant :{{% endif %}}"
)


def _tokenizer(special: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    """One token a word, with the ids of the special tokens that the model of the family has."""
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": FIRST_TEXT, **special}
    vocabulary = dict(special)
    free = iter(index for index in range(FIRST_TEXT + 1, VOCABULARY) if index not in special.values())
    vocabulary |= {word: next(free) for word in WORDS}
    vocabulary |= {f"word{index}": index for index in free}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )


def processor_for(family: str, chat_template: bool = True) -> Any:
    """A processor that fits the models of some families; without a chat template it has none."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if family == "llava":
        return LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
            _tokenizer({"<image>": IMAGE_TOKEN}),
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE.format(image="<image>", end=" ") if chat_template else None,
        )
    if family == "llava_next":
        return LlavaNextProcessor(
            LlavaNextImageProcessorPil(
                size={"shortest_edge": 4},
                crop_size={"height": 4, "width": 4},
                image_grid_pinpoints=[[4, 8], [8, 4], [8, 8]],
            ),
            _tokenizer({"<image>": IMAGE_TOKEN}),
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE.format(image="<image>", end=" "),
        )
    if family == "gemma3":
        special = {"<image_soft_token>": IMAGE_TOKEN, "<start_of_image>": VISION_START, "<end_of_image>": VISION_END}
        named = {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        }
        return Gemma3Processor(
            Gemma3ImageProcessorPil(size=size),
            _tokenizer(special, **named),
            image_seq_length=4,
            chat_template=CHAT_TEMPLATE.format(image="<start_of_image>", end=" "),
        )
    if family == "idefics3":
        special = {
            "<image>": IMAGE_TOKEN,
            "<fake_token_around_image>": VISION_START,
            "<global-img>": VISION_END,
            "<end_of_utterance>": VIDEO_TOKEN,
        }
        return Idefics3Processor(
            Idefics3ImageProcessorPil(
                size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}, do_image_splitting=False
            ),
            _tokenizer(special),
            image_seq_len=4,
            chat_template=CHAT_TEMPLATE.format(image="<image>", end="<end_of_utterance> "),
        )
    raise KeyError(family)


PROCESSOR_FAMILIES = ("llava", "llava_next", "gemma3", "idefics3")


def with_answer(mllm: MLLM, batch: Batch, length: int) -> TokenLayout:
    """The batch's layout if the last `length` tokens of each prompt were a teacher-forced answer."""
    return TokenLayout.from_input_ids(
        batch["input_ids"],
        batch["attention_mask"],
        mllm.visual_token_ids,
        answer_start=batch.layout.last_prompt + 1 - length,
    )
