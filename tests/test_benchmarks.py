"""Programs that measure, on models too small to take time: they run, and say what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch

import dyvte
from benchmarks import architectures
from benchmarks import busy_machine as bench_busy_machine
from benchmarks import decoding as bench_decoding
from benchmarks import dynamic_exit as bench_dynamic_exit
from benchmarks import end_to_end as bench_end_to_end
from benchmarks import fitprune as bench_fitprune
from benchmarks import full_width as bench_full_width
from benchmarks import gpu as bench_gpu
from benchmarks import knockout as bench_knockout
from benchmarks import probe as bench_probe
from benchmarks import sweep as bench_sweep
from benchmarks.common import VISUAL_TOKENS, extra_mib, random_llava, random_prompts, spread, write_page, write_section
from dyvte.data.shapes import ShapesDataset


@pytest.mark.parametrize("images", [0, 1, 2])
def test_prompts_have_the_tokens_that_were_asked_for(images: int) -> None:
    mllm = random_llava(layers=2, hidden=32, head_size=16)
    batch = random_prompts(mllm, 3, 5, 7, images=images)
    assert batch["input_ids"].shape == (3, 5 + images * VISUAL_TOKENS + 7)
    assert batch.layout.visual.sum(1).tolist() == 3 * [images * VISUAL_TOKENS]
    with torch.no_grad():
        logits = mllm.model(**batch).logits[:, -1]
    assert not torch.equal(logits[0], logits[1])
    again = random_prompts(mllm, 3, 5, 7, images=images)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_prompts_about_one_image_differ_in_the_question_alone() -> None:
    mllm = random_llava(layers=2, hidden=32, head_size=16)
    batch = random_prompts(mllm, 3, 5, 7, same_image=True)
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    assert torch.equal(ids[0, :-7], ids[2, :-7])
    assert not torch.equal(ids[0, -7:], ids[2, -7:])
    assert len(pixels) == 3
    assert torch.equal(pixels[0], pixels[2])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's record of the peak is Linux's")
def test_memory_of_what_is_held_and_given_back() -> None:
    mib = 96  # far above what an allocator rounds to or has left over

    def work() -> None:
        torch.ones(mib * 2**18)

    assert mib - 1 <= extra_mib(work) < mib + 32
    assert extra_mib(lambda: None) < 8


def test_spread() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0], 1) == "3.0 [2.0, 4.0]"
    assert spread([2.0], 0) == "2 [2, 2]"


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    write_page(tmp_path / "new" / "page.md", ["# Title", "", "text"])
    assert (tmp_path / "new" / "page.md").read_text() == "# Title\n\ntext\n"
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["page.md"]


def test_the_probe() -> None:
    times = [bench_probe.measure_time(hidden=128, num_layers=2, repeats=2)]
    assert all(len(times[0][name]) == 2 for name in ("plain", "probed", "contributions", "ratio", "processor_ratio"))
    memory = {
        mode: {"mode": mode, "hidden": 256, "layers": 2, "extra_mib": mib}
        for mode, mib in (("plain", 100.0), ("probe", 110.0), ("output_attentions", 300.0))
    }
    text = "\n".join(bench_probe.report(times, memory))
    assert "| 128 | 2 | 640 | 2 |" in text
    assert "| with AttentionProbe | 110 | 10 | 5.0% |" in text
    assert "2,944 tokens" in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's record of the peak is Linux's")
def test_maps_take_memory_that_the_probe_does_not() -> None:
    probe, maps = (
        bench_probe.measure_memory(mode, hidden=128, num_layers=2) for mode in ("probe", "output_attentions")
    )
    assert maps["extra_mib"] > 2 * probe["extra_mib"]


def test_the_sweep() -> None:
    options: Any = SimpleNamespace(
        layers=5, hidden=32, head_size=16, vocabulary=64, device="cpu", dtype="float32", repeats=2
    )
    times = bench_sweep.measure_time(options)
    assert times["difference"] < 1e-5
    assert [len(each["a"]) for each in times["rounds"]] == [6, 6]
    text = "\n".join(bench_sweep.report(options, times, {"plain": 100.0, "sweep": 50.0, "sweep_shared": 200.0}))
    assert "32 system + 576 visual + 32 instruction tokens" in text
    assert "| (b) sweep | 50 | 0.50 |" in text


def test_knock_outs(tmp_path: Path) -> None:
    options: Any = SimpleNamespace(layers=2, hidden=32, naive=2)
    times = bench_knockout.measure_time(options)
    assert [each["number"] for each in times.values()] == [8, 3, 2]
    assert all(each["difference"] < 1e-5 for each in times.values())
    memory = dict.fromkeys(times, 60.0) | {bench_knockout.SWEEP: 50.0}
    lines = bench_knockout.report(options, times, memory)
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- {bench_knockout.SECTION} -->\nold\n<!-- /{bench_knockout.SECTION} -->\nafter\n")
    write_section(page, bench_knockout.SECTION, lines)
    text = page.read_text()
    assert text.count("| 60 MiB, 1.20 x |") == 3
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="has no part"):
        write_section(page, "another", lines)


def test_an_exit_in_time() -> None:
    mllm = random_llava(layers=8, hidden=32, head_size=16)
    batch = random_prompts(mllm, bench_dynamic_exit.ROWS)
    mixed = bench_dynamic_exit.mixed_exits(mllm, batch)
    rounds = bench_dynamic_exit.measure(mllm, mixed, repeats=2)
    assert len(rounds) == 2
    assert all(seconds > 0 for each in rounds for seconds in each.values())
    exits = bench_dynamic_exit.exits_of(mllm, batch, mixed)
    assert len(exits) == bench_dynamic_exit.ROWS
    assert len(set(exits)) > 2
    known = {"full": 2.0, "half": 1.5, "layers": 1.4, "text layers": 0.4, "batch": 8.0}
    known |= {"one by one": 10.0, "decoding": 0.5, "decoding mixed": 0.4}
    table = {what: measured for what, measured, _ in bench_dynamic_exit.table(8, [known], 0.5, exits)}
    assert table["saved, of what timed layers predict"] == "1.000 [1.000, 1.000]"
    assert table["time saved over FLOPs saved"] == "0.500 [0.500, 0.500]"
    assert table["batch over one by one"] == "0.800 [0.800, 0.800]"
    assert table["decoding with these exits, of full"] == "0.800 [0.800, 0.800]"
    assert 0.3 < bench_dynamic_exit.flops_saved(mllm) < 0.5


def test_what_deciding_costs() -> None:
    gates, decoder = bench_dynamic_exit.deciding_flops(*bench_dynamic_exit.LLAVA["LLaVA-1.5-7B"])
    status, width = 2 * 4096, 2048
    assert gates == 31 * 2 * (2 * 640 * 4096 + status * width + 2 * width)  # means, and two layers a gate
    assert gates < 0.01 * decoder
    small = random_llava(layers=3, hidden=32, head_size=16)
    gate, layer = bench_dynamic_exit.deciding_work(small)
    assert gate.operators <= 16 < layer.operators
    assert gate.synchronisations == 1
    rounds = bench_dynamic_exit.measure_gates(small, repeats=2)
    assert all(0 < each["gates"] < each["asked"] for each in rounds)
    known = [{"full": 2.0, "asked": 2.1, "gates": 0.02}]
    text = "\n".join(bench_dynamic_exit.deciding_page(small, known))
    assert "| time of the gates, of the prefill | 0.0100 [0.0100, 0.0100] |" in text


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
    text = "\n".join(bench_fitprune.report(options, found))
    assert "32 system + 576 visual + 32 instruction tokens; 3 samples in batches of 2" in text
    assert "under the 5 minutes" in text


def test_a_model_of_full_width_is_one_that_commands_take(tmp_path: Path) -> None:
    settings = architectures.small_settings(architectures.architecture("llava7b"))
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
    text = "\n".join(bench_full_width.report("llava7b", 2, facts, runs))
    assert "| `analysis.stages` | 4 | 12 | 5 | 3.0 |" in text


def test_commands_are_timed_alone_and_beside_a_busy_process() -> None:
    found = bench_busy_machine.busy_ratios(["-c", "import time; time.sleep(0.05)"], repeats=1)
    assert len(found) == 2
    assert all(second > 0.05 for alone, beside in found.values() for second in (*alone, *beside))


def test_a_dry_run_of_what_waits_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results", str(tmp_path / "gpu.json"), "--output", str(tmp_path / "gpu.md")]
    tiny = ["--dry-run", "--models", "llava7b", "--repeats", "1", "--new-tokens", "3", *where]
    bench_gpu.main([*tiny, "--minutes", "0"])
    assert "No time was left for: llava7b, sdpa, policies, batch 1;" in (tmp_path / "gpu.md").read_text()
    cut = mock.patch.object(bench_gpu, "measure_instruments", side_effect=KeyboardInterrupt)
    with cut, pytest.raises(KeyboardInterrupt):
        bench_gpu.main(tiny)
    kept = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert len(kept) == 2, "what was measured before it was cut short"
    bench_gpu.main(tiny)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert len(results["parts"]) == len(bench_gpu.parts(("llava7b",)))
    assert results["left_out"] == []
    for name, part in kept.items():
        assert results["parts"][name] == part, "what was measured is not measured again"
    text = (tmp_path / "gpu.md").read_text()
    for method in ("none", "fixed_exit", "dynamic_exit", "fastv", "tome"):
        assert f"| llava7b | sdpa | 8 | {method} |" in text
    assert "| llava7b | output_attentions |" in text
    assert "| A | FastV | 0.171 | 0.722 |" in text
    with pytest.raises(SystemExit):
        bench_gpu.main(where)
    assert "needs a GPU" in capsys.readouterr().err


def test_decoding_steps_take_turns(tmp_path: Path) -> None:
    tiny = ["--layers", "4", "--hidden", "32", "--head-size", "16", "--images", "1", "--rounds", "2"]
    bench_decoding.main([*tiny, "--output", str(tmp_path / "decoding.md")])
    text = (tmp_path / "decoding.md").read_text()
    assert text.count("\n| 576 |") == 3
    known = [{"full model": 2.0, "mixed exits": 1.0}, {"full model": 4.0, "mixed exits": 2.0}]
    assert bench_decoding.table(5, known)[1][3:] == ["0.500 [0.500, 0.500]", "below 1"]


def test_questions_a_second(tmp_path: Path) -> None:
    tiny = ["--layers", "4", "--hidden", "32", "--head-size", "16", "--questions", "8", "--answer-tokens", "2", "3"]
    bench_end_to_end.main([*tiny, "--output", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert text.count("\n| 2 |") == text.count("\n| 3 |") == 5
    columns = ["tokens", "method", "batch", "flops", "vision_seconds", "prefill_seconds", "decode_seconds"]
    known = [[3, "full model", 0, 100, 1.0, 5.0, 0.5], [3, "other", 0, 60, 1.0, 3.5, 0.25]]
    full, other = bench_end_to_end.table(pd.DataFrame(known, columns=columns))
    assert full[2:] == ["1.33", "1.00", "", "17 / 67 / 17"]
    assert other[2:] == ["2.00", "1.50", "1.00", "25 / 62 / 12"]  # 2 s saved, .4 of 5 s predicted
