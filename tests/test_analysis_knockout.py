"""`python -m analysis.knockout` on a small random model."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from intervals import intervals_of_zero_width
from omegaconf import DictConfig
from test_exits import random_model

from analysis import knockout
from analysis.measuring.key_sets import target_keys
from analysis.measuring.knockout import KnockoutMeasurement, cuts_of, windows_to_cut
from analysis.statistics.bands import ImageBootstrap
from analysis.statistics.causal import effect_band
from dyvte.data.english import EnglishDataset
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError
from dyvte.instrument.causal import all_windows
from dyvte.runs.config import compose
from dyvte.testbed.world import GRID


def config(folder: Path, *overrides: str) -> DictConfig:
    settings = ["device=cpu", "max_new_tokens=3", "bootstrap=50", "batch_size=4", "model.name=random"]
    return compose("knockout", [f"output_dir={folder}", *settings, *overrides])


def test_tables_summary_and_figures(tmp_path: Path) -> None:
    mllm, dataset = random_model(), ShapesDataset("test", 8)
    knockout.run(config(tmp_path / "a"), mllm, dataset)
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    table = pd.read_parquet(tmp_path / "a/knockouts.parquet")
    assert summary["width"] == 1  # 9 of 32 layers of 4
    with_image = summary["num_questions"]
    of_path = table[(table["name"] == "instruction->visual") & (table["window"] == 2)]
    asked = pd.read_parquet(tmp_path / "a/samples.parquet").query("visual_tokens > 0")["id"]
    assert len(asked) == with_image
    mean = 100 * (of_path[of_path["id"].isin(asked)]["agree"].mean() - 1)
    found = summary["overall"]["effects"]["instruction->visual"]["agreement_points"]
    assert found["mean"][2] == pytest.approx(mean)
    assert all(
        low <= middle <= high for low, middle, high in zip(*(found[k] for k in ("low", "mean", "high")), strict=True)
    )
    assert len(summary["entry_exit_windows"]) == len(all_windows(4))
    assert summary["overall"]["entry_exit"]["agreement_points"]["mean"][3] == 0  # open from 0 to 4: the model itself
    assert {path.stem for path in (tmp_path / "a/figures").glob("*.png")} == set(summary["figures"])

    # text that gets as much attention as the image, from later queries only
    masses = pd.read_parquet(tmp_path / "a/equal_mass.parquet")
    in_place = [f"{queries}->visual (mass)" for queries in ("question", "last", "instruction")]
    assert masses["name"].unique().tolist() == in_place
    assert {*in_place, "visual->visual (random)"} <= set(summary["over_control"])
    assert len(masses) == len(in_place) * len(table["id"].unique()) * len(summary["windows"])
    for name in in_place:
        rows = masses[(masses["name"] == name) & (masses["window"] == 2) & masses["id"].isin(asked)]
        share = rows["mass"].sum() / rows["image_mass"].sum()
        assert summary["mass_reached"][name][2] == pytest.approx(share)
        assert np.isfinite(summary["overall"]["effects"][name]["nats"]["mean"]).all()

    assert intervals_of_zero_width(tmp_path / "a") == []

    # SIGKILL once the first batch is written, then the same command again: the same tables
    process = multiprocessing.get_context("fork").Process(
        target=knockout.run, args=(config(tmp_path / "b"), mllm, dataset)
    )
    process.start()
    while not list((tmp_path / "b").glob("shards/0*")) and process.is_alive():
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "b/summary.json").exists()
    knockout.run(config(tmp_path / "b"), mllm, dataset)
    for name in ("samples", "knockouts", "equal_mass", "entry_exit", "curves"):
        assert (tmp_path / f"b/{name}.csv").read_bytes() == (tmp_path / f"a/{name}.csv").read_bytes()


def test_images_of_one_image_id_are_cut_each_for_itself(tmp_path: Path) -> None:
    mllm, samples = random_model(), [sample for sample in ShapesDataset("test", 12) if sample.image is not None]
    measure = KnockoutMeasurement.of(mllm, config(tmp_path, "paths=[[visual,visual]]", "replace=[]"))
    merged = [replace(sample, image_id="patient 7") for sample in samples]
    expected, found = (measure(each)["knockouts"]["nats"].to_numpy() for each in (samples, merged))
    assert np.ptp(expected) > 1e-4
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bands_have_a_width_where_all_agree() -> None:
    for value, limits in ((0, (-100, 0)), (-100, (-100, 0)), (0, (-100, 100)), (100, (-100, 100))):
        band = effect_band(np.full((20, 2, 3), value), ImageBootstrap(range(20), 100), limits)
        assert (band.mean == value).all()
        assert (band.low == value).all() if value == limits[0] else (band.low < value - 10).all()
        assert (band.high == value).all() if value == limits[1] else (band.high > value + 10).all()
    one_image = effect_band(np.arange(8.0)[:, None], ImageBootstrap([0] * 8, 100), (-100, 100))
    assert one_image.low < 0
    assert one_image.high > 10


def test_nothing_is_claimed_where_an_unbounded_effect_does_not_vary() -> None:
    values = np.stack([np.zeros(20), np.full(20, -1.5), np.arange(20.0)], axis=1)
    band = effect_band(values, ImageBootstrap(range(20), 100))
    assert np.allclose(band.mean, [0, -1.5, 9.5])
    assert np.isnan(band.low[:2]).all()
    assert np.isnan(band.high[:2]).all()
    assert band.low[2] < 9.5 < band.high[2]
    assert np.isnan(effect_band(values, ImageBootstrap([0] * 20, 100)).low).all()  # one image shows nothing of others


@pytest.mark.parametrize(
    ("override", "reason"),
    [("paths=[]", "paths is empty"), ("paths=[[last,sky]]", "is not"), ("replace=[zero]", "neither mean nor swap")],
)
def test_settings_that_do_not_fit(tmp_path: Path, override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        cuts_of(config(tmp_path, override))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("windows=[]", "windows is empty"),
        ("windows=[[2,2]]", "is not"),
        ("windows=[[0,9]]", "stop <= 4"),
        ("windows=[[3]]", "is not"),
    ],
)
def test_windows_that_do_not_fit(tmp_path: Path, override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        windows_to_cut(config(tmp_path, override), num_layers=4)
    with pytest.raises(ConfigError, match="not both"):
        windows_to_cut(config(tmp_path, "windows=[[0,1]]", "width=2"), num_layers=4)
    assert windows_to_cut(config(tmp_path, "windows=[[0,1],[1,4]]"), num_layers=4) == [(0, 1), (1, 4)]


def test_objects_of_the_answer_are_cut_beside_as_many_other_patches(tmp_path: Path) -> None:
    mllm, dataset = random_model(), EnglishDataset("test", 12)
    samples = [sample for sample in dataset.readable() if sample.image is not None][:6]
    batch = mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
    objects, others = target_keys(mllm, batch, samples, 0)
    assert not (objects & others).any()
    assert not ((objects | others) & ~batch.layout.visual).any()
    assert torch.equal(objects.sum(1), others.sum(1))
    side = math.isqrt(int(batch.layout.visual[0].sum()))
    for row, sample in enumerate(samples):
        number = batch.layout.visual[row].nonzero().flatten().tolist()
        cells = {tuple(cell) for cell in sample.metadata["target"]}
        of_objects = {
            position
            for index, position in enumerate(number)
            if (index // side * GRID // side, index % side * GRID // side) in cells
        }
        found = set(objects[row].nonzero().flatten().tolist())
        assert found in (of_objects, set())
        assert found or not cells or len(of_objects) > len(number) / 2

    knockout.run(config(tmp_path, "control=false", "entry_exit=false", "replace=[]"), mllm, dataset)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"objects", "knockout"} <= set(summary["figures"])
    assert set(summary["over_control"]) == {"instruction->visual (other patches)"}
    with pytest.raises(ConfigError, match="does not say which objects"):
        knockout.run(config(tmp_path / "b", "objects=true"), mllm, ShapesDataset("test", 8))
