"""The plug-in of lmms-eval against stand-ins of its base classes; `make test-lmms-eval` runs the real ones."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest
import torch
from PIL import Image
from test_video import FilmProcessor

import dyvte
from dyvte.batch import Batch
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError
from dyvte.mllm import MLLM
from dyvte.plugins.chat_media import read_chat


@dataclass
class TokenCounts:
    output_tokens: int
    input_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


@dataclass
class Instance:
    args: tuple[Any, ...]


@dataclass
class Lmms:
    task_dict: dict[str, Any] = field(default_factory=dict)
    cache_hook: Any = field(default_factory=lambda: SimpleNamespace(add_partial=lambda *_: None))


@dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@pytest.fixture(scope="module")
def small() -> MLLM:
    """A random LLaVA with a processor whose template has text and images in their order."""
    return MLLM(families.FAMILIES["llava"](num_layers=6).model, families.processor_for("llava"))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plug-in's module; what it would log is `plugin.logged`, what it would warn of `plugin.warned`."""
    logged: list[dict[str, Any]] = []
    warned: list[str] = []
    contents: dict[str, dict[str, Any]] = {
        "loguru": {"logger": SimpleNamespace(warning=warned.append)},
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.models": {},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.api.instance": {
            "GenerationResult": GenerationResult, "Instance": Instance, "TokenCounts": TokenCounts
        },
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda **told: logged.append(told)},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }  # fmt: skip
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dyvte.plugins.lmms_eval", raising=False)
    found = importlib.import_module("dyvte.plugins.lmms_eval")
    vars(found).update(logged=logged, warned=warned)
    yield found
    sys.modules.pop("dyvte.plugins.lmms_eval", None)


def turns(*images: Any, text: str) -> list[dict[str, Any]]:
    """A user's turn as lmms-eval has it."""
    return [
        {
            "role": "user",
            "content": [*({"type": "image", "url": each} for each in images), {"type": "text", "text": text}],
        }
    ]


SAMPLES = list(ShapesDataset("test", 3))
SHOWN = [SAMPLES[0].image, SAMPLES[1].image]
CHATS = [
    turns(SAMPLES[0].image, text=f"<image> {SAMPLES[0].question}"),
    turns(*SHOWN, text=SAMPLES[1].question),
    [
        *turns(SAMPLES[2].image, text=SAMPLES[2].question),
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        *turns(SAMPLES[0].image, text=SAMPLES[0].question),
    ],
]
CHATS.append(
    [{"role": "user", "content": [part for image in SHOWN for part in turns(image, text="what ?")[0]["content"]]}]
)
"""One image, several, an earlier turn with another, and text between two."""


def asked(chats: list[Any], settings: dict[str, Any] | None = None) -> list[Instance]:
    """Requests about conversations, or about what raises when it is asked for."""

    def messages(index: int) -> Any:
        if isinstance(chats[index], Exception):
            raise chats[index]
        return chats[index]

    given = settings or {"max_new_tokens": 3, "until": ["zz"]}
    return [Instance((f"question {index}", messages, given, index, "shapes", "test")) for index in range(len(chats))]


