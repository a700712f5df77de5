"""Run folders: killed anywhere a run ends with the same bytes, and it never mixes with another run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from quick_figures import printed

from dyvte.data.base import Dataset, Sample
from dyvte.errors import BrokenSample, ConfigError, DataError, ModelError, RunFolderError, UnsupportedError
from dyvte.runs import runner, store
from dyvte.runs.locks import write_atomic
from tests.families import FAMILIES

CONFIG = OmegaConf.create(
    {"command": "test", "seed": 0, "batch_size": 3, "model": {"name": "m"}, "data": {"name": "d"}}
)
FINGERPRINT = {"model": {"weights": "abc"}, "data": {"limit": 14}, "settings": {"batch_size": 3}}


class Numbers(Dataset):
    """Samples whose question is a number; some are broken."""

    def __init__(self, length: int = 14, broken: tuple[int, ...] = (4, 9, 10, 11)) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise BrokenSample(f"numbers line {index + 1}", "is broken")
        return Sample(str(index), None, str(index), None, "even" if index % 2 == 0 else "odd", str(index // 2))

    @property
    def fingerprint(self) -> str:
        return f"{self.length} {self.broken}"


def squares(samples: list[Sample]) -> dict[str, pd.DataFrame]:
    numbers = np.array([int(sample.question) for sample in samples])
    labels = [None if number < 6 else f"n{number}" for number in numbers]  # the first shards have no type for this
    return {
        "squares": pd.DataFrame({"id": numbers, "square": numbers.astype(np.float32) ** 2 / 3, "label": labels}),
        "kinds": pd.DataFrame({"kind": [sample.kind for sample in samples]}),
    }


def execute(path: Path, compute: runner.Compute = squares, **options: Any) -> store.RunFolder:
    folder = store.RunFolder.open(path, FINGERPRINT, CONFIG, **options)
    dataset = Numbers()
    runner.run(folder, dataset, runner.consecutive_batches(len(dataset), 3), compute)
    return folder


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a run except the shards' records, which hold times."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "shard.json"
    }


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    execute(tmp_path / "uninterrupted")
    return contents(tmp_path / "uninterrupted")


def test_tables_hold_what_was_computed(tmp_path: Path) -> None:
    folder = execute(tmp_path)
    used = [index for index in range(14) if index not in Numbers().broken]
    table = folder.read_table("squares")
    assert table["id"].tolist() == used
    np.testing.assert_allclose(table["square"], np.array(used) ** 2 / 3, rtol=1e-6)
    assert table["label"].isna().tolist() == [index < 6 for index in used]
    as_csv = pd.read_csv(tmp_path / "squares.csv")
    np.testing.assert_allclose(as_csv["square"], table["square"], rtol=1e-6)
    assert folder.read_table("kinds")["kind"].tolist() == ["odd" if index % 2 else "even" for index in used]
    failures = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert failures[1] == {"index": 9, "where": "numbers line 10", "why": "is broken"}
    summary = folder.write_summary(model="m", data="d", num_layers=4, extra=np.array([1.0, np.nan]))
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["num_samples"], summary["num_failed"], summary["extra"]) == (10, 4, [1.0, None])
    assert summary["versions"]["torch"] == torch.__version__
    assert OmegaConf.load(tmp_path / "config.yaml") == CONFIG


class Crash(BaseException):
    """Stands for a kill: nothing may catch it."""


def test_abort_at_any_file_operation_changes_nothing(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before each fsync and each rename in turn, then start again."""
    calls = 0
    stop_at = -1

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Crash
            return original(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    execute(tmp_path / "counting")
    operations = calls
    assert operations > 30
    for stop_at in range(1, operations + 1):
        path, calls = tmp_path / str(stop_at), 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # a killed process does not tidy up
            with pytest.raises(Crash):
                execute(path)
        execute(path)
        assert contents(path) == expected, f"stopped at operation {stop_at}"


def test_killed_process_continues_to_the_same_bytes(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """SIGKILL a real process at several moments; what it finished is not computed again."""
    path = tmp_path / "killed"
    context = multiprocessing.get_context("fork")

    def slow(samples: list[Sample]) -> dict[str, pd.DataFrame]:
        time.sleep(0.05)
        return squares(samples)

    for moment in (0.02, 0.08, 0.12):
        process = context.Process(target=execute, args=(path, slow))
        process.start()
        time.sleep(moment)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finished = [index for index in range(5) if (path / "shards" / f"{index:08d}").is_dir()]
    computed: list[str] = []

    def recorded(samples: list[Sample]) -> dict[str, pd.DataFrame]:
        computed.extend(sample.id for sample in samples)
        return squares(samples)

    execute(path, recorded)
    assert contents(path) == expected
    assert not {int(each) // 3 for each in computed} & set(finished)


def test_finished_run_is_not_computed_again(tmp_path: Path) -> None:
    execute(tmp_path)
    before = contents(tmp_path)

    def never(samples: list[Sample]) -> dict[str, pd.DataFrame]:
        raise AssertionError("computed again")

    execute(tmp_path, never)
    assert contents(tmp_path) == before


def test_error_in_a_batch_keeps_the_batches_before_it(tmp_path: Path) -> None:
    def fails_late(samples: list[Sample]) -> dict[str, pd.DataFrame]:
        if samples[0].id == "12":
            raise ConfigError("a setting")
        return squares(samples)

    with pytest.raises(ConfigError):
        execute(tmp_path, fails_late)
    assert len(list((tmp_path / "shards").iterdir())) == 4


# ---------------------------------------------------------------- one bad sample
class Unlucky(Numbers):
    """Sample 5 cannot be read, by an error that no reader names."""

    def __getitem__(self, index: int) -> Sample:
        if index == 5:
            raise OSError("cannot identify image file")
        return super().__getitem__(index)

    def where(self, index: int) -> str:
        return f"numbers line {index + 1}"


def breaks_at(place: str, bad: set[int]) -> runner.Compute:
    def compute(samples: list[Sample]) -> dict[str, Any]:
        tables = squares(samples)
        if any(int(sample.id) in bad for sample in samples):
            if place == "encode":
                raise ValueError("absolute aspect ratio must be smaller than 200, got 3000.0")
            if place == "forward":
                raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
            if place == "model":
                raise ModelError("NaN among the logits")
            if place == "named":
                raise BrokenSample("numbers line x", "is odd")
            value = "\ud800" if place == "surrogate" else object()
            tables["squares"]["label"] = [value if int(s.id) in bad else s.id for s in samples]
        return tables

    return compute


PLACES = ["encode", "forward", "model", "named", "surrogate", "write"]


@pytest.mark.parametrize("batch_size", [1, 3, 14])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bad", [{7}, {0}, {0, 1, 2}, {13}, {3, 7, 8}])
def test_one_bad_sample_never_ends_a_run(tmp_path: Path, place: str, bad: set[int], batch_size: int) -> None:
    """Wherever it fails: it is named and left out, and the others come out as they do without it."""
    dataset = Unlucky()
    lost = {*bad, 5, *dataset.broken}
    folder = store.RunFolder.open(tmp_path / "a", FINGERPRINT, CONFIG)
    batches = runner.consecutive_batches(len(dataset), batch_size)
    runner.run(folder, dataset, batches, breaks_at(place, bad))
    assert folder.read_table("squares")["id"].tolist() == [index for index in range(14) if index not in lost]
    failures = folder.failures()
    assert [each["index"] for each in failures] == sorted(lost)
    by_index = {each["index"]: each for each in failures}
    assert by_index[5] == {"index": 5, "where": "numbers line 6", "why": "OSError: cannot identify image file"}
    if place != "named":
        assert all(by_index[index]["where"] == f"numbers line {index + 1}" for index in bad)
    else:
        assert all(by_index[index]["where"] == "numbers line x" for index in bad)
    assert all("\n" not in each["why"] for each in failures)


@pytest.mark.parametrize("batch_size", [1, 3, 14])
def test_an_error_of_every_sample_is_raised_as_it_is(tmp_path: Path, batch_size: int) -> None:
    def bug(samples: list[Sample]) -> dict[str, pd.DataFrame]:
        raise ZeroDivisionError("a bug")

    folder = store.RunFolder.open(tmp_path, FINGERPRINT, CONFIG)
    with pytest.raises(ZeroDivisionError):
        runner.run(folder, Numbers(), runner.consecutive_batches(14, batch_size), bug)


def test_an_error_of_the_device_or_a_setting_is_raised_at_once(tmp_path: Path) -> None:
    for error in (torch.AcceleratorError("CUDA error: device-side assert"), UnsupportedError("x"), MemoryError()):

        def compute(samples: list[Sample], error: Exception = error) -> dict[str, pd.DataFrame]:
            if samples[0].id == "12":
                raise error
            return squares(samples)

        with pytest.raises(type(error)):
            execute(tmp_path / type(error).__name__, compute)


def test_another_run_is_refused_and_says_why(tmp_path: Path) -> None:
    execute(tmp_path)
    before = contents(tmp_path)
    other = {**FINGERPRINT, "data": {"limit": 99}}
    with pytest.raises(RunFolderError, match=r"data\.limit was 14, is 99.*output_dir=.*overwrite=true"):
        store.RunFolder.open(tmp_path, other, CONFIG)
    with pytest.raises(RunFolderError, match=r"data\.limit was 14, is 99\): delete it$"):
        store.RunFolder.open(tmp_path, other, CONFIG, remedy="delete it")
    assert contents(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "mine.csv").write_text("a,b")
    for old in ("answers.jsonl", "table.md", "calibration.json", "summary.json", "overrides.yaml"):
        (tmp_path / old).write_text("old")
    for old in ("gates", "figures", "tensorboard"):
        (tmp_path / old).mkdir()
        (tmp_path / old / "file").write_text("old")
    store.RunFolder.open(tmp_path, other, CONFIG, overwrite=True)
    left = {file.name for file in tmp_path.iterdir() if not file.name.startswith(".")}
    assert left == {"notes.txt", "mine.csv", "fingerprint.json", "config.yaml", "shards"}
    assert not list((tmp_path / "shards").iterdir())


def test_other_versions_are_refused_unless_asked_for(tmp_path: Path) -> None:
    ours, theirs = ({**FINGERPRINT, "labels": {"versions": {"torch": number}}} for number in ("2.9", "2.8"))
    for found in (theirs, FINGERPRINT):
        path = tmp_path / str(len(found))
        store.RunFolder.open(path, found, CONFIG)
        with pytest.raises(RunFolderError, match=r"labels\.versions\.torch was .*2\.9.*any_version=true"):
            store.RunFolder.open(path, ours, CONFIG)
        asked = OmegaConf.merge(CONFIG, {"any_version": True})
        store.RunFolder.open(path, ours, asked)
        with pytest.raises(RunFolderError, match=r"data\.limit was 14, is 99"):
            store.RunFolder.open(path, {**ours, "data": {"limit": 99}}, asked)


def test_a_shard_that_lost_a_file_is_made_again(tmp_path: Path, expected: dict[str, bytes]) -> None:
    execute(tmp_path / "run")
    (tmp_path / "run/shards/00000002/squares.parquet").unlink()
    execute(tmp_path / "run")
    assert contents(tmp_path / "run") == expected


# ---------------------------------------------------------------- many at once
def work(paths: list[Path], barrier: Any, results: Any) -> None:
    for path in paths:
        try:
            barrier.wait(30)
            execute(path)
            results.put("")
        except BaseException as error:
            results.put(f"round {path.name}: {error!r}")


def test_many_processes_share_a_run_folder(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """50 rounds of three processes that start one run at the same moment: none fails, the tables are the same."""
    context = multiprocessing.get_context("fork")
    paths = [tmp_path / str(each) for each in range(50)]
    barrier, results = context.Barrier(3), context.Queue()
    jobs = [context.Process(target=work, args=(paths, barrier, results)) for _ in range(3)]
    for job in jobs:
        job.start()
    failed = [error for error in (results.get(timeout=60) for _ in jobs for _ in paths) if error]
    for job in jobs:
        job.join()
    assert not failed
    for path in paths:
        assert contents(path) == expected, path.name


def test_a_file_is_the_old_or_the_new_one_while_it_is_written(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")

    def write(out: BinaryIO) -> None:
        out.write(b"half of the ")
        out.flush()
        seen.append(path.read_bytes())
        out.write(b"new")

    write_atomic(path, write)
    assert seen == [b"old"]
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, lambda out: out.write(b"never" * (1 // 0)))
    assert path.read_bytes() == b"half of the new"
    assert list(tmp_path.iterdir()) == [path]


def test_overwrite_waits_for_the_process_that_works_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    there, go = context.Event(), context.Event()

    def hold() -> None:
        store.RunFolder.open(tmp_path, FINGERPRINT, CONFIG)
        (tmp_path / "shards" / ".tmp-other").mkdir()
        there.set()
        go.wait(30)

    process = context.Process(target=hold)
    process.start()
    assert there.wait(30)
    with pytest.raises(RunFolderError, match="another process works in"):
        store.RunFolder.open(tmp_path, FINGERPRINT, CONFIG, overwrite=True)
    store.RunFolder.open(tmp_path, FINGERPRINT, CONFIG)
    assert (tmp_path / "shards" / ".tmp-other").is_dir()  # nobody deletes what another may be writing
    go.set()
    process.join()
    store.RunFolder.open(tmp_path, FINGERPRINT, CONFIG, overwrite=True)
    assert not list((tmp_path / "shards").iterdir())


def test_folders_that_no_run_wrote_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RunFolderError, match=r"thesis\.tex.*give another output_dir="):
            store.RunFolder.open(tmp_path, FINGERPRINT, CONFIG, overwrite=overwrite)
    with pytest.raises(RunFolderError, match="is a file"):
        store.RunFolder.open(tmp_path / "thesis.tex", FINGERPRINT, CONFIG)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_run_without_a_usable_sample_fails_by_name(tmp_path: Path) -> None:
    folder = store.RunFolder.open(tmp_path, FINGERPRINT, CONFIG)
    dataset = Numbers(4, broken=(0, 1, 2, 3))
    with pytest.raises(DataError, match="none of the 4 samples could be used; the first: numbers line 1: is broken"):
        runner.run(folder, dataset, runner.consecutive_batches(4, 3), squares)
    assert len((tmp_path / "failures.jsonl").read_text().splitlines()) == 4
    with pytest.raises(ConfigError, match="batch_size is 0"):
        runner.consecutive_batches(4, 0)


def test_out_of_memory_names_the_setting(tmp_path: Path) -> None:
    def exhausts(samples: list[Sample]) -> dict[str, pd.DataFrame]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match="batch of 3: set batch_size="):
        execute(tmp_path, exhausts)


def test_json_keeps_lists_on_one_line_and_strings_as_they_are(tmp_path: Path) -> None:
    content = {"maps": [[1, 2.5], [-3e-9, None]], "text": ["a [ 1,\n 2 ]", "b, c"], "empty": [], "deep": {"list": [{}]}}
    store.write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content
    assert "[1, 2.5]" in text
    assert "[-3e-09, null]" in text


def test_unfinished_table_is_named(tmp_path: Path) -> None:
    folder = store.RunFolder.open(tmp_path, FINGERPRINT, CONFIG)
    with pytest.raises(RunFolderError, match="no table 'squares'"):
        folder.read_table("squares")


def test_model_fingerprint_tells_weights_apart() -> None:
    one, same, other = (FAMILIES["llava"](seed) for seed in (0, 0, 1))
    assert store.model_fingerprint(one) == store.model_fingerprint(same)
    assert store.model_fingerprint(one)["weights"] != store.model_fingerprint(other)["weights"]
    assert store.model_fingerprint(one)["config"] == store.model_fingerprint(other)["config"]
    with torch.no_grad():
        one.lm_head.weight[0, 0] += 1
    assert store.model_fingerprint(one)["weights"] != store.model_fingerprint(same)["weights"]


def test_figures_are_reproducible(tmp_path: Path) -> None:
    folder = store.RunFolder.open(tmp_path, FINGERPRINT, CONFIG)
    written = []
    for _ in range(2):
        figure, axis = plt.subplots()
        axis.plot([0, 1], [1, 0])
        with printed():
            png = folder.save_figure("line", figure)
        assert not plt.fignum_exists(figure.number)
        written.append((png.read_bytes(), png.with_suffix(".pdf").read_bytes()))
    assert written[0] == written[1]
    assert written[0][0].startswith(b"\x89PNG")
    assert written[0][1].startswith(b"%PDF")
