"""Visual tokens exported in a fork's environment: the same logits here, and every command runs on them."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forks import TEXT, Fork
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import dyvte
from dyvte.conversion import export_visual_tokens
from dyvte.conversion.exported import ExportedDataset
from dyvte.conversion.tokenizer import read_tokenizer
from dyvte.errors import DataError, ModelError
from dyvte.runs.config import compose

QUESTIONS = [
    {
        "question_id": "a",
        "image": "red.png",
        "text": "what color is the square ?",
        "answer": "red",
        "category": "color",
    },
    {"question_id": "b", "image": "red.png", "text": "red or blue ?", "answer": "red", "category": "color"},
    {"question_id": "c", "image": "blue.png", "text": "what is left of the circle ?", "answer": "square"},
    {"question_id": "d", "text": "what color ?", "answer": "green"},
]


# ---------------------------------------------------------- a stand-in for a fork's package


class ForkModel(LlamaForCausalLM):
    """Has the one function of a fork that the export needs; pads, truncates and labels as the LLaVA code base does."""

    fork: Fork

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Any,
        attention_mask: Any,
        past_key_values: Any,
        labels: Tensor,
        images: Any,
        image_sizes: Any = None,
    ) -> tuple[Any, ...]:
        if images is None:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        visual = self.fork.visual_tokens(images)[0]
        ids = input_ids[0].tolist()
        at = ids.index(-200)
        table = self.get_input_embeddings()
        embeddings = torch.cat([table(input_ids[0, :at]), visual, table(input_ids[0, at + 1 :])])
        ignored = torch.full((len(visual),), -100)
        new_labels = torch.cat([labels[0, :at], ignored, labels[0, at + 1 :]])
        longest = self.config.max_position_embeddings
        return (
            None,
            position_ids,
            attention_mask,
            past_key_values,
            embeddings[None, :longest],
            new_labels[None, :longest],
        )


class Conversation:
    roles = ("USER", "ASSISTANT")

    def __init__(self) -> None:
        self.messages: list[tuple[str, str | None]] = []

    def copy(self) -> Conversation:
        return Conversation()

    def append_message(self, role: str, message: str | None) -> None:
        self.messages.append((role, message))

    def get_prompt(self) -> str:
        text = "in this image "
        for index, (role, message) in enumerate(self.messages):
            text += f"{role}: {message}{(' ', '</s>')[index % 2]}" if message else f"{role}:"
        return text


def stand_in(fork: Fork) -> dict[str, Any]:
    """Modules of a package that looks like a fork of LLaVA."""
    model = ForkModel(LlamaConfig(**TEXT))
    model.load_state_dict(fork.text)
    model.fork = fork
    tokenizer = read_tokenizer(fork.folder)

    def tokenizer_image_token(prompt: str, tokenizer: Any, index: int, return_tensors: str) -> Tensor:
        ids: list[int] = [tokenizer.bos_token_id]
        for number, text in enumerate(prompt.split("<image>")):
            ids += ([index] if number else []) + tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids)

    def process_images(images: list[Image.Image], processor: Any, config: Any) -> Tensor:
        pixels = np.stack([np.asarray(image.resize((8, 8)), dtype=np.float32) / 127.5 - 1 for image in images])
        return torch.tensor(pixels).permute(0, 3, 1, 2)

    return {
        "conversation": SimpleNamespace(conv_templates={"plain": Conversation()}),
        "mm_utils": SimpleNamespace(
            get_model_name_from_path=lambda path: "llava",
            tokenizer_image_token=tokenizer_image_token,
            process_images=process_images,
        ),
        "model.builder": SimpleNamespace(
            load_pretrained_model=lambda path, base, name, device: (tokenizer, model, None, 512)
        ),
    }


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A fork's checkpoint with its stand-in package, questions with images, and their export."""
    folder = tmp_path_factory.mktemp("exported")
    fork = Fork(folder / "checkpoint", "clip", "mlp2x_gelu", "llava", "bin", mm_vision_tower="none;of;ours")
    for name, color in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (20, 12), color).save(folder / f"{name}.png")
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    modules = stand_in(fork)
    made = SimpleNamespace(folder=folder, fork=fork, modules=modules, export=folder / "export")
    run_export(made, made.export)
    return made


