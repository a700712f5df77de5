"""Maps of the places that methods keep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, random_batch

import dyvte
from analysis.kept_positions import kept_by_layer, kept_positions, mean_place, overlap, preference, share_kept
from dyvte.errors import ConfigError
from dyvte.runs.config import compose
from dyvte.testbed.model import TestbedSizes, build_model
from dyvte.testbed.tokenizer import build_processor


def test_what_each_layer_sees_is_what_the_policy_left() -> None:
    mllm = FAMILIES["llava"](0, num_layers=4)
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 1), question_length=[4, 6])
    kept = kept_by_layer(mllm, batch, dyvte.FastV(layer=2, keep=0.25))
    assert [each.sum(1).tolist() for each in kept] == [[16, 16, 4, 4]] * 2
    uniform = kept_by_layer(mllm, batch, dyvte.UniformDrop(0.5))
    for each in uniform:
        assert (each == each[0]).all()
        share = share_kept(each)
        assert share is not None
        assert abs(mean_place(share) - 0.5) < 0.05


def test_only_thinned_layers_count() -> None:
    kept = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    share = share_kept(kept)
    assert share is not None
    assert share.tolist() == [0, 0, 0.5, 1]
    assert mean_place(share) == pytest.approx((2 / 3 * 0.5 + 1) / 1.5)
    assert mean_place(torch.ones(9)) == pytest.approx(0.5)
    assert share_kept(kept[[0, 3]]) is None
    assert preference(0.6, 0.6) == "the same places for every question"
    assert [preference(0.51, 0.6), preference(0.4, 0.49), preference(0.4, 0.6)] == [
        "late places",
        "early places",
        "no preference shown",
    ]


def test_the_command_draws_every_method(tmp_path: Path) -> None:
    sizes = TestbedSizes(
        patch_size=32, vision_layers=1, vision_width=32, vision_heads=2, layers=4, width=48, heads=2, mlp_width=64
    )
    build_model(sizes, 0).save_pretrained(tmp_path / "model")
    build_processor(sizes.patch_size).save_pretrained(tmp_path / "model")
    settings = ["model=hf", f"model.path={tmp_path}/model", "device=cpu", "data.limit=9", "bootstrap=20", "budget=0.9"]
    settings += [f"output_dir={tmp_path}/run", "calibration.data.limit=6"]
    cfg = compose("kept_positions", [*settings, "methods=[fastv,uniform,random,average_pool]"])
    summary = kept_positions(cfg)
    assert summary is not None
    assert [each["method"] for each in summary["methods"]] == ["fastv", "uniform", "random", "average_pool"]
    assert [each["at_budget"] for each in summary["methods"]] == [True, True, True, False]
    rows, columns = summary["grid"]
    for each in summary["methods"]:
        assert torch.tensor(each["map"]).shape == (rows, columns)
        low, high = each["mean_place_ci"]
        assert low <= each["mean_place"] <= high
        assert each["position_bias"] == pytest.approx(2 * each["mean_place"] - 1)
        assert summary["overlap"][each["method"]][each["method"]] == pytest.approx(1)
    assert (tmp_path / "run" / "figures" / "kept_positions.png").stat().st_size > 2000
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["methods"] == summary["methods"]
    with pytest.raises(ConfigError, match="methods names 'vtv'"):
        kept_positions(compose("kept_positions", [*settings, "methods=[vtv]"]))


def test_overlap_is_one_for_the_same_tokens_and_zero_by_chance() -> None:
    rng = np.random.default_rng(0)
    first = (rng.random((200, 16)).argsort(1) < 6).astype(float)
    second = (rng.random((200, 16)).argsort(1) < 6).astype(float)
    assert overlap(first, first) == pytest.approx(1)
    assert abs(overlap(first, second)) < 0.05
    assert overlap(first, 1 - first) < -0.5
    by_hand = [(np.minimum(a, b).sum() - 6 * 6 / 16) / (6 - 6 * 6 / 16) for a, b in zip(first, second, strict=True)]
    assert overlap(first, second) == pytest.approx(np.mean(by_hand))
