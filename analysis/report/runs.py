"""The run folders that a report is made of: finding them, and the command that makes each of them again."""

from __future__ import annotations

import glob
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dyvte.errors import RunFolderError
from dyvte.runs.config import compose, config_folder


@dataclass(frozen=True)
class Step:
    """One of the commands whose results a report shows.

    Attributes:
        name: key in `runs` of `conf/report.yaml`.
        module: what `python -m` runs.
        arguments: what a first run is given beside the model and the data.
        gives: what the report shows of it.
        own_data: the data are not those that the report is about.
    """

    name: str
    module: str
    arguments: str
    gives: str
    own_data: bool = False


STEPS = (
    Step("stages", "analysis.stages", "", "attention between image and text in every layer, and the verdict on stages"),
    Step("exits", "analysis.exits", "", "what happens if the image leaves at exit layer k, for every k"),
    Step("train", "dyvte.train", "", "gates that decide for each question when the image leaves", own_data=True),
    Step(
        "evaluate",
        "dyvte.evaluate",
        "--multirun policy=none,dynamic_exit",
        "what policies cost in answers and save in computation",
    ),
    Step("tables", "analysis.tables", "", "methods at matched cost"),
    Step("cost", "analysis.cost", "", "measured latency, FLOPs and memory"),
)
CONFIGS = {step.name: step.module.rpartition(".")[2] for step in STEPS}
GROUPS = ("model", "data", "policy", "experiment", "recipe")
"""Config groups whose files carry their own name as `name`."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        step: which command made it.
        name: the step, and what tells several runs of it apart: `evaluate/dynamic_exit`. Unique on a page.
        path: its folder.
        summary: its `summary.json`.
        config: its `config.yaml`; empty where there is none.
        fingerprint: what it depends on; empty where there is none.
    """

    step: str
    name: str
    path: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    fingerprint: dict[str, Any]

    @classmethod
    def read(cls, step: str, name: str, path: Path) -> Run:
        """The run in a folder.

        Raises:
            RunFolderError: a file of it cannot be read.
        """
        return cls(
            step,
            name,
            path,
            _read(path / "summary.json", json.loads),
            _read(path / "config.yaml", yaml.safe_load),
            _read(path / "fingerprint.json", json.loads),
        )

    def value(self, pointer: str) -> Any:
        """What stands in `summary.json` at a JSON pointer (RFC 6901); None where nothing does."""
        return lookup(self.summary, pointer)

    def figures(self) -> list[Path]:
        """Its figures, in alphabetical order."""
        return sorted(self.path.glob("figures/*.png"))

    @property
    def weights(self) -> str | None:
        """Digest of the weights of the model."""
        found = lookup(self.fingerprint, "/model/weights") or lookup(self.fingerprint, "/labels/model/weights")
        return None if found is None else str(found)

    @property
    def data(self) -> str | None:
        """Digest of the data; None for data of the step's own."""
        found = None if self.step == "train" else lookup(self.fingerprint, "/data/content")
        return None if found is None else str(found).partition("+")[0]  # exits adds captions, which it keeps apart


def _read(path: Path, parse: Any) -> dict[str, Any]:
    try:
        return dict(parse(path.read_text()) or {}) if path.is_file() else {}
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise RunFolderError(
            f"{path}: cannot be read ({' '.join(str(error).split())}); run its command again"
        ) from None


def lookup(content: Any, pointer: str) -> Any:
    """The value at a JSON pointer in nested dicts and lists, None where there is none."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(content, Mapping):
            content = content.get(key)
        elif (
            isinstance(content, Sequence) and not isinstance(content, str) and key.isdigit() and int(key) < len(content)
        ):
            content = content[int(key)]
        else:
            return None
    return content


def pointer(*parts: Any) -> str:
    """The JSON pointer of a path of keys and indices."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


Limits = tuple[str, str]
"""JSON pointers of the lower and the upper limit of an interval."""


def ends(place: str) -> Limits:
    """Where the limits of an interval stand that is stored as `[lower, upper]`."""
    return f"{place}/0", f"{place}/1"


def band_places(place: str, index: int | None = None) -> tuple[str, Limits]:
    """Where the mean and the limits stand of what is stored as `{mean, low, high}`.

    Args:
        place: of the whole.
        index: of an entry, where mean and limits are lists.
    """
    tail = "" if index is None else f"/{index}"
    return f"{place}/mean{tail}", (f"{place}/low{tail}", f"{place}/high{tail}")


# ------------------------------------------------------------------------ finding


def find_runs(patterns: Mapping[str, str]) -> tuple[list[Run], dict[str, list[Path]]]:
    """The finished runs below some folders, in the order of `STEPS`, and the folders of unfinished ones.

    Args:
        patterns: step -> folder, in which `*` stands for any name; steps that are not in it are not looked for.
    """
    runs: list[Run] = []
    unfinished: dict[str, list[Path]] = {}
    for step in STEPS:
        for path, stars in _matches(patterns[step.name]) if step.name in patterns else ():
            if (path / "summary.json").is_file():
                runs.append(Run.read(step.name, "/".join((step.name, *stars)), path))
            elif (path / "fingerprint.json").is_file():
                unfinished.setdefault(step.name, []).append(path)
    return runs, unfinished