def run_export(setting: SimpleNamespace, output: Path, *more: str, questions: str = "questions.jsonl") -> None:
    words = ["--package", "fake_fork", "--model-path", str(setting.fork.folder), "--conv-mode", "plain"]
    words += ["--questions", str(setting.folder / questions), "--image-folder", str(setting.folder)]
    added = {f"fake_fork.{name}": module for name, module in setting.modules.items()}
    sys.modules.update({"fake_fork": SimpleNamespace(), "fake_fork.model": SimpleNamespace(), **added})  # type: ignore[arg-type]
    try:
        export_visual_tokens.main([*words, "--output", str(output), "--shard-size", "3", *more])
    finally:
        for name in ("fake_fork", "fake_fork.model", *added):
            del sys.modules[name]


def exported(setting: SimpleNamespace) -> dyvte.MLLM:
    return dyvte.load(setting.fork.folder, exported=setting.export, device="cpu", dtype="float32")


# --------------------------------------------------------------------------------- tests


def test_the_file_stands_alone_and_is_python_3_8() -> None:
    source = Path(export_visual_tokens.__file__).read_text()
    ast.parse(source, feature_version=(3, 8))
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "PIL"}


def test_what_is_written(setting: SimpleNamespace) -> None:
    about = json.loads((setting.export / "export.json").read_text())
    assert about["hidden_size"] == TEXT["hidden_size"]
    assert about["num_samples"] == 4
    assert about["prompt"]["answer"] == [" ", "</s>"]
    with safe_open(setting.export / "shards" / f"{about['shards'][0]}.safetensors", framework="pt") as file:
        ids, positions = file.get_tensor("0.input_ids"), file.get_tensor("0.visual_positions")
        embeddings = file.get_tensor("0.visual_embeddings")
        assert file.get_tensor("0.thumbnail").shape == (12, 20, 3)
        assert "1.visual_embeddings" not in file.keys()  # noqa: SIM118  (the same image as question 0's)
    assert (ids == -200).nonzero().flatten().tolist() == positions.tolist()
    assert embeddings.shape == (16, TEXT["hidden_size"])


