"""`python -m analysis.models`: what works with which model, checked without weights, as docs/models.md.

Every configuration in `conf/model/` has its published hyper-parameters in `conf/model/_architecture/`. Each is built
in full size on the meta device (layers, visual tokens, FLOPs), and as a narrow and shallow random copy on the CPU, on
which the instruments are compared with plain computations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import dyvte
import dyvte.conversion.downsample  # makes a model known to transformers
from dyvte.config import command, config_folder
from dyvte.errors import DyvteError
from dyvte.flops import FlopCounter
from dyvte.layout import INSTRUCTION, VISUAL
from dyvte.mllm import MLLM, Batch
from dyvte.policies.base import check_model
from dyvte.store import write_atomic

SMALL_VOCABULARY = 256
"""Rows of the embedding of a small copy; its special tokens get the last ids."""

WORDS = 7
"""Text tokens before the image of the small copies' prompts, and as many after it."""


@dataclass(frozen=True)
class Architecture:
    """Published hyper-parameters of a model, from `conf/model/_architecture/`.

    Attributes:
        config: fields of its `config.json`.
        inputs: what it gets for one image: the shape of `pixel_values`, the values of everything else.
        num_layers: decoder layers.
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


# ------------------------------------------------------------------------- building


def build_config(settings: dict[str, Any]) -> Any:
    """A transformers config from the fields of its `config.json`."""
    settings = copy.deepcopy(settings)
    for key in ("text_config", "vision_config"):
        if isinstance(settings.get(key), dict):
            part = settings[key]
            settings[key] = CONFIG_MAPPING[part["model_type"]](**_without(part, "model_type"))
    model_type = settings["model_type"]
    if model_type in ("qwen2_5_vl", "qwen3_vl", "glm4v"):  # these take their parts as dictionaries only
        settings |= {key: settings[key].to_dict() for key in ("text_config", "vision_config")}
    return CONFIG_MAPPING[model_type](**_without(settings, "model_type"))


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}


def full_size(known: Architecture) -> MLLM:
    """The model in full size on the meta device: it has shapes and no weights."""
    with torch.device("meta"):
        return dyvte.wrap(AutoModelForImageTextToText.from_config(build_config(known.config), dtype=torch.bfloat16))


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
    if "query_pre_attn_scalar" in text:
        text["query_pre_attn_scalar"] = 16
    rotary = text.get("rope_parameters", {})
    if "mrope_section" in rotary:
        half = int(16 * rotary.get("partial_rotary_factor", 1.0)) // 2
        side = half * 3 // 8
        rotary["mrope_section"] = [half - 2 * side, side, side]
    for key, value in {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "depth": 4,
        "num_attention_heads": 2,
        "num_heads": 2,
        "head_dim": 16,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 2],
        "fullatt_block_indexes": [1, 3],
    }.items():
        if key in vision:
            vision[key] = value
    tokens = sorted((key for key in settings if key.endswith(("token_id", "token_index"))), key=settings.__getitem__)
    settings |= {key: SMALL_VOCABULARY - len(tokens) + number for number, key in enumerate(tokens)}
    return settings


def small_copy(known: Architecture, attn_implementation: str = "sdpa") -> MLLM:
    """A narrow and shallow random copy in float32 on the CPU, whose attention is far from uniform."""
    with torch.random.fork_rng():
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
    return {
        name: torch.randn(*value, generator=generator) if name == "pixel_values" else torch.tensor(value)
        for name, value in known.inputs.items()
    }


@torch.no_grad()
def count_visual_tokens(mllm: MLLM, inputs: dict[str, Tensor]) -> int:
    """How many visual tokens the vision side makes of one image."""
    features = mllm.model.get_image_features(**inputs).pooler_output
    return sum(len(each) for each in features) if not isinstance(features, Tensor) else features.shape[:-1].numel()


def prompt(mllm: MLLM, known: Architecture, num_visual: int) -> Batch:
    """Random text, an image, random text, as a batch of one."""
    text = torch.randint(3, 200, (2 * WORDS,), generator=torch.Generator().manual_seed(0)).tolist()
    middle = [mllm.image_token_id] * num_visual
    ids = torch.tensor([[*text[:WORDS], *middle, *text[WORDS:]]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image_inputs(known)}
    types = (ids == mllm.image_token_id).long()
    model_type = mllm.model.config.model_type
    if model_type == "gemma3":
        inputs["token_type_ids"] = types
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = types.int()
    return mllm.batch(**inputs)


# ------------------------------------------------------------------------- measuring


@torch.no_grad()
def prefill_tflops(mllm: MLLM, known: Architecture, exit_layer: int) -> float:
    """TFLOPs of a prefill's decoder and last logits under an exit, from a model on the meta device."""
    total = 0
    for length, layers in (
        (known.visual_tokens + known.text_tokens, mllm.layers[:exit_layer]),
        (known.text_tokens, mllm.layers[exit_layer:]),
    ):
        kept, mllm.decoder.layers = mllm.decoder.layers, torch.nn.ModuleList(layers)
        try:
            states = torch.zeros(1, length, mllm.hidden_size, device="meta", dtype=mllm.dtype)
            with FlopCounter(mllm) as counter:
                mllm.decoder(inputs_embeds=states)  # with a cache: without one, packed sequences are looked for
            total += counter.count.total
        finally:
            mllm.decoder.layers = kept
    return (total + 2 * mllm.lm_head.weight.numel()) / 1e12


