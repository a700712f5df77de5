"""A checkpoint of the LLaVA code base, written as a transformers folder with its processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaImageProcessorPil, LlavaProcessor, image_utils

from dyvte.conversion.source import Source, checkpoint_folder, read_source
from dyvte.conversion.target import plan, side_of, target_config
from dyvte.conversion.tokenizer import IMAGE_TOKEN, add_image_token, read_tokenizer
from dyvte.conversion.weights import write_shards
from dyvte.errors import ConfigError, ModelError
from dyvte.runs.locks import replace_folder, temporary_name
from dyvte.runs.terminal import progress
from dyvte.stored_files import read_json, reason_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System prompt of Vicuna 1.1, which LLaVA-1.5, VILA and InternVL-Chat were trained with (35 tokens with `USER:`)."""

VICUNA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ system }} {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }} "
    "{% else %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ image }}\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    revision: str | None = None,
    vision_tower: str | None = None,
    chat_template: str | None = None,
    dtype: str | None = None,
    shard_gigabytes: float = 4.0,
    overwrite: bool = False,
) -> Path:
    """Turn a checkpoint of the LLaVA code base into a transformers folder with processor.

    The folder appears complete or not at all. Settings are explained in `conf/convert.yaml`.
    """
    folder = Path(target).expanduser()
    _check_target(folder, overwrite)
    to = None if dtype is None else DTYPES.get(str(dtype))
    if dtype is not None and to is None:
        raise ConfigError(f"dtype={dtype}: choose float16, bfloat16 or float32, or null to keep the source's")
    checkpoint = read_source(checkpoint_folder(source, revision), vision_tower)
    tokenizer = read_tokenizer(checkpoint.tokenizer_folder)
    image_token_id, vocabulary = add_image_token(tokenizer, checkpoint)
    config = target_config(checkpoint, image_token_id, vocabulary)
    if to is not None:
        config.dtype = to
    entries = plan(checkpoint, config, to)
    processor = build_processor(checkpoint, config, tokenizer, _template(chat_template, checkpoint))

    config.architectures = [
        "LlavaDownsampleForConditionalGeneration"
        if config.model_type == "llava_downsample"
        else "LlavaForConditionalGeneration"
    ]
    total = sum(entry.nbytes for entry in entries)
    unfinished = temporary_name(folder)
    try:
        unfinished.mkdir(parents=True)
        with progress("weights", "bytes", total, unit_scale=True) as bar:
            for done in write_shards(unfinished, entries, int(shard_gigabytes * 2**30)):
                bar.update(done)
        config.save_pretrained(unfinished)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**special).save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        replace_folder(unfinished, folder, overwrite)
    except FileExistsError as error:
        raise ConfigError(f"{folder} exists by now: another process has written it meanwhile") from error
    except OSError as error:
        raise ConfigError(f"target={folder} cannot be written ({reason_of(error)}): give another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(
        f"{folder}: {config.model_type}, {config.text_config.num_hidden_layers} decoder layers, "
        f"{config.image_seq_length} visual tokens an image; use it with model=hf model.path={folder}"
    )
    return folder


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{folder} exists: give another target, or overwrite=true")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not the folder of a model and is not replaced: give another target")


def _template(path: str | None, source: Source) -> str:
    if path is not None:
        try:
            return Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template={path}: {reason_of(error)}") from error
    if source.text_config.model_type != "llama":
        raise ConfigError(
            f"{source.folder}: no prompt is known for a {source.text_config.model_type} language model; "
            "give chat_template=FILE (Jinja)"
        )
    image = f"<im_start>{IMAGE_TOKEN}<im_end>" if source.config.get("mm_use_im_start_end") else IMAGE_TOKEN
    system = json.dumps(VICUNA_SYSTEM)
    return f"{{% set image = '{image}' %}}{{% set system = {system} %}}" + VICUNA_TEMPLATE


def build_processor(source: Source, config: Any, tokenizer: Any, chat_template: str) -> Any:
    """A `LlavaProcessor` that prepares images and prompts as the code base does."""
    vision = config.vision_config
    size, patch = side_of(vision.image_size), side_of(vision.patch_size)
    mean, std = _normalisation(source, vision.model_type)
    square = {"height": size, "width": size}
    ratio = source.config.get("image_aspect_ratio")
    image_processor = LlavaImageProcessorPil(
        do_pad=ratio == "pad",  # to a square, with the mean colour
        size=square if ratio == "resize" else {"shortest_edge": size},
        crop_size=square,
        image_mean=mean,
        image_std=std,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch,
        # The processor counts patches; what the model does beyond (class token, downsampling) goes into this number.
        vision_feature_select_strategy="full",
        num_additional_image_tokens=config.image_seq_length - (size // patch) ** 2,
        chat_template=chat_template,
    )


def _normalisation(source: Source, model_type: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the colours that the tower was trained with."""
    defaults = {
        "clip_vision_model": (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD),
        "siglip_vision_model": (image_utils.IMAGENET_STANDARD_MEAN, image_utils.IMAGENET_STANDARD_STD),
        "internvl_vision": (image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD),
    }
    mean, std = defaults[model_type]
    file = None if source.tower_folder is None else source.tower_folder / "preprocessor_config.json"
    if file is not None and file.is_file():
        stored = read_json(file)
        mean, std = stored.get("image_mean", mean), stored.get("image_std", std)
        for given in (mean, std):
            if not isinstance(given, (list, tuple)) or not all(isinstance(each, (int, float)) for each in given):
                raise ModelError(f"{file}: image_mean and image_std must be lists of numbers, got {given!r}")
    return list(mean), list(std)
