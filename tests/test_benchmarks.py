"""Programs that measure, on models too small to take time: they run, and say what they measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import dyvte
from analysis import bench_fitprune, bench_full_width, models
from dyvte.data.shapes import ShapesDataset


def test_fitting_a_recipe() -> None:
    options: Any = SimpleNamespace(
        samples=3, batch_size=2, budgets=[0.7], layers=3, hidden=32, head_size=16, vocabulary=64, device="cpu",
        dtype="float32",
    )  # fmt: skip
    found = bench_fitprune.measure(options)
    assert len(found["batches"]) == 2
    _, recipe = found["fits"][0.7]
    assert recipe.num_samples == 3
    assert recipe.cost <= 0.7
    text = bench_fitprune.report(options, found)
    assert "32 system + 576 visual + 32 instruction tokens; 3 samples in batches of 2" in text
    assert "under the 5 minutes" in text


def test_a_model_of_full_width_is_one_that_commands_take(tmp_path: Path) -> None:
    settings = models.small_settings(models.architecture("llava7b"))
    facts = bench_full_width.write_model(settings, 2, tmp_path)
    mllm = dyvte.load(tmp_path, device="cpu")
    assert mllm.num_layers == 2
    assert facts["parameters"] == sum(each.numel() for each in mllm.model.parameters())
    sample = ShapesDataset("test", 1)[0]
    batch = mllm.encode([sample.image], [sample.question])
    assert int(batch.layout.visual.sum()) == facts["visual_tokens"] == 576
    with torch.no_grad():
        assert len(mllm.generate(batch, max_new_tokens=2)) == 1
    runs = [bench_full_width.Run("analysis.stages", 4, 12.0, 5.0, 3 * 2**30)]
    text = bench_full_width.report("llava7b", 2, facts, runs, 1)
    assert "| `analysis.stages` | 4 | 12 | 5 | 3.0 |" in text