@torch.no_grad()
def vision_tflops(mllm: MLLM, known: Architecture) -> float | None:
    """TFLOPs of one image in tower and projector; None where that code needs values, which the meta device lacks."""
    inputs = {
        name: value.to("meta" if name == "pixel_values" else "cpu") for name, value in image_inputs(known).items()
    }
    inputs["pixel_values"] = inputs["pixel_values"].to(mllm.dtype)
    try:
        with FlopCounter(mllm) as counter:
            mllm.model.get_image_features(**inputs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None
    return counter.count.total / 1e12


@torch.no_grad()
def compare(known: Architecture) -> dict[str, float]:
    """Largest differences on a small copy: probe and eager maps, sweep and single exits, exit L and no exit.

    Exit 0 is compared between two images: nothing of them may be left.
    """
    mllm, eager = small_copy(known), small_copy(known, "eager")
    batch = prompt(mllm, known, count_visual_tokens(mllm, image_inputs(known)))
    other = Batch({**batch, "pixel_values": image_inputs(known, seed=1)["pixel_values"]}, batch.layout)
    text = batch.layout.text
    with dyvte.AttentionProbe(mllm, layout=batch.layout) as probe:
        plain = mllm.model(**batch, use_cache=False).logits
    found = probe.stats.mass[0, :, :, INSTRUCTION, VISUAL]
    sweep = dyvte.exit_sweep(mllm, batch)
    exits, blind = [], []
    for exit_layer in range(mllm.num_layers + 1):
        with dyvte.FixedExit(exit_layer)(mllm):
            exits.append(mllm.model(**batch, use_cache=False).logits)
            if exit_layer == 0:
                blind = [exits[0], mllm.model(**other, use_cache=False).logits]
    single = torch.stack([each[0, -1] for each in exits])
    return {
        "probe": float((found - _eager_cross_mass(eager, batch)).abs().max()),
        "sweep": float((sweep.logits[0] - single).abs().max()),
        "exit_all": float((exits[-1] - plain).abs().max()),
        "exit_none": float((blind[0] - blind[1])[text].abs().max()),
        "image_matters": float((plain - mllm.model(**other, use_cache=False).logits)[0, -1].abs().max()),
    }


def _eager_cross_mass(mllm: MLLM, batch: Batch) -> Tensor:
    """Attention mass [L, H] from the instruction to the image, from the maps of eager attention."""
    maps: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: maps.append(output[1][0]))
        for module in mllm.attentions
    ]
    try:
        mllm.model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    layout = batch.layout
    return torch.stack([each[:, layout.instruction[0]][:, :, layout.visual[0]].sum(-1).mean(-1) for each in maps])


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


# ----------------------------------------------------------------------------- page


@command("models")
def main(cfg: DictConfig) -> None:
    """Write the page that `conf/models.yaml` asks for."""
    page = render(cfg.models or names())
    write_atomic(Path(cfg.page), lambda out: out.write(page.encode()))
    print(f"page: {cfg.page}")


def render(chosen: list[str]) -> str:
    """The page, checking each model on the way."""
    rows, checks = [], []
    for name in tqdm(chosen, desc="models", dynamic_ncols=True):
        known = architecture(name)
        way = _way_in(name)
        mllm = full_size(known)
        middle = mllm.num_layers // 2
        full, half = (prefill_tflops(mllm, known, layer) for layer in (mllm.num_layers, middle))
        vision = None if way == "export" else vision_tflops(mllm, known)
        parameters = sum(each.numel() for each in mllm.model.parameters()) / 1e9
        found = compare(known)
        rows.append(
            f"| `{name}` | {way} | {known.config['model_type']} | {mllm.num_layers} | {known.visual_tokens} | "
            f"{parameters:.1f} | {full:.2f} | {half:.2f} | {'-' if vision is None else f'{vision:.2f}'} |"
        )
        checks.append(
            f"| `{name}` | {found['probe']:.0e} | {found['sweep']:.0e} | {found['exit_all']:.0e} | "
            f"{found['exit_none']:.0e} | {found['image_matters']:.1f} |"
        )
    refusals = [f"| {name} | {what} | {verdict(settings)} |" for name, what, settings in peculiar()]
    return PAGE.format(models="\n".join(rows), checks="\n".join(checks), refusals="\n".join(refusals))