def loaded(plugin: Any, mllm: MLLM, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """The plug-in's model."""
    monkeypatch.setattr(plugin, "load", lambda *_, **__: mllm)
    model = plugin.Dyvte(device="cpu", **settings)
    model.task_dict = {"shapes": {"test": range(100)}}
    return model


@pytest.mark.parametrize(
    ("policy", "settings"), [("fixed_exit", {"layer": 4}), ("fastv", {"keep": 0.5}), ("fastervlm", {"keep": 0.25})]
)
def test_answers_and_costs_are_those_of_the_policy(
    plugin: Any,
    policy: str,
    settings: dict[str, float],
    tmp_path: Path,
    small: MLLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = str(tmp_path / "log.jsonl")
    model = loaded(plugin, small, monkeypatch, policy=policy, batch_size=2, log_file=log, **settings)
    found = model.generate_until(asked(CHATS))
    classes = {"fixed_exit": dyvte.FixedExit, "fastv": dyvte.FastV, "fastervlm": dyvte.FasterVLM}
    for index, result in enumerate(found):
        batch = small.encode_chats([read_chat(CHATS[index], "here", 4)])
        with classes[policy](**settings)(small):
            ids = small.generate_ids(batch, max_new_tokens=3)
        assert result.text == small.decode(ids)[0]
        assert result.token_counts == TokenCounts(len(ids[0]), batch["input_ids"].shape[1])
    notes = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted(note["doc_id"] for note in notes) == list(range(len(CHATS)))
    depth = 4 if policy == "fixed_exit" else small.num_layers
    assert {note["exit_layer"] for note in notes} == {depth}
    assert plugin.logged[0]["additional_metrics"]["mean_exit_layer"] == depth
    assert plugin.manifest().chat_class_path == "dyvte.plugins.lmms_eval.Dyvte"
    assert not model.is_simple


def test_beams_leave_with_their_question(plugin: Any, small: MLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(plugin, small, monkeypatch, policy="fixed_exit", layer=4, batch_size=2)
    settings = {"max_new_tokens": 2, "num_beams": 2, "until": None, "temperature": None, "top_p": None}
    requests = asked(CHATS[:2], settings)
    with dyvte.FixedExit(4)(small):
        ids = small.generate_ids(
            small.encode_chats([read_chat(chat, "here", 4) for chat in CHATS[:2]]), max_new_tokens=2, num_beams=2
        )
    assert [each.text for each in model.generate_until(requests)] == small.decode(ids)
    assert plugin.logged[0]["additional_metrics"]["mean_exit_layer"] == 4


def test_a_bad_request_is_named_and_the_others_are_answered(
    plugin: Any, tmp_path: Path, small: MLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by its task, by us or by the processor; a batch with one is answered like a batch without it."""
    log = tmp_path / "log.jsonl"
    model = loaded(plugin, small, monkeypatch, policy="fixed_exit", layer=4, batch_size=3, log_file=str(log))
    film = [{"role": "user", "content": [{"type": "video", "url": SHOWN}, {"type": "text", "text": "what ?"}]}]
    chats = [CHATS[0], turns("data:image/png;base64,AAAA", text="what ?"), CHATS[1], KeyError("answer"), film]
    found = model.generate_until(asked(chats))
    causes = ("unreadable", "KeyError: 'answer'", "reads no videos")
    named = {number: f"task shapes, document {number}: " for number in (1, 3, 4)}
    for warned, start, cause in zip(plugin.warned, named.values(), causes, strict=True):
        assert warned.startswith(start)
        assert cause in warned
    expected = ["", "", "", "", ""]
    with dyvte.FixedExit(4)(small):
        for index in (0, 2):
            batch = small.encode_chats([read_chat(chats[index], "here", 4)])
            expected[index] = small.generate(batch, max_new_tokens=3)[0]
    assert [each.text for each in found] == expected
    notes = {note["doc_id"]: note for note in map(json.loads, log.read_text().splitlines())}
    assert {number: note["error"][: len(named[number])] for number, note in notes.items() if "error" in note} == named
    assert plugin.logged[0]["additional_metrics"]["unanswered"] == 3
    assert plugin.logged[0]["additional_metrics"]["mean_exit_layer"] == 4
    monkeypatch.setattr(plugin, "GIVE_UP_AFTER", 2)
    model = loaded(plugin, small, monkeypatch)
    with pytest.raises(ConfigError, match=r"first 2 requests.*document 0: .*unreadable"):
        model.generate_until(asked([chats[1], chats[3], chats[0]]))


def test_what_a_policy_lacks_is_calibrated(
    plugin: Any, tmp_path: Path, small: MLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"policy": "vtw", "calibration.data.limit": 2, "policy.calibrate.start": 5}
    model = loaded(plugin, small, monkeypatch, log_file=str(tmp_path / "log.jsonl"), **settings, count_flops=False)
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert (model.policy.layer, found["num_samples"]) == (found["found"]["layer"], 2)
    assert len(model.generate_until(asked(CHATS[:1]))) == 1
    assert "mean_prefill_flops" not in plugin.logged[0]["additional_metrics"]
    with pytest.raises(ConfigError, match="no_such_policy"):
        loaded(plugin, small, monkeypatch, policy="no_such_policy")


def test_videos_are_answered_where_the_family_takes_them(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = MLLM(families.FAMILIES["qwen2_5_vl"](num_layers=2).model, FilmProcessor())
    frames = [Image.new("RGB", (4, 4), (40 * number, 0, 0)) for number in range(6)]
    ask = {"type": "text", "text": "what ?"}
    chats = [[{"role": "user", "content": [{"type": "video", "url": frames[start:]}, ask]}] for start in (0, 1)]
    model = loaded(plugin, mllm, monkeypatch, policy="fastv", layer=1, keep=0.5, batch_size=2, max_num_frames=3)
    found = model.generate_until(asked(chats))
    for chosen, result in zip(([0, 2, 5], [1, 3, 5]), found, strict=True):
        film = {"type": "video", "video": [frames[number] for number in chosen]}
        batch = mllm.encode_chats([[{"role": "user", "content": [film, ask]}]])
        with dyvte.FastV(layer=1, keep=0.5)(mllm):
            assert result.text == mllm.generate(batch, max_new_tokens=3)[0]


def test_media_of_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.arange(10)[:, None, None, None] * np.ones((10, 2, 2, 3))
    video = {"role": "user", "content": [{"type": "video", "url": frames}]}
    (message,) = read_chat([video], "here", 4)
    assert [int(frame[0, 0, 0]) for frame in message["content"][0]["video"]] == [0, 3, 6, 9]
    (message,) = read_chat(turns(Image.new("L", (4, 4)), text="<image>\nwhat ?"), "here", 4)
    assert message["content"][0]["image"].mode == "RGB"
    assert message["content"][1]["text"].strip() == "what ?"
    with pytest.raises(ConfigError, match="task t, document 3: holds audio"):
        read_chat([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], "task t, document 3", 4)
    read: list[Any] = []
    monkeypatch.setattr("dyvte.plugins.chat_media.read_video", lambda *given: read.append(given))
    cut = [{"url": "a.mp4", "start_time": 1.5}, {"url": {"path": "b.mp4", "video_start": 2, "video_end": 3.5}}]
    read_chat([{"role": "user", "content": [{"type": "video", **each} for each in cut]}], "here", 4)
    assert read == [("a.mp4", 4, "here", (1.5, None)), ("b.mp4", 4, "here", (2, 3.5))]
    with pytest.raises(ConfigError, match="shows int; dyvte reads files of videos"):
        read_chat([{"role": "user", "content": [{"type": "video", "url": 7}]}], "here", 4)
    with pytest.raises(ConfigError, match="shows int"):
        read_chat(turns(7, text="?"), "task t", 4)


def test_conversations_without_turns_are_questions(shapes: MLLM) -> None:
    chats = [read_chat(turns(each.image, text=each.question), "here", 4) for each in SAMPLES]
    batch = shapes.encode_chats(chats)
    same = shapes.encode([each.image for each in SAMPLES], [each.question for each in SAMPLES])
    assert batch.layout == same.layout
    assert batch.images == same.images
    assert all(torch.equal(batch[name], value) for name, value in same.items())
    both = shapes.encode_chats([read_chat(chat, "here", 4) for chat in CHATS])
    assert both.images == (1, 2, 2, 2)
    text = shapes.tokenizer.decode(both["input_ids"][2][both.layout.text[2]])
    assert text.count("USER:") == 2
    assert text.index("yes") < text.rindex("USER:")
    assert images_apart(both)[2] == 2, "an image of an earlier turn stays where it was"


def test_text_stays_between_images(small: MLLM) -> None:
    """Where the template has them in order; LLaVA's own puts the images of a turn first."""
    assert images_apart(small.encode_chats([read_chat(chat, "here", 4) for chat in CHATS])) == [1, 1, 2, 2]


def images_apart(batch: Batch) -> list[int]:
    """Of every row, how many runs of visual tokens it has."""
    return batch.layout.visual.int().diff(dim=1).eq(1).sum(1).tolist()