@torch.no_grad()
def test_logits_are_those_of_the_fork(setting: SimpleNamespace) -> None:
    mllm, data = exported(setting), ExportedDataset(str(setting.export))
    samples = list(data)
    batch = mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
    assert batch.layout.visual.sum(1).tolist() == [16, 16, 16, 0]
    logits = mllm.model(**batch).logits
    model = setting.modules["model.builder"].load_pretrained_model(None, None, None, None)[1]
    process = setting.modules["mm_utils"]
    for row, (sample, line) in enumerate(zip(samples, QUESTIONS, strict=True)):
        prompt = f"in this image USER: {'<image>' if 'image' in line else ''}\n{line['text']} ASSISTANT:"
        ids = process.tokenizer_image_token(prompt, mllm.tokenizer, -200, "pt")[None]
        if sample.image is None:
            expected = model(input_ids=ids).logits[0]
        else:
            pixels = process.process_images([Image.open(setting.folder / line["image"])], None, None)
            embeddings = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, ids, pixels)[-2]
            expected = model(inputs_embeds=embeddings).logits[0]
        torch.testing.assert_close(logits[row][~batch.layout.padding[row]], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_another_question_about_an_exported_image(setting: SimpleNamespace) -> None:
    """What the prompt is put together to is what the fork would have made of it."""
    mllm, data = exported(setting), ExportedDataset(str(setting.export))
    first, second = data[0], data[1]
    asked = mllm.encode([first.image], [second.question])
    own = mllm.encode([second.image], [second.question])
    assert torch.equal(asked["input_ids"], own["input_ids"])
    torch.testing.assert_close(mllm.model(**asked).logits, mllm.model(**own).logits)


def test_answers_and_generation(setting: SimpleNamespace) -> None:
    mllm, data = exported(setting), ExportedDataset(str(setting.export))
    assert mllm.decode(mllm.answer_ids(["what ?"], ["red"])) == ["red"]
    batch = mllm.encode([data[0].image, None], [data[0].question, "what ?"], padding_side="left")
    full = mllm.generate(batch, max_new_tokens=4)
    with dyvte.FixedExit(mllm.num_layers)(mllm):
        assert mllm.generate(batch, max_new_tokens=4) == full
    with dyvte.FixedExit(0)(mllm) as run:
        mllm.generate(batch, max_new_tokens=4)
        assert run.exit_layers.tolist() == [0, 0]


@pytest.mark.parametrize("policy", [None, dyvte.FixedExit(1), dyvte.FastV(1, 0.5)])
def test_beam_search_leaves_the_batch_as_it_was(setting: SimpleNamespace, policy: Any) -> None:
    """transformers repeats the visual tokens for the beams in place, which a second call would repeat again."""
    mllm, data = exported(setting), ExportedDataset(str(setting.export))
    samples = [data[index] for index in (0, 3, 2)]  # one without an image between two with
    batch = mllm.encode([each.image for each in samples], [each.question for each in samples])
    tokens = batch["mm_encoder_outputs"]["image"].pooler_output
    before = [each.clone() for each in tokens]

    def answers(**settings: Any) -> list[list[int]]:
        with nullcontext() if policy is None else policy(mllm):
            return mllm.generate_ids(batch, max_new_tokens=3, **settings)

    first, greedy = answers(num_beams=2), answers()
    assert answers(num_beams=2) == first
    assert answers() == greedy
    assert all(torch.equal(*pair) for pair in zip(before, tokens, strict=True))
    if policy is None:
        alone = mllm.encode([samples[2].image], [samples[2].question])
        assert mllm.generate_ids(alone, max_new_tokens=3, num_beams=2) == [first[2]]


def test_continues_after_an_interruption(setting: SimpleNamespace, tmp_path: Path) -> None:
    run_export(setting, tmp_path, "--limit", "4")
    before = {file.name: file.read_bytes() for file in (tmp_path / "shards").iterdir()}
    next((tmp_path / "shards").glob("00001-*.safetensors")).unlink()
    with pytest.raises(DataError, match="3 of 4 samples: the export was interrupted"):
        ExportedDataset(str(tmp_path))
    run_export(setting, tmp_path, "--limit", "4")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "shards").iterdir()}


