"""Bad settings end in one line that names the setting and what would be right; no file can name code to run."""

from __future__ import annotations

import re

import pytest
from omegaconf import OmegaConf

from dyvte.data import Dataset, build_dataset
from dyvte.errors import ConfigError
from dyvte.runs.settings import RULES, check_settings
from dyvte.runs.targets import find_target

NAN = float("nan")
BAD = {
    "whole": [1.5, "many", True, -1, [1], NAN],
    "number": ["much", True, NAN, -1, [0.5]],
    "flag": ["perhaps", 1, 0.0, None],
    "word": ["nonsense", 5, True],
}
KIND = {int: "whole", float: "number", bool: "flag", str: "word"}
CASES = [
    (name, value)
    for name, rule in RULES.items()
    if not rule.many and not (rule.kind is str and not rule.words)
    for value in BAD[KIND[rule.kind]]
]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda each: str(each))
def test_a_bad_setting_is_one_line_that_says_what_is_right(name: str, value: object) -> None:
    path = name if "." in name else f"policy.{name}"
    cfg = OmegaConf.create({})
    OmegaConf.update(cfg, path, value)
    with pytest.raises(ConfigError, match=rf"^{re.escape(path)}=.*: give ") as caught:
        check_settings(cfg)
    assert "\n" not in str(caught.value)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 150


@pytest.mark.parametrize("device", ["gpu", "cuda:x", 0, "cpu ", "CUDA", True])
def test_devices(device: object) -> None:
    with pytest.raises(ConfigError, match=r"device=.*: give auto, cpu, cuda"):
        check_settings(OmegaConf.create({"device": device}))


DOORS = [
    "subprocess.Popen",
    "os.system",
    "builtins.eval",
    "dyvte.runs.store.shutil.rmtree",
    "dyvte.data.base.Image.open",
    "dyvte.errors.ConfigError",
    "torch.load",
    "torch.optim.lr_scheduler.sys.exit",
    "dyvte.nowhere.Class",
    "dyvte",
    "../x",
    "",
    7,
]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("target", DOORS)
def test_a_target_that_is_no_data_set_is_never_called(target: object, stored: bool) -> None:
    with pytest.raises(ConfigError):
        find_target(target, Dataset, stored)
    with pytest.raises(ConfigError):
        build_dataset(OmegaConf.create({"_target_": target, "args": ["touch", "boom"]}), stored)


def test_a_stored_configuration_imports_nothing_of_others(tmp_path, monkeypatch) -> None:
    (tmp_path / "theirs.py").write_text("raise SystemExit('code of a stranger ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="which is not a class of dyvte: it is not run"):
        build_dataset(OmegaConf.create({"_target_": "theirs.Data"}), stored=True)
