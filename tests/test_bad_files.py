"""Files that are damaged, empty or of another kind end in one line that names the file and what would be right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from families import FAMILIES
from forked import run_forked

from dyvte import Gates
from dyvte.data.huggingface import HuggingFaceDataset
from dyvte.data.llava_json import LlavaJsonDataset
from dyvte.errors import BrokenSample, DataError, DyvteError, ModelError

GARBAGE = {
    "cut.json": (b'{"question": ["x"', "JSON parse error"),
    "second_line.jsonl": (b'{"question": "a"}\nnot json\n', "JSON parse error"),
    "binary.csv": (b"\xff\xfe\x00\x01" * 20, "can't decode byte"),
    "text.parquet": (b"not a table at all", "not a parquet file"),
    "short.arrow": (b"xx", "too small"),
    "empty.json": (b"", "no rows"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_table_that_is_none_says_what_is_wrong_with_it(tmp_path: Path, name: str) -> None:
    content, reason = GARBAGE[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        HuggingFaceDataset(str(path), {"question": "question"})
    line = str(caught.value)
    assert name in line
    assert reason in line
    assert "\n" not in line


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2", b"\xff\xfe", b"3", b'"text"', b"null"])
def test_questions_that_are_no_list(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "questions.json"
    path.write_bytes(content)
    # refused as a whole, or line by line; never a sample out of it
    with pytest.raises((DyvteError, BrokenSample), match=r"questions\.json"):
        list(LlavaJsonDataset(str(path), str(tmp_path)))


WRONG_SETTINGS = [
    {},
    {"num_layers": 4},
    {"num_layers": "four", "hidden_size": 16},
    {"num_layers": 4, "hidden_size": 16, "status": ["nose"]},
    {"num_layers": 1, "hidden_size": 16},
    {"num_layers": 40, "hidden_size": 16},
]


@pytest.mark.parametrize("settings", WRONG_SETTINGS, ids=str)
def test_gates_of_wrong_settings(tmp_path: Path, settings: dict[str, object]) -> None:
    Gates(4, 16).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError) as caught:
        Gates.from_pretrained(tmp_path)
    assert "missing, which" not in str(caught.value)  # both files are there
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"x", b"{}"])
def test_gates_of_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    Gates(4, 16).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"config|safetensors|setting") as caught:
        Gates.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_gates_of_another_model_say_so() -> None:
    with pytest.raises(ModelError, match="train gates for it"):
        Gates(5, 16).check(FAMILIES["llava"](num_layers=2))


@pytest.mark.parametrize("what", ["folder is a file", "folder cannot be written"])
def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path, what: str) -> None:
    parent = tmp_path / "runs"
    if what == "folder is a file":
        parent.write_text("a file")
        target = parent / "run"
    elif os.geteuid() == 0:
        target = Path("/proc/dyvte_run")  # root may write everywhere but where the kernel says no
        if not Path("/proc").is_dir():
            pytest.skip("no folder here that root cannot write to")
    else:
        parent.mkdir(mode=0o500)
        target = parent / "run"
    done = run_forked("analysis.stages", [f"output_dir={target}", "data.limit=2", "device=cpu"], tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert target.name in last or str(parent) in last