def test_the_language_model_of_another_checkpoint_is_refused(setting: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(setting.export, tmp_path / "export")
    about = json.loads((tmp_path / "export" / "export.json").read_text())
    for row in about["text_embeddings"].values():
        row[0] += 0.1
    (tmp_path / "export" / "export.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="is not the model whose visual tokens are in"):
        dyvte.load(setting.fork.folder, exported=tmp_path / "export", device="cpu")


def test_the_same_start_gives_the_same_weights(setting: SimpleNamespace) -> None:
    """The stand-in for the vision side must not keep a run from being continued."""
    from dyvte.runs.store import model_fingerprint

    assert model_fingerprint(exported(setting)) == model_fingerprint(exported(setting))


def test_wrong_combinations_are_named(setting: SimpleNamespace, tmp_path: Path) -> None:
    mllm = exported(setting)
    with pytest.raises(ModelError, match="sees exported images only"):
        mllm.encode([Image.new("RGB", (8, 8))], ["what ?"])
    with pytest.raises(ModelError, match=r"convert it with `python -m dyvte\.convert"):
        dyvte.load(setting.fork.folder, device="cpu")
    with pytest.raises(DataError, match=r"holds no export\.json"):
        dyvte.load(setting.fork.folder, exported=tmp_path, device="cpu")
    about = json.loads((setting.export / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps({**about, "hidden_size": 8, "num_samples": 0}))
    with pytest.raises(ModelError, match=r"has hidden size 64, the visual tokens in .* have 8"):
        dyvte.load(setting.fork.folder, exported=tmp_path, device="cpu")


def test_a_model_of_another_code_base_is_refused() -> None:
    with pytest.raises(SystemExit, match="has no prepare_inputs_labels_for_multimodal"):
        export_visual_tokens.export(torch.nn.Linear(1, 1), [], lambda question: question, Path("nowhere"), {})


def test_a_prompt_that_the_fork_cuts_is_an_error(setting: SimpleNamespace, tmp_path: Path) -> None:
    model = setting.modules["model.builder"].load_pretrained_model(None, None, None, None)[1]
    before = model.config.max_position_embeddings
    model.config.max_position_embeddings = 20
    try:
        with pytest.raises(ValueError, match="the fork cut the prompt short"):
            run_export(setting, tmp_path / "cut")
    finally:
        model.config.max_position_embeddings = before


def command_settings(setting: SimpleNamespace, tmp_path: Path, model: str = "exported") -> list[str]:
    return [
        f"model={model}",
        f"model.path={setting.fork.folder}",
        f"model.exported={setting.export}",
        "model.dtype=float32",
        "data=exported",
        "device=cpu",
        f"output_dir={tmp_path / 'run'}",
    ]


def test_generate_command(setting: SimpleNamespace, tmp_path: Path) -> None:
    from dyvte.generate import generate

    cfg = compose("generate", [*command_settings(setting, tmp_path), "policy=fixed_exit", "policy.layer=1"])
    assert generate(cfg)["exit_layer"] == 1


def test_stages_command(setting: SimpleNamespace, tmp_path: Path) -> None:
    from analysis.stages import main

    main(compose("stages", [*command_settings(setting, tmp_path), "bootstrap=20", "maps.count=1"]))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_samples"] == 4
    assert len(summary["curves"]["cross"]) == 3


@pytest.fixture(scope="module")
def many(setting: SimpleNamespace) -> SimpleNamespace:
    """The same checkpoint with an export of enough questions to train on."""
    words = ("red", "blue", "green", "square", "circle", "left")
    lines = []
    for number in range(30):
        Image.new("RGB", (20, 12), (8 * number, 30, 200)).save(setting.folder / f"{number}.png")
        word = words[number % len(words)]
        lines.append({"question_id": number, "image": f"{number}.png", "text": f"what is {word} ?", "answer": word})
    (setting.folder / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = SimpleNamespace(**{**vars(setting), "export": setting.folder / "many"})
    run_export(made, made.export, questions="many.jsonl")
    return made


def test_exits_train_and_evaluate_commands(many: SimpleNamespace, tmp_path: Path) -> None:
    """As a configured model (Eagle) and as any other: exits, gates trained on them, and gates evaluated."""
    from analysis.exits import main as exits
    from dyvte.evaluate import evaluate
    from dyvte.train import train

    settings = [*command_settings(many, tmp_path, "eagle_x5_7b"), "batch_size=6"]
    exits(compose("exits", [*settings, "bootstrap=20", "permutations=19", "captions=0", "max_new_tokens=2"]))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"] == "eagle_x5_7b"
    assert summary["num_samples"] == 30
    assert len(summary["accuracy"]) == len(summary["kl"]) == 4
    assert summary["kl"][-1] == 0

    of_train = [f"output_dir={tmp_path}/train", f"labels.dir={tmp_path}/labels", "labels.max_new_tokens=2"]
    fit = ["recipe.training.epochs=1", "validation_share=0.5", "recipe.threshold=0.9"]
    assert train(compose("train", [*command_settings(many, tmp_path), "batch_size=6", *of_train, *fit])) is not None

    common = [*command_settings(many, tmp_path)[:-1], "batch_size=6", "max_new_tokens=2"]
    common += [f"comparison_dir={tmp_path}/compare", f"reference_dir={tmp_path}/reference"]
    gates = ["policy=dynamic_exit", f"policy.gates={tmp_path}/train/gates"]
    found = evaluate(compose("evaluate", [*common, *gates]))
    assert found is not None
    assert found["num_questions"] == 30
    assert 0 <= found["accuracy"] <= 1

    calibrated = ["policy=vtw", "policy.calibrate.eta=100", "policy.calibrate.start=1"]
    found = evaluate(compose("evaluate", [*common, *calibrated, "data@calibration.data=exported"]))
    assert found is not None
    assert found["mean_exit_layer"] == 1  # any divergence is small enough
