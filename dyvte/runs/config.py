"""What every command shares: where the configurations are, how a command starts, and how it fails.

A command is a function of one configuration:

    @command("stages")
    def main(cfg: DictConfig) -> None: ...

    if __name__ == "__main__":
        main()
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dyvte.errors import ConfigError, DyvteError
from dyvte.runs import distributed

if TYPE_CHECKING:
    from dyvte.mllm import MLLM

HYDRA_VERSION = "1.3"


def config_folder() -> Path:
    """Folder of the Hydra configurations: `dyvte/_conf` in an installed package, `conf/` in a checkout.

    Raises:
        ConfigError: Neither folder exists.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "_conf", package.parent / "conf")
    for folder in candidates:
        if (folder / "base.yaml").is_file():
            return folder
    raise ConfigError(f"no configurations in {' or '.join(map(str, candidates))} (reinstall dyvte)")


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that a command would get, for notebooks and tests.

    Args:
        name: File under `conf/` without its ending, for instance `stages`.
        overrides: As on the command line: `["model=llava7b", "data.limit=8"]`.
    """
    with hydra.initialize_config_dir(version_base=HYDRA_VERSION, config_dir=str(config_folder())):
        return hydra.compose(config_name=name, overrides=list(overrides))


def command(name: str) -> Callable[[Callable[[DictConfig], None]], Callable[..., None]]:
    """Make a function a command whose settings are `conf/<name>.yaml` and the `key=value` words after it.

    It prints the run folder first. The project's own errors (`DyvteError`) end the process with one line on stderr and
    status 1, Ctrl-C with status 130. Called with a configuration, as in `main(compose("stages"))`, it is an ordinary
    function and raises.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[..., None]:
        @functools.wraps(task)
        def run(cfg: DictConfig) -> None:
            if not HydraConfig.initialized():
                return task(cfg)
            try:
                if missing := missing_settings(cfg):
                    settings = " ".join(f"{key}=..." for key in missing)
                    raise ConfigError(f"needs a value: {settings} (conf/{name}.yaml says what it means)")
                if "output_dir" in cfg:
                    print(f"run folder: {cfg.output_dir}", flush=True)
                task(cfg)
            except DyvteError as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:  # the other jobs of the sweep go on
                    raise CompactHydraException(str(error)) from error
                sys.exit(f"error: {error}")
            except KeyboardInterrupt:
                print(f"interrupted; what is finished is in {cfg.get('output_dir', '.')}", file=sys.stderr)
                sys.exit(130)

        decorated: Callable[..., None] = hydra.main(
            version_base=HYDRA_VERSION, config_path=str(config_folder()), config_name=name
        )(run)
        return decorated

    return decorate


def missing_settings(cfg: DictConfig) -> list[str]:
    """Keys that a user has to give a value (`???` in the file), as on the command line: `policy.layer`."""
    found = []
    todo: list[tuple[str, Any]] = [("", OmegaConf.to_container(cfg, resolve=False))]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            todo.extend((f"{path}.{key}" if path else str(key), each) for key, each in value.items())
        elif value == "???":
            found.append(path)
    return sorted(found)


def load_model(cfg: DictConfig) -> MLLM:
    """The model of `cfg.model` on `cfg.device`, through `dyvte.load`.

    For a model of the Hub `cfg.model.revision` becomes the commit that was loaded, so that the `config.yaml` of a run
    names it and the run can be repeated after the branch has moved.

    Raises:
        ConfigError: `model.path` is not set.
        ModelError: The model cannot be loaded.
    """
    from dyvte.loading import load

    settings: Any = OmegaConf.to_container(cfg.model, resolve=True)
    del settings["name"]
    path = settings.pop("path")
    if not path:
        raise ConfigError("no model to load: set model.path to a Hub id or a folder")
    device = None if cfg.device == "auto" else cfg.device
    if device is None and distributed.world_size() > 1:
        device = distributed.device()  # each process has a GPU of its own
    mllm = load(path, device=device, **settings)
    if mllm.commit is not None:
        OmegaConf.update(cfg, "model.revision", mllm.commit, force_add=True)
    return mllm


def _folder_name(path: str | None) -> str:
    """A Hub id or path as one folder name: `llava-hf/llava-1.5-7b-hf` -> `llava-1.5-7b-hf`."""
    return Path(path).resolve().name if path else "unnamed"


def _name_with(name: str, setting: Any) -> str:
    """A name with its setting, `vtw_8`; the name alone where the setting is left open."""
    return name if setting is None else f"{name}_{setting}"


OmegaConf.register_new_resolver("dyvte.name_with", _name_with, replace=True)
OmegaConf.register_new_resolver("dyvte.folder_name", _folder_name, replace=True)
OmegaConf.register_new_resolver("dyvte.join", "+".join, replace=True)
