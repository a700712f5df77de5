"""What every command shares: where the configurations are, how a command starts, and how it fails.

A command is a function of one configuration:

    @command("stages")
    def main(cfg: DictConfig) -> str | None: ...

    if __name__ == "__main__":
        main()
"""

from __future__ import annotations

import errno
import functools
import sys
import traceback
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
from dyvte.runs.settings import check_settings, leaves
from dyvte.runs.terminal import help_text, quiet_libraries

if TYPE_CHECKING:
    from dyvte.mllm import MLLM

HYDRA_VERSION = "1.3"
Task = Callable[[DictConfig], str | None]
"""What a command does with its configuration; returns what it found, in one line."""


def config_folder() -> Path:
    """Folder of the Hydra configurations: `dyvte/_conf` in an installed package, `conf/` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "_conf", package.parent / "conf")
    for folder in candidates:
        if (folder / "base.yaml").is_file():
            return folder
    raise ConfigError(f"no configurations in {' or '.join(map(str, candidates))} (reinstall dyvte)")


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that a command would get, for notebooks and tests.

    `name` is that of a file under `conf/` without its ending, overrides are as on the command line: `["data.limit=8"]`.
    """
    with hydra.initialize_config_dir(version_base=HYDRA_VERSION, config_dir=str(config_folder())):
        cfg = hydra.compose(config_name=name, overrides=list(overrides))
    cfg.__dict__["dyvte_overrides"] = list(overrides)  # for the run folder, see `dyvte.runs.store.overrides_of`
    return cfg


def command(name: str) -> Callable[[Task], Callable[..., str | None]]:
    """Make a function a command whose settings are `conf/<name>.yaml` and the `key=value` words after it.

    It checks the settings (`dyvte.runs.settings`), prints the run folder first and last the line that the function
    returns: what was found, in words. Warnings of libraries are kept off unless `verbose=true`. The project's own
    errors (`DyvteError`) and what libraries raise at the edges (files, disk, device) end the process with one line on
    stderr and status 1, below it the stack with `debug=true`; Ctrl-C with status 130. Called with a configuration, as
    in `main(compose("stages"))`, it is an ordinary function and raises.
    """

    def decorate(task: Task) -> Callable[..., str | None]:
        @functools.wraps(task)
        def run(cfg: DictConfig) -> str | None:
            if not HydraConfig.initialized():
                check_settings(cfg)
                return task(cfg)
            if not cfg.get("verbose"):
                quiet_libraries()
            try:
                if missing := missing_settings(cfg):
                    settings = " ".join(f"{key}=..." for key in missing)
                    raise ConfigError(f"needs a value: {settings} (conf/{name}.yaml says what it means)")
                check_settings(cfg)
                if cfg.get("output_dir") is not None:
                    print(f"run folder: {cfg.output_dir}", flush=True)
                found = task(cfg)
                if found:
                    print(f"found: {found}", flush=True)
                return found
            except Exception as error:
                line = one_line(error)
                if line is None:
                    raise  # a bug keeps its stack
                if cfg.get("debug"):
                    traceback.print_exc()
                if HydraConfig.get().mode == RunMode.MULTIRUN:  # the other jobs of the sweep go on
                    raise CompactHydraException(line) from error
                sys.exit(f"error: {line}")
            except KeyboardInterrupt:
                print(f"interrupted; what is finished is in {cfg.get('output_dir', '.')}", file=sys.stderr)
                sys.exit(130)

        decorated: Callable[..., str | None] = hydra.main(
            version_base=HYDRA_VERSION, config_path=str(config_folder()), config_name=name
        )(run)
        return decorated

    return decorate


def one_line(error: BaseException) -> str | None:
    """What a user has to know of an error, in one line; None for a bug, which is for its stack to tell."""
    text = " ".join(str(error).split())
    if isinstance(error, DyvteError):
        return text
    kind = f"{type(error).__module__}.{type(error).__name__}"
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return f"no space left on the disk ({error.filename or text}); free some and start again: it continues"
        if isinstance(error, PermissionError):
            return f"no permission to write or read {error.filename or text}"
        return text or type(error).__name__
    if kind.startswith(("safetensors", "safetensors_rust")):
        return f"a safetensors file is damaged or incomplete ({text}); copy or download it again"
    if kind.startswith(("pyarrow", "omegaconf", "hydra", "PIL", "huggingface_hub", "json.decoder")):
        return f"{type(error).__name__}: {text}"
    if kind == "torch.OutOfMemoryError" or "CUDA out of memory" in text:
        return "out of memory on the device: set batch_size= to a smaller number, or device=cpu"
    if kind == "torch.AcceleratorError" or text.startswith(("CUDA error", "Found no NVIDIA driver", "No CUDA GPUs")):
        return f"the device failed: {text[:200]}"
    if isinstance(error, MemoryError):
        return f"out of memory{': ' + text if text else ''}; set batch_size= or data.limit= to a smaller number"
    return None


def check_device(device: str) -> None:
    """Raise a `ConfigError` where torch has no such device here."""
    import torch

    kind, _, number = device.partition(":")
    count = {"cuda": torch.cuda.device_count, "mps": torch.mps.device_count}.get(kind, lambda: 1)()
    if count == 0:
        raise ConfigError(f"device={device}: torch sees none here; set device=cpu")
    if number and int(number) >= count:
        raise ConfigError(f"device={device}: there are {count} here, counted from 0")


def missing_settings(cfg: DictConfig) -> list[str]:
    """Keys that a user has to give a value (`???` in the file), as on the command line: `policy.layer`."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    return sorted(".".join(path) for path, value in leaves(plain) if value == "???")


def load_model(cfg: DictConfig) -> MLLM:
    """The model of `cfg.model` on `cfg.device`, through `dyvte.load`.

    For a model of the Hub `cfg.model.revision` becomes the commit that was loaded, so that the `config.yaml` of a run
    names it and the run can be repeated after the branch has moved.
    """
    from dyvte.loading import load

    settings: Any = OmegaConf.to_container(cfg.model, resolve=True)
    del settings["name"]
    path = settings.pop("path")
    if not path:
        raise ConfigError("no model to load: set model.path to a Hub id or a folder")
    device = None if cfg.device == "auto" else cfg.device
    if device is not None:
        check_device(device)
    if device is None and distributed.world_size() > 1:
        device = distributed.device()  # each process has a GPU of its own
    mllm = load(path, device=device, **settings)
    if mllm.commit is not None:
        OmegaConf.update(cfg, "model.revision", mllm.commit, force_add=True)
    return mllm


_RESOLVERS: dict[str, Callable[..., str]] = {
    "help": lambda *, _root_: help_text(_root_),
    # a name with its setting, `vtw_8`; the name alone where the setting is left open
    "name_with": lambda name, setting: name if setting is None else f"{name}_{setting}",
    # a Hub id or path as one folder name: `llava-hf/llava-1.5-7b-hf` -> `llava-1.5-7b-hf`
    "folder_name": lambda path: Path(path).resolve().name if path else "unnamed",
    "join": "+".join,
}
for _name, _resolver in _RESOLVERS.items():
    OmegaConf.register_new_resolver(f"dyvte.{_name}", _resolver, replace=True)
