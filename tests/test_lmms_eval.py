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

import numpy as np
import pytest
import torch
from PIL import Image

import dyvte
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError
from dyvte.mllm import MLLM
from dyvte.plugins.chat_media import read_chat


@dataclass
class TokenCounts:
    output_tokens: int


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


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plug-in's module; what it would log is `plugin.logged`."""
    logged: list[dict[str, Any]] = []
    contents: dict[str, dict[str, Any]] = {
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
    vars(found)["logged"] = logged
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
"""One image, several, and an earlier turn with another."""


@pytest.mark.parametrize(
    ("policy", "settings"), [("fixed_exit", {"layer": 4}), ("fastv", {"keep": 0.5}), ("fastervlm", {"keep": 0.25})]
)
def test_answers_and_costs_are_those_of_the_policy(
    plugin: Any,
    policy: str,
    settings: dict[str, float],
    tmp_path: Path,
    shapes: MLLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "load", lambda *_, **__: shapes)
    model = plugin.Dyvte(policy=policy, batch_size=2, device="cpu", log_file=str(tmp_path / "log.jsonl"), **settings)
    model.task_dict = {"shapes": {"test": list(range(3))}}
    requests = [
        Instance(
            (f"question {index}", CHATS.__getitem__, {"max_new_tokens": 3, "until": ["zz"]}, index, "shapes", "test")
        )
        for index in range(3)
    ]
    found = model.generate_until(requests)
    classes = {"fixed_exit": dyvte.FixedExit, "fastv": dyvte.FastV, "fastervlm": dyvte.FasterVLM}
    for index, result in enumerate(found):
        batch = shapes.encode_chats([read_chat(CHATS[index], "here", 4)])
        with classes[policy](**settings)(shapes):
            ids = shapes.generate_ids(batch, max_new_tokens=3)
        assert result.text == shapes.decode(ids)[0]
        assert result.token_counts.output_tokens == len(ids[0])
    notes = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted(note["doc_id"] for note in notes) == [0, 1, 2]
    depth = 4 if policy == "fixed_exit" else shapes.num_layers
    assert {note["exit_layer"] for note in notes} == {depth}
    assert plugin.logged[0]["additional_metrics"]["mean_exit_layer"] == depth
    assert plugin.manifest().chat_class_path == "dyvte.plugins.lmms_eval.Dyvte"
    assert not model.is_simple


def test_beams_leave_with_their_question(plugin: Any, shapes: MLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "load", lambda *_, **__: shapes)
    model = plugin.Dyvte(policy="fixed_exit", layer=4, batch_size=2, device="cpu")
    model.task_dict = {"shapes": {"test": [0, 1]}}
    asked = {"max_new_tokens": 2, "num_beams": 2, "until": None, "temperature": None, "top_p": None}
    requests = [Instance((f"question {index}", CHATS.__getitem__, asked, index, "shapes", "test")) for index in (0, 1)]
    with dyvte.FixedExit(4)(shapes):
        ids = shapes.generate_ids(
            shapes.encode_chats([read_chat(chat, "here", 4) for chat in CHATS[:2]]), max_new_tokens=2, num_beams=2
        )
    assert [each.text for each in model.generate_until(requests)] == shapes.decode(ids)
    assert plugin.logged[0]["additional_metrics"]["mean_exit_layer"] == 4


def test_media_of_a_conversation() -> None:
    frames = np.arange(10)[:, None, None, None] * np.ones((10, 2, 2, 3))
    video = {"role": "user", "content": [{"type": "video", "url": frames}]}
    (message,) = read_chat([video], "here", 4)
    assert [int(frame[0, 0, 0]) for frame in message["content"][0]["video"]] == [0, 3, 6, 9]
    (message,) = read_chat(turns(Image.new("L", (4, 4)), text="<image>\nwhat ?"), "here", 4)
    assert message["content"][0]["image"].mode == "RGB"
    assert message["content"][1]["text"].strip() == "what ?"
    with pytest.raises(ConfigError, match="task t, document 3: holds audio"):
        read_chat([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], "task t, document 3", 4)
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
    assert both.images == (1, 2, 2)
    text = shapes.tokenizer.decode(both["input_ids"][2][both.layout.text[2]])
    assert text.count("USER:") == 2
    assert text.index("yes") < text.rindex("USER:")
    first = both.layout.visual[2].int().diff().eq(1).sum()
    assert int(first) == 2, "an image of an earlier turn stays where it was"
