"""`python -m analysis.lens` on a small random model."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from intervals import intervals_of_zero_width
from omegaconf import DictConfig
from test_exits import random_model

import dyvte
from analysis import lens
from analysis.measuring.lens import LensMeasurement, patch_words, word_ids
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError
from dyvte.runs.config import compose
from dyvte.testbed.world import IMAGE_SIZE, VALUES, patch_labels, sample_scene, scene_of


def config(folder: Path, *overrides: str) -> DictConfig:
    settings = ["device=cpu", "bootstrap=50", "batch_size=4", "model.name=random", "exit_layer=2", "grids=1"]
    return compose("lens", [f"output_dir={folder}", *settings, *overrides])


def test_tables_summary_and_figures(tmp_path: Path) -> None:
    mllm, dataset = random_model(), ShapesDataset("test", 8)
    lens.run(config(tmp_path / "a"), mllm, dataset)
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert set(summary["answer"]) == {"no exit", "exit at 2"}
    plain = summary["answer"]["no exit"]
    assert len(plain["is_answer"]["mean"]) == mllm.num_layers + 1
    assert plain["is_answer"]["mean"][-1] == 1  # after the last layer the answer is the model's own
    assert {path.stem for path in (tmp_path / "a/figures").glob("*.png")} == set(summary["figures"])
    assert any(name.startswith("grid_") for name in summary["figures"])
    assert intervals_of_zero_width(tmp_path / "a") == []

    # against the lens itself, sample by sample
    table = pd.read_parquet(tmp_path / "a/answers.parquet")
    for sample in list(dataset)[:3]:
        one = dyvte.logit_lens(mllm, mllm.encode([sample.image], [sample.question]), "last", top=1)
        rows = table[(table["id"] == sample.id) & (table["exit_layer"] == mllm.num_layers)].sort_values("layer")
        assert np.allclose(rows["answer_probability"], one.answer_probability[0, :, 0], atol=1e-5)

    # killed after the first batch and started again: the same tables
    real, calls = LensMeasurement._answers, []

    def once(self: LensMeasurement, *args: object) -> pd.DataFrame:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)  # type: ignore[arg-type]

    with mock.patch.object(LensMeasurement, "_answers", once), pytest.raises(KeyboardInterrupt):
        lens.run(config(tmp_path / "b"), mllm, dataset)
    lens.run(config(tmp_path / "b"), mllm, dataset)
    assert (tmp_path / "b/answers.csv").read_bytes() == (tmp_path / "a/answers.csv").read_bytes()


def test_patches_are_scored_against_what_the_generator_drew() -> None:
    """A read-out that always says the truth, one that always says one colour, and the control between them."""
    mllm = random_model()
    sample = ShapesDataset("test", 1, kinds=["attribute"])[0]
    scene = scene_of(sample.image_id)
    assert scene is not None
    words, _ = patch_words(mllm, sample)
    side = int(len(words[0]) ** 0.5)
    labels = patch_labels(scene, IMAGE_SIZE // side)
    truth = torch.tensor([min(word_ids(mllm, VALUES["color"][max(value - 1, 0)])) for value in labels["color"]])
    fake = dyvte.LogitLens(
        ids=truth[None, None, :, None].expand(1, mllm.num_layers + 1, -1, 1),
        **{name: torch.zeros(1) for name in ("probabilities", "answer_probability", "answer_ids", "positions")},
    )
    with mock.patch("analysis.measuring.lens.logit_lens", return_value=fake):
        table = LensMeasurement(mllm, None, 0)._patches([sample], mllm.encode([sample.image], [sample.question]))
    assert table is not None
    colors = table[table["attribute"] == "color"]
    assert (colors["share"] == 1).all()
    assert (colors["control"] <= 1).all()
    assert (table[table["attribute"] == "size"]["share"] == 0).all()


def test_scenes_are_found_by_the_names_of_their_images() -> None:
    for split, seed, index in (("test", 0, 3), ("validation", 12, 4567)):
        scene = sample_scene(split, seed, index)
        assert scene_of(scene.image_id) == scene
    for other in ("", "photo.jpg", "test-0", "test-x-0000001", "coco-0-0000001", "000000123456"):
        assert scene_of(other) is None


def test_an_exit_that_is_none_of_the_models_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"exit_layer is 9; this model has exit layers 0\.\.4"):
        lens.run(config(tmp_path, "exit_layer=9"), random_model(), ShapesDataset("test", 2))
