"""The testbed's trainer: packing changes nothing, resuming changes nothing, the export loads with transformers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from transformers import AutoModelForImageTextToText, AutoProcessor

from dyvte.errors import ConfigError
from dyvte.runs.config import compose
from dyvte.testbed.model import TestbedSizes, build_model
from dyvte.testbed.packing import IGNORE, Branch, pack
from dyvte.testbed.train import export, train
from dyvte.testbed.training import forward, loop
from dyvte.testbed.training.batches import Batches, phases
from dyvte.testbed.training.forward import (
    fast_training,
    hidden_states,
    packed_accuracy,
    packed_loss,
    visual_features,
)
from dyvte.testbed.training.loop import learning_rate

TINY = [
    "sizes.layers=2", "sizes.width=32", "sizes.heads=2", "sizes.mlp_width=48", "sizes.vision_layers=1",
    "sizes.vision_width=32", "sizes.vision_heads=2", "sizes.patch_size=16", "precision=fp32", "validation_scenes=4",
    "language.batch_size=2", "language.steps=4", "vision.batch_size=2", "vision.steps=4", "align.batch_size=2",
    "align.steps=4", "instruct.batch_size=2", "instruct.steps=4", "instruct.questions=4", "instruct.length=200",
    "language.checkpoint_every=2", "vision.checkpoint_every=2", "align.checkpoint_every=2",
    "instruct.checkpoint_every=2", "language.eval_every=2", "vision.eval_every=4", "align.eval_every=4",
    "instruct.eval_every=4", "instruct.phases=[]", "workers=0",
]  # fmt: skip
SIZES = TestbedSizes(16, 1, 32, 2, 2, 32, 2, 48)


def config(*overrides: str) -> DictConfig:
    return compose("testbed", [*TINY, *overrides])


def test_a_packed_batch_gives_each_question_the_loss_it_has_alone() -> None:
    cfg = config("instruct.questions=6", "instruct.length=220")
    model, batches = build_model(SIZES, seed=1), Batches(cfg, SIZES)
    batch, images = batches.instruct(0, 1.0, 2)
    assert images is not None
    with torch.no_grad():
        packed = hidden_states(model, model.model.language_model, batch, visual_features(model, images))
        checked = 0
        for row, number in batch.kinds:
            keep = (batch.branch[row] == 0) | (batch.branch[row] == number)
            alone = model(input_ids=batch.input_ids[row, keep][None], pixel_values=images[row][None])
            mine = (batch.branch[row] == number) & (batch.labels[row] != IGNORE)
            expected = alone.logits[0][(mine)[keep]]
            torch.testing.assert_close(model.lm_head(packed[row, mine]), expected, atol=1e-5, rtol=1e-5)
            checked += 1
    assert checked >= 8


def test_labels_are_the_next_token_of_the_same_branch() -> None:
    rows = [([1, 2, 3], [Branch("a", [10, 11], [12, 13]), Branch("b", [20], [21, 22]), Branch("c", [9] * 9, [8])])]
    batch = pack(rows, length=12, pad_id=0)
    assert batch.kinds == {(0, 1): "a", (0, 2): "b"}  # the third does not fit
    assert batch.input_ids[0].tolist() == [1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 0, 0]
    assert batch.position_ids[0, :10].tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5]
    assert {i: int(v) for i, v in enumerate(batch.labels[0]) if v != IGNORE} == {4: 12, 5: 13, 7: 21, 8: 22}
    language = pack(rows, length=12, pad_id=0, prompt_weight=0.1, prefix_weight=0.1)
    assert {i: int(v) for i, v in enumerate(language.labels[0]) if v != IGNORE} == {
        0: 2, 1: 3, 3: 11, 4: 12, 5: 13, 7: 21, 8: 22,
    }  # fmt: skip
    assert language.weights[0, :9].tolist() == pytest.approx([0.1, 0.1, 0, 0.1, 1, 1, 0, 1, 1])
    with pytest.raises(ValueError, match="prefix of 3 tokens does not fit"):
        pack(rows, length=2, pad_id=0)


def test_fast_attention_is_attention_and_is_taken_away_again() -> None:
    model, batches = build_model(SIZES, seed=1), Batches(config(), SIZES)
    batch, images = batches.instruct(0, 1.0, 2)
    losses = []
    for fast in (False, True):
        context = fast_training(torch.device("cpu"), "fp32") if fast else torch.no_grad()
        with context:
            states = hidden_states(model, model.model.language_model, batch, visual_features(model, images))
        losses.append(packed_loss(model, states, batch).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert "sdpa" not in forward.ALL_ATTENTION_FUNCTIONS._local_mapping, "the library's own is back"


def test_packed_accuracy_counts_whole_answers() -> None:
    model, batches = build_model(SIZES, seed=1), Batches(config(), SIZES)
    batch, images = batches.validation(6)
    found = packed_accuracy(model, batch, images, chunk=4)
    assert set(found) == set(batch.kinds.values())
    with torch.no_grad():  # a model that always says what the label says
        states = hidden_states(model, model.model.language_model, batch, visual_features(model, images))
        logits = model.lm_head(states)
    right = [
        bool((logits[row].argmax(-1) == batch.labels[row])[(batch.branch[row] == n) & (batch.weights[row] == 1)].all())
        for row, n in batch.kinds
    ]
    mean = sum(found[k] * sum(v == k for v in batch.kinds.values()) for k in found) / len(batch.kinds)
    assert mean == pytest.approx(sum(right) / len(right))


class Killed(Exception):
    pass


PHASES = [
    "instruct.phases=[find,follow]", "phases.find.settings.steps=2",
    "phases.find.settings.warmup=0.5", "phases.find.settings.decay=0.5", "phases.find.settings.look_ups=3",
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("language", []), ("vision", []), ("align", []), ("instruct", []), ("instruct", PHASES)],
    ids=["language", "vision", "align", "instruct", "phases"],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    stage: str, changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(f"stages=[{stage}]", *changes)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    train(cfg, tmp_path / "whole")
    schedule = learning_rate
    calls = []

    def killing(*args: float) -> float:
        calls.append(args)
        if len(calls) == 4:  # in the fourth step, after the checkpoint of the second (or the end of the first phase)
            raise Killed
        return schedule(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "learning_rate", killing)
    with pytest.raises(Killed):
        train(cfg, tmp_path / "killed")
    monkeypatch.undo()
    train(cfg, tmp_path / "killed")
    whole, resumed = (
        torch.load(tmp_path / name / f"{stage}.pt", weights_only=True)["modules"] for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    for part in whole:
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), f"{part}.{name}"
    lines = [json.loads(x) for x in (tmp_path / "killed" / f"{stage}.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4


def test_the_export_loads_with_plain_transformers(tmp_path: Path) -> None:
    model = build_model(SIZES, seed=2)
    export(model, SIZES.patch_size, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    batches = Batches(config(), SIZES)
    batch, images = batches.align(0, 1)
    from PIL import Image

    picture = Image.fromarray(((images[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    content = [{"type": "image"}, {"type": "text", "text": "what is 1 plus 1 ?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], images, atol=1e-5, rtol=0)
    prefix = (batch.branch[0] == 0).nonzero().flatten()
    assert torch.equal(inputs["input_ids"][0, : len(prefix)], batch.input_ids[0, prefix])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_the_blind_control_sees_no_image() -> None:
    batches = Batches(config("instruct.blind=true"), SIZES)
    batch, images = batches.instruct(0, 1.0, 2)
    assert images is None
    assert not (batch.input_ids == batches.ids("<image>")[0]).any()


def test_phases_put_in_their_own_settings_and_draw_scenes_of_their_own() -> None:
    cfg = config(*PHASES, "kind_weights.count=9.0", "+phases.find.kind_weights.count=7.0")
    (first, find), (last, follow) = phases(cfg)
    assert (first, last) == ("instruct_find", "instruct"), "what comes after reads the last phase as the stage"
    assert (find.instruct.steps, follow.instruct.steps) == (2, cfg.instruct.steps)
    assert (find.kind_weights.count, follow.kind_weights.count) == (7.0, 2.0)
    assert find.kind_weights.existence == cfg.kind_weights.existence
    assert follow.instruct.questions == cfg.instruct.questions
    assert (find.seed, follow.seed) == (cfg.seed, cfg.seed + 1)
    with pytest.raises(ConfigError, match=r"instruct.phases names \['finish'\]; phases are"):
        phases(config("instruct.phases=[finish]"))


def test_unknown_stages_and_missing_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown testbed stages \['pretrain'\]"):
        train(config("stages=[pretrain]"), tmp_path)
    with pytest.raises(ConfigError, match=r"init_from=.*nowhere is not a folder"):
        train(config("stages=[instruct]", f"init_from={tmp_path}/nowhere"), tmp_path)


def test_a_run_continues_from_an_exported_model(tmp_path: Path) -> None:
    export(build_model(SIZES, seed=4), SIZES.patch_size, tmp_path / "model")
    still = ["stages=[instruct]", "instruct.lr=0.0", "instruct.steps=1", f"init_from={tmp_path / 'model'}"]
    (tmp_path / "run").mkdir()
    continued = train(config(*still), tmp_path / "run").state_dict()
    for name, value in build_model(SIZES, seed=4).state_dict().items():
        assert torch.equal(continued[name], value), name
    with pytest.raises(ConfigError, match="holds a model of other sizes or words"):
        train(config(*still, "sizes.layers=3"), tmp_path / "run")


def test_the_schedule_warms_up_stays_and_falls_to_zero() -> None:
    rates = [learning_rate(s, 100, 1.0, 0.1, 0.4) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:60] == [1.0] * 50
    assert all(a > b for a, b in itertools.pairwise(rates[60:]))
    assert rates[-1] < 0.01
