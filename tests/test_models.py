"""Configured models: published sizes on the meta device, instruments on small copies, every command on stand-ins."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import costs_of
from families import EOS, PAD, VISION_END, VISION_START, _merge_images, _num_visual_tokens, _one_image
from families import FAMILIES as BUILDERS
from families import _tokenizer as word_tokenizer
from forks import Fork
from naive import masked_forward, with_generated
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

import dyvte
from benchmarks import architectures
from docs.tooling import models
from dyvte.convert import convert
from dyvte.errors import ModelError
from dyvte.mllm import MLLM
from dyvte.runs.config import compose, config_folder, load_model
from tests.zoo.checks import Subject
from tests.zoo.specimens import build_model
from tests.zoo.verdicts import VERDICTS

CONFIGS = sorted(
    file.stem
    for file in (config_folder() / "model").glob("[!_]*.yaml")
    if file.stem not in ("hf", "exported", "llava_shapes", "llava_smol")  # any model or export, and our own
)
ASKED_IN_CI = (
    *("gemma3n_e4b", "gemma4_31b", "gemma4_e4b", "glm45v", "glm46v_flash", "kimi_k25"),
    *("lfm25_vl_1b6", "minicpmv46", "paddleocr_vl", "qwen35_9b"),
)
"""Of types that the zoo asks in CI: what it does with them is computed here by `make zoo` only."""
HYBRID = ("lfm25_vl_1b6", "minicpmv46", "qwen35_9b")
"""With layers that carry a state, for which hiding keys is not leaving tokens out (`tests/zoo/reference.py` does)."""
COMPARED = CONFIGS if os.environ.get("DYVTE_ZOO") == "all" else tuple(n for n in CONFIGS if n not in ASKED_IN_CI)
QUICK = ("eagle_x5_7b", "glm41v_9b", "lfm25_vl_1b6", "llava7b", "smolvlm2")
"""One of each way in, and a type that has no family of its own here; `make zoo` takes all."""


# ---------------------------------------------------------------------- published sizes


def test_every_configuration_has_its_published_hyper_parameters() -> None:
    assert architectures.names() == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_says_what_it_is(name: str) -> None:
    text = (config_folder() / "model" / f"{name}.yaml").read_text()
    known = architectures.architecture(name)
    settings = OmegaConf.to_container(compose("base", [f"model={name}"]).model, resolve=False)
    assert f"{known.num_layers} decoder layers" in text
    assert f"{known.visual_tokens} visual tokens" in text
    assert "https://huggingface.co/" in text.splitlines()[1]
    assert isinstance(settings, dict)
    assert settings["path"] in ("???", text.splitlines()[1].split("huggingface.co/")[1].split()[0])
    assert settings["attn_implementation"] == "sdpa"
    assert settings["dtype"] in ("float16", "bfloat16")
    assert settings["trust_remote_code"] is False


@cache
def full_size(name: str) -> MLLM:
    return architectures.full_size(architectures.architecture(name))


@pytest.mark.parametrize("name", ["llava7b", "gemma3_4b", "internvl_chat7b", *ASKED_IN_CI])
def test_full_size_on_the_meta_device(name: str) -> None:
    mllm, known = full_size(name), architectures.architecture(name)
    assert mllm.num_layers == known.num_layers
    assert mllm.hidden_size == known.config["text_config"]["hidden_size"]
    assert all(parameter.is_meta for parameter in mllm.model.parameters())


@pytest.mark.parametrize("name", [name for name in architectures.names() if architectures.architecture(name).tflops])
def test_flops_are_the_published_ones(name: str) -> None:
    mllm, known = full_size(name), architectures.architecture(name)
    vision = models.vision_tflops(mllm, known)
    assert vision is not None
    low, high = known.tflops
    assert low <= models.prefill_tflops(mllm, known, mllm.num_layers) + vision <= high


@pytest.mark.parametrize("name", ["gemma4_e4b", "lfm25_vl_1b6", "llava7b"])
def test_flops_of_an_exit_are_those_counted_under_it(name: str) -> None:
    """Layers that borrow keys, that carry a state, and plain ones."""
    mllm, known = small(name)
    known = dataclasses.replace(known, text_tokens=2 * architectures.WORDS)
    counted = dyvte.exit_flops(mllm, architectures.prompt(mllm, known, known.visual_tokens))
    for k, count in enumerate(counted):
        expected = (count.decoder + 2 * mllm.lm_head.weight.numel()) / 1e12
        assert models.prefill_tflops(mllm, known, k) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_and_visual_tokens(name: str) -> None:
    """Visual tokens come from the model's own code, on narrow layers and with the real geometry of images."""
    known = architectures.architecture(name)
    config = architectures.build_config(known.config)
    assert config.get_text_config().num_hidden_layers == known.num_layers
    assert (
        architectures.count_visual_tokens(architectures.small_copy(known), architectures.image_inputs(known))
        == known.visual_tokens
    )


