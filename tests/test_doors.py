"""What commands read from disk may be somebody else's: it neither runs code nor reads what the user has not named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from forks import Fork
from jinja2.exceptions import SecurityError
from omegaconf import OmegaConf

import dyvte
from analysis.report.runs import FinishedRun
from dyvte.calibrate import _calibrate_or_read
from dyvte.conversion.checkpoint import convert
from dyvte.conversion.exported import Export
from dyvte.data import build_dataset
from dyvte.errors import DyvteError
from dyvte.gates.module import Gates, load_gates
from dyvte.loading import SHIPPED_MODELS
from dyvte.policies.pruning.fitprune import Recipe

MARK = "SECRET-OF-THE-USER"


class Bomb:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def model(folder: Path) -> Path:
    shutil.copytree(SHIPPED_MODELS["llava_shapes"], folder / "model")
    return folder / "model"


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def stored_data(folder: Path, **settings: Any) -> None:
    shapes = {"_target_": "dyvte.data.llava_json.LlavaJsonDataset", "file": "here.json"}
    build_dataset(
        OmegaConf.create({**shapes, **settings}), stored=True, own=OmegaConf.create({"_target_": "own.Class"})
    )


def run_folder(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    FinishedRun.read("stages", "stages", folder)


def calibration(folder: Path, monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    file = folder / "calibration.json"
    file.write_text(json.dumps({"num_samples": 1, "made_of": "same", "found": found}))
    monkeypatch.setattr("dyvte.calibrate.calibration_of", lambda mllm, cfg: "same")
    cfg = OmegaConf.create(
        {"policy": {"_target_": "dyvte.FitPrune", "name": "f", "recipe": None, "calibrate": {"x": 1}}}
    )
    _calibrate_or_read(None, cfg, ["recipe"], file)  # type: ignore[arg-type]


def gates(folder: Path, **entries: Any) -> None:
    Gates(3, 8).save_pretrained(folder / "gates")
    change(folder / "gates" / "config.json", **entries)
    load_gates(folder / "gates")


def gates_pickle(folder: Path) -> None:
    Gates(3, 8).save_pretrained(folder / "gates")
    (folder / "gates" / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "ran")))
    load_gates(folder / "gates")


def weights_outside(folder: Path) -> None:
    inside = model(folder)
    (inside / "model.safetensors").rename(folder / "theirs.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../theirs.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    dyvte.load(inside, device="cpu")


def remote_code(folder: Path, file: str, auto_class: str) -> None:
    inside = model(folder)
    (inside / "theirs.py").write_text(
        f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\nclass C: pass\n"
    )
    change(inside / file, auto_map={auto_class: "theirs.C"}, model_type="theirs", processor_class="C")
    dyvte.load(inside, device="cpu")


def kernel(folder: Path) -> None:
    change(model(folder) / "config.json", attn_implementation="owner/kernel")
    dyvte.load(folder / "model", device="cpu")


def template(folder: Path) -> None:
    text = (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch ran') }}"
    )
    (model(folder) / "chat_template.jinja").write_text(text)
    from PIL import Image

    dyvte.load(folder / "model", device="cpu").encode([Image.new("RGB", (8, 8))], ["what ?"])


def fork(folder: Path) -> Path:
    return Fork(folder / "fork", "clip", "mlp2x_gelu", "llava", "bin").folder


def fork_pickle(folder: Path) -> None:
    (fork(folder) / "pytorch_model-00002-of-00003.bin").write_bytes(pickle.dumps(Bomb(folder / "ran")))
    convert(folder / "fork", folder / "target")


def fork_index(folder: Path) -> None:
    file = fork(folder) / "pytorch_model.bin.index.json"
    content = json.loads(file.read_text())
    change(file, weight_map={**content["weight_map"], "x": str(folder / "secret.json")})
    convert(folder / "fork", folder / "target")


def fork_tower(folder: Path) -> None:
    change(fork(folder) / "config.json", mm_vision_tower=str(folder))
    convert(folder / "fork", folder / "target")


def export_index(folder: Path) -> None:
    about = {
        "format": 1,
        "hidden_size": 4,
        "num_samples": 0,
        "prompt": {key: ["", ""] for key in ("image", "text", "answer")},
    }
    (folder / "export.json").write_text(json.dumps({**about, "shards": ["../../secret"]}))
    Export(folder)


def recipe(folder: Path, content: Any) -> None:
    (folder / "recipe.json").write_text(json.dumps(content))
    Recipe.load(folder / "recipe.json")


POPEN = {"_target_": "subprocess.Popen", "args": ["touch", "ran"]}
DOORS: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "data: target": lambda folder, _: stored_data(folder, **POPEN),
    "data: target within": lambda folder, _: stored_data(folder, columns=POPEN),
    "data: the user's class within": lambda folder, _: stored_data(folder, columns={"_target_": "own.Class"}),
    "data: absolute file": lambda folder, _: stored_data(folder, file=str(folder.parent / "secret.json")),
    "data: file above": lambda folder, _: stored_data(folder, file="../secret.json"),
    "data: file of home": lambda folder, _: stored_data(folder, file="~/secret.json"),
    "data: image folder": lambda folder, _: stored_data(folder, image_folder="/"),
    "data: allow_outside": lambda folder, _: stored_data(folder, allow_outside=True),
    "data: environment": lambda folder, _: stored_data(folder, file="${oc.env:DYVTE_SECRET}"),
    "run: config": lambda folder, _: run_folder(
        folder, "config.yaml", f"!!python/object/apply:os.mkdir [{folder}/ran]"
    ),
    "run: overrides": lambda folder, _: run_folder(
        folder, "overrides.yaml", f"!!python/object/apply:os.mkdir [{folder}/ran]"
    ),
    "run: calibration target": lambda folder, patch: calibration(folder, patch, POPEN),
    "run: calibration target within": lambda folder, patch: calibration(folder, patch, {"recipe": POPEN}),
    "run: calibration file": lambda folder, patch: calibration(folder, patch, {"recipe": str(folder / "secret.json")}),
    "run: calibration environment": lambda folder, patch: calibration(
        folder, patch, {"recipe": "${oc.env:DYVTE_SECRET}"}
    ),
    "gates: huge": lambda folder, _: gates(folder, num_layers=10**6, hidden_size=10**6),
    "gates: status": lambda folder, _: gates(folder, status=["__class__"]),
    "gates: pickle": lambda folder, _: gates_pickle(folder),
    "recipe: target": lambda folder, _: recipe(folder, POPEN),
    "recipe: file": lambda folder, _: recipe(folder, {"found": {"recipe": str(folder / "secret.json")}}),
    "export: shard": lambda folder, _: export_index(folder),
    "model: index": lambda folder, _: weights_outside(folder),
    "model: code": lambda folder, _: remote_code(folder, "config.json", "AutoConfig"),
    "model: kernel": lambda folder, _: kernel(folder),
    "model: template": lambda folder, _: template(folder),
    "fork: pickle": lambda folder, _: fork_pickle(folder),
    "fork: index": lambda folder, _: fork_index(folder),
    "fork: tower": lambda folder, _: fork_tower(folder),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_hostile_file_runs_nothing_and_reads_nothing_outside(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for secret in (tmp_path / "secret.json", folder / "secret.json"):
        secret.write_text(json.dumps([{"id": MARK, "conversations": []}]))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DYVTE_SECRET", MARK)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises((DyvteError, SecurityError)) as caught:  # templates run in Jinja's sandbox
        DOORS[door](folder, monkeypatch)
    assert "\n" not in str(caught.value)
    assert MARK not in str(caught.value)
    assert not (folder / "ran").exists()


def test_code_for_the_processor_alone_is_not_run(tmp_path: Path) -> None:
    inside = model(tmp_path)
    (inside / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    change(inside / "processor_config.json", auto_map={"AutoProcessor": "theirs.C"})
    change(
        inside / "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.C", "theirs.C"]}, tokenizer_file="/etc/x"
    )
    with suppress(DyvteError):
        dyvte.load(inside, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_data_that_the_user_names_too_may_lie_anywhere(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "q"}]}]))
    data = {"_target_": "dyvte.data.llava_json.LlavaJsonDataset", "file": str(tmp_path / "d.json")}
    assert len(build_dataset(OmegaConf.create(data), True, OmegaConf.create(data))) == 1
