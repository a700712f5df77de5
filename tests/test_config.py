"""Every configuration composes, fits the code that reads it, and commands fail in one line."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path

import hydra
import pytest
import yaml
from forked import run_forked
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from dyvte.errors import ConfigError, DyvteError, ModelError
from dyvte.loading import load
from dyvte.runs.config import HYDRA_VERSION, command, compose, config_folder, load_model, missing_settings

CONF = config_folder()
COMMANDS = sorted(path.stem for path in CONF.glob("[!_]*.yaml") if path.stem != "base")
GROUP_FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/[!_]*.yaml"))
MODELS = [path.name for path in GROUP_FILES if path.parent.name == "model"]
DATA = [path.name for path in GROUP_FILES if path.parent.name == "data"]


@cache
def groups_of(name: str) -> set[str]:
    """Config groups that a command has a choice of."""
    with hydra.initialize_config_dir(version_base=HYDRA_VERSION, config_dir=str(CONF)):
        cfg = hydra.compose(config_name=name, return_hydra_config=True)
    return {group for group in cfg.hydra.runtime.choices if not group.startswith("hydra/")}


def compose_and_resolve(name: str, *overrides: str) -> dict:
    """The configuration with its interpolations filled in, and "given" where the user has to give a value."""
    cfg = compose(name, overrides)
    for key in missing_settings(cfg):
        OmegaConf.update(cfg, key, "given")
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    return settings


def overrides_for(group: str, name: str) -> list[str]:
    """What chooses a file; data that come with a model go with that model."""
    return [f"{group}={name}", *([f"model={name}"] if group == "data" and name in MODELS else [])]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_composes(name: str):
    compose_and_resolve(name)


def files_for(name: str, group: str) -> list[str]:
    """The files of a group that a command is composed with: in turn with the others that have a choice of it.

    Files of a group differ in values, not in keys, so one command each will do; a command without a turn gets the last.
    """
    files = [each.name for each in GROUP_FILES if each.parent.as_posix() == group and not comes_with_a_model(each)]
    users = [each for each in COMMANDS if group in groups_of(each)]
    return files[users.index(name) :: len(users)] or files[-1:]


def comes_with_a_model(file: Path) -> bool:
    return file.parent.name == "data" and file.name in MODELS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_composes_with_files_of_its_groups(name: str):
    """A file of each group at a time; with `test_every_file_has_its_turn`, every file with a command."""
    chosen = {group: files_for(name, group) for group in groups_of(name) if (CONF / group).is_dir()}
    for turn in range(max(map(len, chosen.values()), default=0)):
        compose_and_resolve(name, *(f"{group}={files[turn % len(files)]}" for group, files in chosen.items()))


def test_every_file_has_its_turn():
    had = {(group, file) for name in COMMANDS for group in groups_of(name) for file in files_for(name, group)}
    for file in filter(comes_with_a_model, GROUP_FILES):
        compose_and_resolve("stages", *overrides_for("data", file.name))
        had.add(("data", file.name))
    assert had == {(each.parent.as_posix(), each.name) for each in GROUP_FILES}


@pytest.mark.parametrize("name", COMMANDS)
def test_common_overrides_work_everywhere(name: str):
    if "model" not in groups_of(name):
        return  # trains the shipped model: nothing to choose
    overrides = ["model.path=x", "data.limit=2", "seed=3", "batch_size=5", "device=cpu", "output_dir=here"]
    cfg = compose(name, overrides)
    found = (cfg.model.path, cfg.data.limit, cfg.seed, cfg.batch_size, cfg.device, cfg.output_dir)
    assert found == ("x", 2, 3, 5, "cpu", "here")


@pytest.mark.parametrize("name", MODELS)
def test_model_settings_are_what_load_takes(name: str):
    settings = compose_and_resolve("base", f"model={name}")["model"]
    accepted = set(inspect.signature(load).parameters) | {"name", "path"}
    assert set(settings) <= accepted
    assert settings["name"] in (name, "unnamed", "given")  # the latter two are made from the path
    assert settings["trust_remote_code"] is False


@pytest.mark.parametrize("name", DATA)
def test_data_settings_are_what_the_data_set_takes(name: str):
    settings = compose_and_resolve("base", *overrides_for("data", name))["data"]
    target = get_class(settings.pop("_target_"))
    assert settings.pop("name")
    assert set(settings) == set(inspect.signature(target).parameters)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_is_explained(path: Path):
    """By a comment above it, beside it or first inside it, here or in a file that this one builds on."""
    assert path.read_text().lstrip().startswith("#"), "says nothing about itself"
    common = commented_keys(CONF / "base.yaml") | {"command", "defaults", "hydra", "name", "_target_"}
    assert set(yaml.safe_load(path.read_text()) or {}) <= commented_keys(path) | common


def commented_keys(path: Path) -> set[str]:
    keys, commented, last = set(), False, None  # a comment speaks for the block of lines under it
    for line in path.read_text().splitlines():
        commented = bool(line.strip()) and (commented or line.startswith("#"))
        if match := re.match(r"(\w+):", line):
            last = match[1]
            if commented or "#" in line:
                keys.add(last)
        elif last and line.lstrip().startswith("#"):
            keys.add(last)
    for parent in (yaml.safe_load(path.read_text()) or {}).get("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            file = path.parent / f"{parent}.yaml"
            keys |= commented_keys(file) if file.is_file() else set()  # a Hydra plugin brings its own
    return keys


def test_run_folders_are_named_after_what_was_run():
    cfg = compose("stages", ["model=hf", "model.path=owner/small-vlm-1b", "data=hf", "data.path=dir/questions.parquet"])
    assert cfg.output_dir == "outputs/stages/small-vlm-1b/questions.parquet"
    assert compose("stages").output_dir == "outputs/stages/llava_shapes/shapes"


def test_a_model_without_a_path_is_refused():
    with pytest.raises(ConfigError, match=r"set model\.path to a Hub id or a folder"):
        load_model(compose("stages", ["model=hf"]))


# ---------------------------------------------------------------- commands
@command("stages")
def stand_in(cfg: DictConfig) -> None:
    if cfg.seed == 1:
        raise ModelError("no weights in FOLDER; give a local folder (model.path=FOLDER)")
    if cfg.seed == 2:
        raise KeyboardInterrupt
    if cfg.seed == 3:
        raise ZeroDivisionError("a bug")
    print("seed", cfg.seed)


@pytest.fixture
def run(tmp_path: Path):
    return lambda *overrides: run_forked(stand_in, overrides, tmp_path)


def test_a_command_prints_its_run_folder_and_leaves_nothing_else(run, tmp_path: Path):
    done = run("seed=0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "run folder: outputs/stages/llava_shapes/shapes\nseed 0\n"
    assert not list(tmp_path.iterdir())


def test_our_errors_are_one_line_and_status_1(run):
    done = run("seed=1")
    assert done.returncode == 1
    assert done.stderr == "error: no weights in FOLDER; give a local folder (model.path=FOLDER)\n"


def test_a_setting_without_a_value_is_named(run):
    done = run("data.split=???")
    assert done.returncode == 1
    assert done.stderr == "error: needs a value: data.split=... (conf/stages.yaml says what it means)\n"
    done = run("data=hf", "data.path=???")  # which the name of the run folder is made from
    assert done.stderr == "error: needs a value: data.path=... (conf/stages.yaml says what it means)\n"


def test_an_interrupted_command_says_where_its_results_are(run):
    done = run("seed=2")
    assert done.returncode == 130
    assert done.stderr == "interrupted; what is finished is in outputs/stages/llava_shapes/shapes\n"


def test_a_bug_keeps_its_stack(run):
    done = run("seed=3")
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr
    assert "Traceback" in done.stderr


def test_a_failed_job_does_not_end_a_sweep(run):
    done = run("--multirun", "seed=1,0")
    assert done.returncode == 1
    assert "seed 0" in done.stdout
    assert "Traceback" not in done.stderr
    assert "no weights in FOLDER" in done.stderr


def test_called_with_a_configuration_a_command_is_a_function():
    @command("stages")
    def main(cfg: DictConfig) -> None:
        raise DyvteError(f"seed {cfg.seed}")

    with pytest.raises(DyvteError, match="seed 4"):
        main(compose("stages", ["seed=4"]))