SMALL_IMAGES: dict[str, dict[str, Any]] = {
    "lfm2_vl": {"pixel_values": [1, 32, 768], "pixel_attention_mask": [1, 32], "spatial_shapes": [[4, 8]]},
    "minicpmv4_6": {"pixel_values": [1, 3, 14, 14 * 64], "target_sizes": [[8, 8]]},
    "gemma4": {"pixel_values": [1, 72, 768], "image_position_ids": [6, 12]},
    "gemma3n": {"pixel_values": [1, 3, 32, 32]},
}
"""Inputs of a small image, of types that take one as a sequence of patches."""


def with_small_image(known: architectures.Architecture) -> architectures.Architecture:
    """The same model for a small image: fewer patches and tiles' pixels, the same way from patches to visual tokens."""
    config, inputs = copy.deepcopy(known.config), copy.deepcopy(known.inputs)
    vision = config["vision_config"]
    if (found := SMALL_IMAGES.get(config["model_type"])) is not None:
        inputs |= found
    elif "image_grid_thw" in inputs:
        inputs |= {"image_grid_thw": [[1, 4, 8]], "pixel_values": [32, *known.inputs["pixel_values"][1:]]}
    else:
        patches_a_side = {
            "llava_next": 2,
            "llava_onevision": 2,
            "gemma3": 8,
            "internvl": 8,
            "mistral3": 8,
            "smolvlm": 9,
        }
        patch = vision["patch_size"] if isinstance(vision["patch_size"], int) else vision["patch_size"][0]
        before, after = inputs["pixel_values"][-1], patches_a_side.get(config["model_type"], 4) * patch

        def scaled(pixels: Any) -> Any:
            return [scaled(each) for each in pixels] if isinstance(pixels, list) else pixels * after // before

        inputs["pixel_values"][-2:] = [after, after]
        if vision["model_type"] != "pixtral":  # whose size is the largest that it takes
            vision["image_size"] = scaled(vision["image_size"])
        config |= {key: scaled(config[key]) for key in ("image_grid_pinpoints",) if key in config}
        inputs |= {key: scaled(inputs[key]) for key in ("image_sizes",) if key in inputs}
        config |= {
            key: config[key] * after**2 // before**2
            for key in ("mm_tokens_per_image", "image_seq_length")
            if key in config
        }
    small = dataclasses.replace(known, config=config, inputs=inputs)
    return dataclasses.replace(
        small,
        visual_tokens=architectures.count_visual_tokens(
            architectures.small_copy(small), architectures.image_inputs(small)
        ),
    )


@cache
def small(name: str) -> tuple[MLLM, architectures.Architecture]:
    """A narrow and shallow copy of a configured model, for small images."""
    known = with_small_image(architectures.architecture(name))
    return architectures.small_copy(known), known


@pytest.mark.parametrize("name", COMPARED)
def test_instruments_agree_with_plain_computations(name: str) -> None:
    found = models.compare(small(name)[1])
    assert found["probe"] < 1e-5
    assert found["sweep"] < 1e-4
    assert found["exit_all"] == found["exit_none"] == 0
    assert found["image_matters"] > 0.1


@pytest.mark.parametrize("name", ["qwen25vl7b", "glm41v_9b", "smolvlm2", "mistral_small31", "internvl_chat7b"])
def test_instruments_agree_on_images_of_the_real_size(name: str) -> None:
    found = models.compare(architectures.architecture(name))
    assert found["probe"] < 1e-5
    assert found["sweep"] < 1e-4
    assert found["exit_all"] == found["exit_none"] == 0
    assert found["image_matters"] > 0.1