def _matches(pattern: str) -> list[tuple[Path, list[str]]]:
    """Folders that fit, with what each `*` stands for. Other characters, brackets too, are taken as they are."""
    parts = str(Path(pattern)).split("*")
    text = "([^/]*)".join(map(re.escape, parts))
    found = []
    anchor = Path(pattern).anchor
    for path in sorted(Path(anchor).glob("*".join(map(glob.escape, parts)).removeprefix(anchor))):
        match = re.fullmatch(text, str(path))
        if match is not None and path.is_dir():
            found.append((path, list(match.groups())))
    return found


def disagreements(runs: Sequence[Run]) -> list[str]:
    """Sentences on runs that are not of the same weights or the same data and so cannot be read together."""
    notes = []
    for what, attribute in (("weights of the model", "weights"), ("questions", "data")):
        groups: dict[str, list[str]] = {}
        for run in runs:
            digest = getattr(run, attribute)
            if digest is not None:
                groups.setdefault(digest, []).append(run.name)
        if len(groups) > 1:
            listed = "; ".join(f"{', '.join(names)} ({digest})" for digest, names in groups.items())
            notes.append(f"These runs were made with different {what}: {listed}. Their numbers are not comparable.")
    return notes


# ------------------------------------------------------------------------ commands


def first_command(step: Step, given: Sequence[str]) -> str:
    """The command that makes what is missing.

    Args:
        step: what is missing.
        given: overrides that choose model and data; a step with data of its own takes those of the model.
    """
    chosen = [each for each in given if not (step.own_data and each.startswith("data"))]
    return " ".join([f"python -m {step.module}", *([step.arguments] if step.arguments else []), *chosen])


def command_of(run: Run) -> str:
    """The command that makes a run again, from the configuration that it saved."""
    (step,) = (each for each in STEPS if each.name == run.step)
    words = [f"python -m {step.module}", *map(shlex.quote, overrides_of(run.config, CONFIGS[run.step]))]
    return " ".join(words)


def overrides_of(config: Mapping[str, Any], name: str) -> list[str]:
    """Overrides under which the command `name` composes `config`; `overwrite` is left as it is.

    Files of the config groups come first, then settings, then names of folders that do not follow from those.
    """
    composed = compose(name)
    files = {group: _file(config, group) for group in GROUPS if group in composed}
    overrides = [
        f"{group}={file}"
        for group, file in files.items()
        if file is not None and lookup(config, f"/{group}/name") != _resolved(composed, f"{group}.name")
    ]
    if overrides:
        composed = compose(name, overrides)
    wanted = {key: value for key, value in leaves(config) if key != "overwrite"}
    raw = dict(leaves(OmegaConf.to_container(composed, resolve=False)))
    given = [key for key in wanted if not _interpolated(raw.get(key)) and _resolved(composed, key) != wanted[key]]
    if given:
        overrides += [_assignment(key, wanted[key], raw) for key in given]
        composed = compose(name, overrides)
    while other := [key for key, value in wanted.items() if _resolved(composed, key) != value]:
        # Named by hand, though they could follow from other settings; those that follow from one of them come later.
        key = next((each for each in other if not any(f"${{{one}}}" in str(raw.get(each)) for one in other)), other[0])
        if (assignment := _assignment(key, wanted.pop(key), raw)) not in overrides:
            overrides.append(assignment)
            composed = compose(name, overrides)
    return overrides


def _file(config: Mapping[str, Any], group: str) -> str | None:
    """The file of a config group that some settings are from, None where no file fits.

    Names may carry a setting behind that of their file (`fastv_2_0.5`), and those of Hub models are made from the path.
    """
    folder, name = config_folder() / group, str(lookup(config, f"/{group}/name"))
    if (folder / f"{name}.yaml").is_file():
        return name
    target = lookup(config, f"/{group}/_target_")
    if target is None:
        return "hf" if group == "model" else None
    targets = {file.stem: (yaml.safe_load(file.read_text()) or {}).get("_target_") for file in folder.glob("*.yaml")}
    fitting = [stem for stem, found in targets.items() if found == target]
    return max(fitting, key=lambda stem: (name.startswith(stem), len(stem)), default=None)


def leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a configuration by their dotted names; an empty group is one setting."""
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content


def _interpolated(value: Any) -> bool:
    return "${" in str(value)


def _resolved(cfg: DictConfig, key: str) -> Any:
    """A setting as plain data; None where there is none, or where it follows from one that has no value yet."""
    try:
        found = OmegaConf.select(cfg, key, default=None)
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except OmegaConfBaseException:
        return None


def _assignment(key: str, value: Any, raw: Mapping[str, Any]) -> str:
    return f"{'' if key in raw else '++'}{key}={_quoted(value)}"


def _quoted(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_quoted(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_quoted, value)) + "]"
    if re.fullmatch(r"[A-Za-z_./][\w./+-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


@contextmanager
def other_commands() -> Iterator[None]:
    """Lets `dyvte.runs.config.compose` work inside a command, which Hydra allows one configuration only."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running
