"""Loading, wrapping and feeding models: parts are found, prompts come out right, errors say what to do in one line."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from families import (
    BOS,
    EOS,
    FAMILIES,
    IMAGE_TOKEN,
    PROCESSOR_FAMILIES,
    build,
    processor_for,
    random_batch,
)
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

import dyvte
from dyvte.errors import ModelError
from dyvte.loading import SHIPPED_MODELS, _explain
from dyvte.mllm import MLLM
from dyvte.runs.config import compose, load_model

RED = Image.new("RGB", (9, 7), (255, 0, 0))
GREEN = Image.new("RGB", (8, 8), (0, 255, 0))


def with_processor(family: str, chat_template: bool = True) -> MLLM:
    return dyvte.wrap(build(family, num_layers=2).model, processor_for(family, chat_template))


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    build("llava", num_layers=2).model.save_pretrained(folder)
    processor_for("llava").save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------- wrapping


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found(family: str) -> None:
    mllm = FAMILIES[family](num_layers=3)
    config = mllm.model.config
    assert (
        mllm.num_layers == len(mllm.layers) == len(mllm.attentions) == config.get_text_config().num_hidden_layers == 3
    )
    assert mllm.image_token_id == IMAGE_TOKEN
    assert mllm.visual_token_ids[0] == IMAGE_TOKEN
    assert mllm.hidden_size == config.get_text_config().hidden_size
    assert mllm.lm_head is mllm.model.get_output_embeddings()
    assert not mllm.model.training
    assert mllm.dtype == torch.float32
    assert mllm.processor is mllm.tokenizer is None
    called: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, index=index: called.append(index))
        for index, layer in enumerate(mllm.layers)
    ]
    with torch.no_grad():
        mllm.model(**random_batch(mllm, torch.Generator().manual_seed(0)))
    for handle in handles:
        handle.remove()
    assert called == [0, 1, 2]
    norm = [name for name, _ in mllm.decoder.named_children()]
    assert "layers" in norm
    assert "norm" in norm


def test_decoder_is_found_below_a_causal_lm() -> None:
    """Some models return a whole causal LM from get_decoder()."""
    mllm = build("llava", num_layers=2)
    causal_lm = torch.nn.Module()
    causal_lm.model = mllm.decoder
    mllm.model.get_decoder = lambda: causal_lm
    again = dyvte.wrap(mllm.model)
    assert again.decoder is mllm.decoder
    assert again.layers is mllm.layers


def test_decoder_is_told_from_a_vision_tower_of_the_same_depth() -> None:
    mllm = build("llava", num_layers=2)  # the vision tower has two layers too
    mllm.model.get_decoder = lambda: mllm.model
    assert dyvte.wrap(mllm.model).decoder is mllm.decoder


def test_models_that_do_not_fit_are_refused_in_one_line() -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    text_only = LlamaForCausalLM(config)
    with pytest.raises(ModelError, match="has no image side") as error:
        dyvte.wrap(text_only)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="Linear is not a transformers model"):
        dyvte.wrap(torch.nn.Linear(1, 1))
    crossing = build("llava", num_layers=2).model
    crossing.get_decoder().layers[1].cross_attn = torch.nn.Identity()
    with pytest.raises(ModelError, match="cross-attention"):
        dyvte.wrap(crossing)


# ---------------------------------------------------------------------------- batches


def test_batch_needs_ids() -> None:
    with pytest.raises(ValueError, match="needs input_ids"):
        build("llava").batch(inputs_embeds=torch.zeros(1, 2, 64))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_padding_side_can_be_changed(family: str) -> None:
    mllm = FAMILIES[family](num_layers=2)
    right = random_batch(mllm, torch.Generator().manual_seed(0), (1, 2, 0), "right")
    left = random_batch(mllm, torch.Generator().manual_seed(0), (1, 2, 0), "left")
    moved = right.left_padded()
    assert torch.equal(moved.layout.roles, left.layout.roles)
    for name in left:
        assert torch.equal(moved[name], left[name]), name
    assert torch.equal(left.right_padded().layout.roles, right.layout.roles)
    assert left.left_padded() is left


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_does_not_depend_on_padding(family: str) -> None:
    mllm = FAMILIES[family](num_layers=2)
    rows = [random_batch(mllm, torch.Generator().manual_seed(seed), (1,), question_length=3 + seed) for seed in (0, 4)]
    alone = [mllm.generate(row, max_new_tokens=5)[0] for row in rows]
    for side in ("left", "right"):
        generator = torch.Generator().manual_seed(0)
        batch = random_batch(mllm, generator, (1, 1), side, question_length=[3, 7])
        together = mllm.generate(batch, max_new_tokens=5)
        assert together[0] == alone[0]
        assert all(len(ids) == 5 or ids[-1] == EOS for ids in together)


def test_generated_ids_end_with_the_end_token() -> None:
    mllm = FAMILIES["llava"](num_layers=2)
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 0))
    ids = mllm.generate(batch, max_new_tokens=6)
    mllm.model.generation_config.eos_token_id = ids[0][2]
    shorter = mllm.generate(batch, max_new_tokens=6)
    first_end = ids[0].index(ids[0][2])
    assert shorter[0] == ids[0][: first_end + 1]


def test_answers_are_teacher_forced_behind_the_prompt() -> None:
    mllm = FAMILIES["qwen2_5_vl"](num_layers=2)
    for side in ("left", "right"):
        batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 2), side)
        answers = torch.tensor([[5, 6, 7], [8, -100, -100]])
        forced = mllm.append_answers(batch, answers)
        assert forced.layout.answer.sum(1).tolist() == [3, 1]
        for row, expected in enumerate(([5, 6, 7], [8])):
            assert forced["input_ids"][row][forced.layout.answer[row]].tolist() == expected
            assert forced["attention_mask"][row][forced.layout.answer[row]].all()
        prompt = forced.layout.last_prompt
        assert (forced.layout.answer.int().argmax(1) == prompt + 1).all()
        with torch.no_grad():
            before = mllm.model(**batch).logits[torch.arange(2), batch.layout.last_prompt]
            after = mllm.model(**forced).logits[torch.arange(2), prompt]
        torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="without answers"):
            mllm.generate(forced)


# --------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", PROCESSOR_FAMILIES)
def test_encode_mixes_one_several_and_no_images(family: str, padding_side: str) -> None:
    mllm = with_processor(family)
    images = [RED, [RED, GREEN], None]
    questions = ["what color is the square ?", "red or blue ?", "what ?"]
    batch = mllm.encode(images, questions, padding_side=padding_side)
    layout = batch.layout
    assert layout.has_image.tolist() == [True, True, False]
    assert layout.visual[1].sum() > layout.visual[0].sum()
    padded = layout.padding[2]
    assert padded.any()
    assert padded[0] == (padding_side == "left")
    for row, question in enumerate(questions):
        kept = batch["input_ids"][row][layout.text_status_positions[row]]
        assert question.split()[0] in mllm.tokenizer.decode(kept)
        assert (batch["input_ids"][row] == BOS).sum() == 1
    with torch.no_grad():
        logits = mllm.model(**batch).logits
    for row in range(3):  # every row alone gives the same
        single = mllm.encode([images[row]], [questions[row]])
        with torch.no_grad():
            alone = mllm.model(**single).logits[0, -1]
        torch.testing.assert_close(logits[row, layout.last_prompt[row]], alone, atol=1e-3, rtol=1e-3)
    texts = mllm.generate(batch, max_new_tokens=3)
    assert all(isinstance(text, str) for text in texts)
    assert len(texts) == 3


def test_llava_prompt_where_there_is_no_chat_template() -> None:
    mllm = with_processor("llava", chat_template=False)
    batch = mllm.encode([RED], ["what color ?"])
    text = mllm.tokenizer.decode(batch["input_ids"][0][~batch.layout.visual[0]])
    assert text == "<s> USER : what color ? ASSISTANT :"
    assert mllm._prompt("what color ?", ["image"]) == "USER: <image>\nwhat color ? ASSISTANT:"
    other = with_processor("gemma3")
    other.processor.chat_template = None
    with pytest.raises(
        dyvte.ModelError, match=r"no chat template, so how gemma3 is asked is unknown: put the chat_template"
    ):
        other.encode([RED], ["what color ?"])


def test_encode_with_answers() -> None:
    mllm = with_processor("llava")
    batch = mllm.encode([RED, GREEN], ["what color ?", "what is this ?"], answers=["red", "the green square"])
    for row, words in enumerate(("red", "the green square")):
        ids = batch["input_ids"][row][batch.layout.answer[row]]
        assert mllm.tokenizer.decode(ids[:-1]) == words
        assert ids[-1] == EOS
    assert mllm.answer_ids(["what color ?"], ["red"]).shape == (1, 2)


def test_question_before_the_image_is_warned_about() -> None:
    mllm = with_processor("llava")
    mllm.processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %} <image> assistant :{% endfor %}"
    )
    with pytest.warns(UserWarning, match="puts the question before the image"):
        mllm.encode([RED], ["what color ?"])


def test_an_image_that_does_not_reach_the_prompt_is_an_error() -> None:
    mllm = with_processor("llava")
    mllm.processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises((ModelError, ValueError)):
        mllm.encode([RED], ["what color ?"])


def test_wrong_arguments_of_encode() -> None:
    mllm = with_processor("llava")
    with pytest.raises(ValueError, match="got 1 entries of images for 2 questions"):
        mllm.encode([RED], ["a", "b"])
    with pytest.raises(TypeError, match="list of strings"):
        mllm.encode([RED], "what ?")
    with pytest.raises(ModelError, match="has no processor"):
        build("llava").encode([RED], ["what ?"])


# --------------------------------------------------------------------------- loading


def test_load_from_a_folder(llava_folder: Path) -> None:
    mllm = dyvte.load(llava_folder, device="cpu")
    same = AutoModelForImageTextToText.from_pretrained(llava_folder)
    processor = AutoProcessor.from_pretrained(llava_folder)
    assert type(mllm.processor) is type(processor)
    batch = mllm.encode([RED, None], ["what color ?", "what ?"])
    with torch.no_grad():
        assert torch.equal(mllm.model(**batch).logits, same(**batch).logits)
    assert len(mllm.generate(batch, max_new_tokens=2)) == 2


def test_settings_are_handed_through(llava_folder: Path) -> None:
    mllm = dyvte.load(str(llava_folder), dtype="bfloat16", attn_implementation="eager", device="cpu")
    assert mllm.dtype == torch.bfloat16
    assert mllm.text_config._attn_implementation == "eager"
    batch = mllm.encode([RED], ["what color ?"])
    assert batch["pixel_values"].dtype == torch.bfloat16
    spread = dyvte.load(llava_folder, device_map="cpu")
    assert spread.device.type == "cpu"


def test_folder_without_processor_still_loads(llava_folder: Path, tmp_path: Path) -> None:
    build("llava", num_layers=2).model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"only batch\(\) will work"):
        mllm = dyvte.load(tmp_path, device="cpu")
    assert mllm.processor is None
    mllm.model(**random_batch(mllm, torch.Generator().manual_seed(0)))


def test_old_checkpoints_get_their_patch_size(llava_folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(llava_folder)
    processor = processor_for("llava")
    complete = dyvte.wrap(model, copy.deepcopy(processor)).encode([RED], ["what color ?"])
    processor.patch_size = processor.vision_feature_select_strategy = None
    processor.num_additional_image_tokens = 0
    processor.tokenizer.pad_token = None
    repaired = dyvte.wrap(model, processor).encode([RED], ["what color ?"])
    assert torch.equal(complete["input_ids"], repaired["input_ids"])


def error_of(name: str | Path, **kwargs: Any) -> str:
    start = time.monotonic()
    with pytest.raises(ModelError) as error:
        dyvte.load(name, **kwargs)
    assert time.monotonic() - start < 20
    message = str(error.value)
    assert "\n" not in message
    assert str(name) in message
    assert error.value.__cause__ is None
    return message


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, llava_folder: Path) -> None:
    assert "no such folder" in error_of("./nowhere")
    assert "no such folder" in error_of("/nowhere/at/all")
    assert "holds no config.json" in error_of(tmp_path)
    weightless = write_config(tmp_path / "weightless", **json.loads((llava_folder / "config.json").read_text()))
    assert "weights are missing" in error_of(weightless)
    text_only = write_config(tmp_path / "text", model_type="llama", architectures=["LlamaForCausalLM"])
    assert "'llama' is not an image-text-to-text model" in error_of(text_only)
    custom = write_config(
        tmp_path / "custom", model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForImageTextToText": "m.M"}
    )
    assert "set trust_remote_code=true (on the command line model.trust_remote_code=true" in error_of(custom)
    assert "unknown_type" in error_of(write_config(tmp_path / "unknown", model_type="unknown_type"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    error_of(tmp_path / "broken")


def test_offline_with_nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = error_of("llava-hf/llava-1.5-7b-hf")
    assert "cannot be reached and nothing is cached" in message
    assert "hf download llava-hf/llava-1.5-7b-hf`" in message
    assert "hf download llava-hf/llava-1.5-7b-hf --revision v1`" in error_of("llava-hf/llava-1.5-7b-hf", revision="v1")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached_model(llava_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Hub id of a model whose branch main is in a cache, and no network."""
    repository = tmp_path / "models--owner--name"
    shutil.copytree(llava_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return "owner/name"


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_run_names_the_commit_that_was_loaded(cached_model: str, revision: str | None) -> None:
    asked = [] if revision is None else [f"model.revision={revision}"]
    cfg = compose("stages", ["model=hf", f"model.path={cached_model}", "device=cpu", *asked])
    assert load_model(cfg).commit == COMMIT
    assert cfg.model.revision == COMMIT  # which config.yaml and the report's command take from here


def test_a_model_from_a_folder_has_no_commit(llava_folder: Path) -> None:
    cfg = compose("stages", ["model=hf", f"model.path={llava_folder}", "device=cpu"])
    assert load_model(cfg).commit is None
    assert cfg.model.revision is None


def test_no_network_is_found_out_with_one_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requests = []

    def refuse(name: str, **kwargs: Any) -> None:
        requests.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    assert "cannot be reached" in error_of("llava-hf/llava-1.5-7b-hf")
    assert requests == ["llava-hf/llava-1.5-7b-hf"]


def test_a_gated_model_asks_for_a_login() -> None:
    assert "hf auth login" in _explain(OSError("You are trying to access a gated repo.\nMake sure to have access"))


def test_a_gated_model_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **kwargs: Any) -> None:
        raise GatedRepoError.__new__(GatedRepoError)  # a kind of RepositoryNotFoundError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    message = error_of("google/gemma-3-4b-it")
    assert "it is gated; accept its terms on its Hub page, then run `hf auth login`" in message


def test_shipped_model_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SHIPPED_MODELS, "llava_shapes", tmp_path / "weights")
    assert "dyvte.testbed.train" in error_of("llava_shapes")


# ------------------------------------------------------------------------- the package


def test_importing_the_package_is_cheap_and_names_come_when_used() -> None:
    code = (
        "import sys, dyvte; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; "
        "assert 'FixedExit' in dir(dyvte); import os; assert os.environ['OMP_WAIT_POLICY'] == sys.argv[1]"
    )
    # Waiting threads sleep unless the user says otherwise.
    unset = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for policy, given in (("PASSIVE", {}), ("ACTIVE", {"OMP_WAIT_POLICY": "ACTIVE"})):
        command = [sys.executable, "-c", code, policy]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env={**unset, **given})
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dyvte.nonsense  # noqa: B018