# ------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", [name for name in COMPARED if name not in HYBRID])
@pytest.mark.parametrize("exit_layer", [0, 2])
def test_generation_under_exit_equals_masked_recomputation(name: str, exit_layer: int) -> None:
    mllm, known = small(name)
    batch = architectures.prompt(mllm, known, known.visual_tokens)
    visual = list(range(architectures.SMALL_VOCABULARY - 12, architectures.SMALL_VOCABULARY))
    with dyvte.FixedExit(exit_layer)(mllm):
        output = mllm.model.generate(
            **batch,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=[10_000],
            pad_token_id=0,
            suppress_tokens=visual,
            return_dict_in_generate=True,
            output_logits=True,
        )
    length = batch["input_ids"].shape[1]
    whole = with_generated(mllm, batch, output.sequences[:, length:])
    expected = masked_forward(mllm, whole, exit_layer).logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, atol=1e-4, rtol=0)


def test_vila_downsampled_tokens_through_every_instrument(tmp_path: Path) -> None:
    source = Fork(tmp_path / "vila", "siglip", "mlp_downsample", "vila", "safetensors", 10)
    mllm = dyvte.load(convert(source.folder, tmp_path / "target"), device="cpu")
    image = Image.effect_noise((12, 12), 90).convert("RGB")
    batch = mllm.encode([image, image], ["what color is this ?", "red ?"])
    sweep = dyvte.exit_sweep(mllm, batch)
    for exit_layer in range(mllm.num_layers + 1):
        expected = masked_forward(mllm, batch, exit_layer).logits[:, -1]
        torch.testing.assert_close(sweep.logits[:, exit_layer], expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------- peculiar decoders


@torch.no_grad()
def test_prefix_lm_branches_all_text() -> None:
    """In PaliGemma the text before the image sees it, so the sweep may not share that text between exits."""
    subject = Subject(dyvte.wrap(build_model("paligemma")))
    found = dyvte.exit_sweep(subject.mllm, subject.batch(), shared_image=[0, 1]).logits
    for k in range(subject.mllm.num_layers + 1):
        torch.testing.assert_close(found[:, k], subject.exits_alone([k, k]), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- every command


class StandInProcessor:
    """Makes inputs of questions and images for a small model, whose own processor needs torchvision or a vocabulary.

    Pixels are drawn at random from the content of the image: `draw(seed)` gives the inputs of one.
    """

    chat_template, image_token = "stand-in", "<image>"

    def __init__(self, mllm: MLLM, draw: Callable[[int], dict[str, Tensor]]) -> None:
        self.mllm, self.draw = mllm, draw
        self.image_token_id = mllm.image_token_id
        self.tokenizer = word_tokenizer({"<image>": self.image_token_id})

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        parts = ["<image>" if part["type"] == "image" else part["text"] for part in messages[0]["content"]]
        text = "<s> user : " + " ".join(parts) + " assistant :"
        return text if len(messages) == 1 else f"{text} {messages[1]['content'][0]['text']} </s>"

    def __call__(
        self, text: list[str], images: list[list[Image.Image]] | None, padding_side: str, **_: Any
    ) -> dict[str, Tensor]:
        rows, of_rows = [], []
        for prompt, of_row in zip(text, images or [[]] * len(text), strict=True):
            inputs = [self._pixels(image) for image in of_row]
            ids: list[int] = []
            for token in self.tokenizer(prompt, add_special_tokens=False)["input_ids"]:
                count = _num_visual_tokens(self.mllm, inputs[0]) if token == self.image_token_id else 0
                ids += [VISION_START, *[token] * count, VISION_END] if count else [token]
            rows.append(ids)
            of_rows.append(inputs)
        length = max(map(len, rows))
        input_ids = torch.tensor(
            [
                [PAD] * (length - len(ids)) + ids if padding_side == "left" else ids + [PAD] * (length - len(ids))
                for ids in rows
            ]
        )
        inputs = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
        draws = _merge_images(self.mllm, of_rows)
        if self.mllm.model.config.model_type == "gemma3":
            inputs["token_type_ids"] = (input_ids == self.image_token_id).long()
        if "mm_token_type_ids" in inspect.signature(self.mllm.model.forward).parameters and "image_grid_thw" in draws:
            inputs["mm_token_type_ids"] = (input_ids == self.image_token_id).int()
        return {**inputs, **draws}

    def _pixels(self, image: Image.Image) -> dict[str, Tensor]:
        return self.draw(int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:4], "big"))


def drawn(known: architectures.Architecture, seed: int) -> dict[str, Tensor]:
    """Inputs of one random image, as `_merge_images` takes them."""
    inputs = architectures.image_inputs(known, seed)
    if known.config["model_type"] == "smolvlm":  # [rows, images, ...]: the images are put into rows later
        inputs["pixel_values"] = inputs["pixel_values"][0]
    return inputs