def _way_in(name: str) -> str:
    settings = yaml.safe_load((config_folder() / "model" / f"{name}.yaml").read_text())
    if "exported" in settings["defaults"]:
        return "export"
    return "convert" if settings["path"] == "???" else "Hub"


PAGE = """# Models

Written by `python -m analysis.models`; do not edit.

**Nothing on this page was run with real weights.** The models were built from their published hyper-parameters, in full
size without weights (layers, visual tokens, FLOPs) and as narrow, shallow random copies (the comparisons). Numbers of a
real model, its stages and exits, come from running the commands on it.

## What there is

`model=NAME` with every command. *Hub*: the weights are downloaded when the model is first used. *convert*: the
checkpoint is of the LLaVA code base, `python -m dyvte.convert` turns it into a folder, `model.path=FOLDER` names it.
*export*: its vision side runs in its own environment ([how to](how_to_llava_forks.md)). Any other image-text-to-text
model of transformers: `model=hf model.path=OWNER/NAME`.

Parameters in billions; TFLOPs of one prefill with the visual tokens given and 64 text tokens, decoder and last logits,
without an exit and with the visual tokens leaving after half of the layers; then those of the vision side for one image
(-: not counted, its code needs values).

| model | way in | type | layers | visual tokens | parameters | TFLOPs | exit at half | vision |
|---|---|---|--:|--:|--:|--:|--:|--:|
{models}

The processors of Qwen-VL, InternVL, LLaVA-OneVision, Mistral, GLM-V and SmolVLM need torchvision (SmolVLM also
num2words): `pip install 'dyvte[models]'`. Without it, loading them says so.

## Compared in small

On a random copy with 4 to 6 narrow layers and the real geometry of images: the largest difference between the probe's
attention mass and the maps of eager attention; between `exit_sweep` and one run per exit (logits); between exit L and
no exit; between two images under exit 0 (must be 0); and, so that these mean something, how far another image moves the
logits without an exit. The tests repeat this for smaller images, add generation under exits against a full
recomputation with masked visual keys, and run stages, exits, train, evaluate and generate on a copy of every model
below.

| model | probe | sweep | exit L | exit 0 | image matters |
|---|--:|--:|--:|--:|--:|
{checks}

## Decoders that are not plain

- **Multimodal rotary positions** (Qwen-VL, GLM-V): text keeps the positions that the model gave it when visual tokens
  leave.
- **DeepStack** (Qwen3-VL): the visual features that are added after early layers go to visual positions only; after an
  exit these no longer take part, so an exit before the last of these layers drops them too.
- **Sliding windows** (Gemma 3): a window counts original positions, also after an exit.
- **Attention in both directions** (Gemma 3 within an image, PaliGemma within the prompt): masks are cut from the
  model's own. Where text before the image sees the image, `exit_sweep` carries that text in every branch and shares no
  prefix.
- **Image markers**: visual are the placeholders that image features replace, and nothing else. Tokens that stand
  before, between or after them (`<|vision_start|>`, `[IMG_BREAK]`, `<end_of_image>`, a line break) are text: `system`
  before the first placeholder, `instruction` after it. They stay when visual tokens leave. The line breaks that
  LLaVA-NeXT puts among the features take placeholders and are visual.

| family | what is peculiar | what happens |
|---|---|---|
{refusals}

## Weights

- **Safetensors only**, with one exception: many checkpoints of the LLaVA code base are `.bin` only, which
  `dyvte.convert` and `model=exported` read as tensors alone (`torch.load(weights_only=True)`; a file that would run
  code is refused).
- **Pinned**: `model.revision=COMMIT` fixes what is downloaded. Without it the default branch is taken, and the
  `config.yaml` of each run names the commit that this was ([how to](how_to_own_model.md#the-same-weights-again)).
- **Offline**: with `HF_HUB_OFFLINE=1` nothing is asked of the Hub and what is cached is used.
- **Remote code** is off: what comes with a repository runs only with `model.trust_remote_code=true`, and a model that
  needs it says so.
- **Gated models** (Gemma) need `hf auth login` after accepting their terms, and say so.
- **Quantized**: `model.quantization_config` goes to transformers as it is (`'{{load_in_4bit: true}}'` with
  `dyvte[quantization]`). Tested with a stand-in of 8-bit layers, not with bitsandbytes itself.
- **Spread**: `model.device_map=auto` puts a model on several devices, memory and disk.
"""


if __name__ == "__main__":
    main()