def run_every_command(
    mllm: MLLM,
    draw: Callable[[int], dict[str, Tensor]],
    chosen: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    draws: bool = False,
) -> dict[str, dict[str, Any]]:
    """Summaries of stages, exits, train, evaluate and generate on a small model that stands in for the chosen one.

    Two things take longest and are the same for every model, so they are done less often: prompts of one length are
    counted once instead of once a command, and figures, which are made of a summary, are drawn if `draws`.
    """
    import analysis.exits
    import analysis.stages
    import dyvte.evaluate
    import dyvte.generate
    import dyvte.train

    mllm.model.generation_config.eos_token_id = EOS

    def load(path: str, **settings: Any) -> MLLM:
        assert settings["trust_remote_code"] is False
        return dyvte.wrap(mllm.model, StandInProcessor(mllm, draw))

    monkeypatch.setattr("dyvte.loading.load", load)
    for place in ("dyvte.gates.labels", "analysis.measuring.exits"):
        monkeypatch.setattr(f"{place}.PromptCosts", costs_of)
    if not draws:
        monkeypatch.setattr("dyvte.runs.store.RunFolder.save_figure", lambda self, name, figure: self.path)
        monkeypatch.setattr("analysis.exits.draw", lambda summary: {})
        for name in ("draw_three_stages", "draw_measures", "draw_stages_by_kind", "draw_attention_map"):
            monkeypatch.setattr(f"analysis.stages.{name}", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    common = [*chosen, "device=cpu", "data.limit=12", "batch_size=12", "data=shapes", "data.per_scene=1"]
    analysis.stages.main(compose("stages", [*common, "bootstrap=20", "output_dir=stages", "maps.count=1"]))
    quick = ["bootstrap=20", "permutations=19", "captions=0", "max_new_tokens=2", "accuracy=false"]
    analysis.exits.main(compose("exits", [*common, *quick, "output_dir=exits"]))
    dyvte.train.main(
        compose(
            "train",
            [
                *common,
                "output_dir=train",
                "labels.dir=labels",
                "validation_share=0.5",
                "labels.max_new_tokens=2",
                "recipe.training.epochs=1",
                "recipe.bound=0.95",
            ],
        )
    )
    evaluated = [
        *common,
        "comparison_dir=compare",
        "output_dir=evaluate",
        "reference_dir=reference",
        "max_new_tokens=2",
    ]
    dyvte.evaluate.main(compose("evaluate", [*evaluated, "policy=fixed_exit", "policy.layer=1"]))
    dyvte.generate.main(
        compose("generate", [*common, "output_dir=generate", "max_new_tokens=2", "policy.gates=train/gates"])
    )
    return {
        each: json.loads((tmp_path / each / "summary.json").read_text())
        for each in ("stages", "exits", "train", "evaluate", "generate")
    }


@pytest.mark.parametrize("family", BUILDERS)
def test_every_command_runs(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = BUILDERS[family](0, num_layers=3)

    def draw(seed: int) -> dict[str, Tensor]:
        return _one_image(mllm, torch.Generator().manual_seed(seed))

    summaries = run_every_command(mllm, draw, ["model=llava7b"], tmp_path, monkeypatch, draws=family == "llava")
    assert all(summary["num_layers"] == 3 for summary in summaries.values())
    assert len(summaries["exits"]["kl"]) == 4
    assert summaries["evaluate"]["mean_exit_layer"] == 1


@pytest.mark.parametrize("name", CONFIGS if os.environ.get("DYVTE_ZOO") == "all" else QUICK)
def test_every_command_runs_on_a_small_copy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm, known = small(name)

    chosen = [f"model={name}", "model.path=somewhere"]
    if "exported" in compose("base", [f"model={name}"]).model:
        chosen.append("model.exported=somewhere")
    summaries = run_every_command(mllm, partial(drawn, known), chosen, tmp_path, monkeypatch)
    layers = mllm.num_layers
    assert all(summary["num_layers"] == layers and summary["model"] == name for summary in summaries.values())
    assert len(summaries["exits"]["kl"]) == layers + 1
    assert len(summaries["stages"]["curves"]["cross"]) == layers
    assert summaries["evaluate"]["mean_exit_layer"] == 1


@pytest.mark.parametrize("name", CONFIGS if os.environ.get("DYVTE_ZOO") == "all" else [*QUICK, "minicpmv46"])
@torch.no_grad()
def test_rows_of_a_batch_are_the_batch_of_the_rows(name: str) -> None:
    """However the processor lays images out: `Batch` finds those of its rows, and joins them again."""
    mllm, known = small(name)
    mllm = dyvte.wrap(mllm.model, StandInProcessor(mllm, partial(drawn, known)))
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    questions = ["what color is this ?", "is the square left of the circle ?", "what ?"]
    batch = mllm.encode(images, questions)
    expected = mllm(**batch).logits[torch.arange(3), batch.layout.last_prompt]
    swapped = batch[[2, 0]]
    joined = dyvte.Batch.cat([batch[1:], batch[:1]])
    for rows, chosen in ([2, 0], swapped), ([1, 2, 0], joined):
        found = mllm(**chosen).logits[torch.arange(len(rows)), chosen.layout.last_prompt]
        torch.testing.assert_close(found, expected[rows], atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-2


# --------------------------------------------------------------- devices and weights


def with_layers_on_disk(tmp_path: Path) -> MLLM:
    """The model in `tmp_path/model`, which has three layers, with two of them left on disk."""
    places = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    places |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0")}
    places |= {f"model.language_model.layers.{layer}": "disk" for layer in (1, 2)}
    spread = dyvte.load(tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload"))
    assert next(spread.layers[1].parameters()).is_meta
    return spread


def test_layers_offloaded_to_disk_give_the_same_numbers(tmp_path: Path) -> None:
    BUILDERS["llava"](0, num_layers=3).model.save_pretrained(tmp_path / "model")
    plain, spread = dyvte.load(tmp_path / "model", device="cpu"), with_layers_on_disk(tmp_path)
    batch = models_batch(plain)
    with torch.no_grad():
        assert torch.equal(plain.model(**batch).logits, spread.model(**batch).logits)
        for exit_layer in (0, 2):
            with dyvte.FixedExit(exit_layer)(plain):
                expected = plain.generate(batch, max_new_tokens=3)
            with dyvte.FixedExit(exit_layer)(spread):
                assert spread.generate(batch, max_new_tokens=3) == expected
    first, second = dyvte.exit_sweep(plain, batch), dyvte.exit_sweep(spread, batch)
    assert torch.equal(first.logits, second.logits)
    torch.testing.assert_close(first.text_entropy, second.text_entropy, rtol=0, atol=0, equal_nan=True)
    with dyvte.AttentionProbe(plain) as one, dyvte.AttentionProbe(spread) as two, torch.no_grad():
        plain.model(**batch)
        spread.model(**batch)
    torch.testing.assert_close(one.stats.mass, two.stats.mass, rtol=0, atol=0, equal_nan=True)


def test_offloaded_embeddings_take_inputs_where_they_run(tmp_path: Path) -> None:
    BUILDERS["llava"](0, num_layers=3).model.save_pretrained(tmp_path / "model")
    plain = dyvte.load(tmp_path / "model", device="cpu")
    places = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    places |= {"model.language_model": "disk"}
    spread = dyvte.load(tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload"))
    assert spread.model.get_input_embeddings().weight.is_meta
    assert spread.device == torch.device("cpu")
    batch = models_batch(plain)
    for exit_layer in (1, 3):
        with torch.no_grad(), dyvte.FixedExit(exit_layer)(plain):
            wanted = plain(**batch).logits
        with torch.no_grad(), dyvte.FixedExit(exit_layer)(spread):
            assert torch.equal(spread(**spread.batch(**batch)).logits, wanted)
            assert spread.generate_ids(spread.batch(**batch), max_new_tokens=2)


def test_every_command_runs_with_layers_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BUILDERS["llava"](0, num_layers=3).model.save_pretrained(tmp_path / "model")
    mllm = with_layers_on_disk(tmp_path)

    def draw(seed: int) -> dict[str, Tensor]:
        return _one_image(mllm, torch.Generator().manual_seed(seed))

    summaries = run_every_command(mllm, draw, ["model=llava7b", "model.device_map=auto"], tmp_path, monkeypatch)
    assert all(summary["num_layers"] == 3 for summary in summaries.values())
    assert summaries["train"]["seconds"] > summaries["train"]["training_seconds"]


def models_batch(mllm: MLLM) -> dyvte.Batch:
    from families import random_batch

    return random_batch(mllm, torch.Generator().manual_seed(0), (1, 1), question_length=[4, 6])


def test_settings_reach_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(path: str, **settings: Any) -> MLLM:
        seen.update(settings, path=path)
        return BUILDERS["llava"](num_layers=1)

    monkeypatch.setattr("dyvte.loading.load", load)
    changes = ["model.quantization_config={load_in_4bit: true}", "model.device_map=auto", "model.revision=abc123"]
    load_model(compose("stages", ["model=llava7b", *changes]))
    assert seen["path"] == "llava-hf/llava-1.5-7b-hf"
    assert seen["quantization_config"] == {"load_in_4bit": True}
    assert seen["device_map"] == "auto"
    assert seen["revision"] == "abc123"
    assert seen["trust_remote_code"] is False


class Int8Linear(torch.nn.Module):
    """A linear layer whose weights are whole numbers and a scale for each row, as in 8-bit quantization."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantized(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, states: Tensor) -> Tensor:
        return torch.nn.functional.linear(states, self.dequantized(), self.bias)


def replace_linear_layers(decoder: torch.nn.Module) -> None:
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Int8Linear(child))


@pytest.fixture
def stand_in_quantization(monkeypatch: pytest.MonkeyPatch) -> str:
    """A way to quantize that transformers knows for the length of a test, in place of bitsandbytes."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):
        def __init__(self, **_: Any) -> None:
            self.quant_method = "stand_in"  # type: ignore[assignment]

    class Quantizer(HfQuantizer):
        requires_calibration = False

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            replace_linear_layers(model.get_decoder())
            return model

    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "stand_in", Config)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "stand_in", Quantizer)
    return "stand_in"


@torch.no_grad()
def test_a_quantized_model_runs_through_every_instrument(tmp_path: Path, stand_in_quantization: str) -> None:
    """The settings reach transformers as they are; results are those of the same weights in full precision."""
    BUILDERS["llava"](0, num_layers=3).model.save_pretrained(tmp_path)
    plain = dyvte.load(tmp_path, device="cpu")
    changes = [f"model.path={tmp_path}", f"model.quantization_config={{quant_method: {stand_in_quantization}}}"]
    quantized = load_model(compose("stages", ["model=hf", "device=cpu", "model.dtype=float32", *changes]))
    weights = {name: each for name, each in quantized.model.named_modules() if isinstance(each, Int8Linear)}
    assert len(weights) == 3 * 7  # of attention and MLP, in every layer
    assert plain.model.get_submodule(next(iter(weights))).weight.ne(next(iter(weights.values())).dequantized()).any()
    for name, each in weights.items():
        plain.model.get_submodule(name).weight.data = each.dequantized()
    batch = models_batch(plain)
    first, second = dyvte.exit_sweep(plain, batch), dyvte.exit_sweep(quantized, batch)
    torch.testing.assert_close(first.logits, second.logits, atol=1e-4, rtol=1e-4)
    with dyvte.FixedExit(2)(plain):
        expected = plain.generate(batch, max_new_tokens=3)
    with dyvte.FixedExit(2)(quantized):
        assert quantized.generate(batch, max_new_tokens=3) == expected
    with dyvte.AttentionProbe(plain) as one, dyvte.AttentionProbe(quantized) as two:
        plain.model(**batch)
        quantized.model(**batch)
    torch.testing.assert_close(one.stats.mass, two.stats.mass, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("setting", ["load_in_8bit", "load_in_4bit"])
def test_quantization_without_its_package_says_which(setting: str, tmp_path: Path) -> None:
    BUILDERS["llava"](0, num_layers=1).model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="requires bitsandbytes"):
        dyvte.load(tmp_path, device="cpu", quantization_config={setting: True})


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    model = BUILDERS["llava"](0, num_layers=2).model
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="the weights are missing \\(safetensors files, no others are read\\)"):
        dyvte.load(tmp_path, device="cpu")


# ------------------------------------------------------------------------------- page


def test_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "VERDICTS", {name: VERDICTS[name] for name in ("llava", "mllama")})
    monkeypatch.setattr(models, "VARIANTS", {})
    text = models.render(["llava7b"])
    assert "**1 of 2** image-text-to-text architectures" in text
    assert "| `llava7b` | Hub | llava | 32 | 576 | 7.1 |" in text
    assert "Nothing on this page was run with real weights" in text
    assert "mllama" in text
