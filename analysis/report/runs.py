"""The run folders that a report is made of: finding them, and the command that made each of them."""

from __future__ import annotations

import glob
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dyvte.errors import RunFolderError


@dataclass(frozen=True)
class ReportStep:
    """One of the commands whose results a report shows.

    Attributes:
        module: what `python -m` runs.
        gives: what the report shows of it.
        arguments: what a first run is given beside the model and the data.
        own_data: the data are not those that the report is about.
    """

    module: str
    gives: str
    arguments: str = ""
    own_data: bool = False

    @property
    def name(self) -> str:
        """Key in `runs` of `conf/report.yaml`."""
        return self.module.rpartition(".")[2]


REPORT_STEPS = (
    ReportStep("analysis.stages", "attention between image and text in every layer, and the verdict on stages"),
    ReportStep("analysis.exits", "what happens if the image leaves at exit layer k, for every k"),
    ReportStep("analysis.knockout", "what an answer loses when a path through attention is cut"),
    ReportStep("analysis.stage_table", "which stages hold by attention, and which by cause"),
    ReportStep("analysis.lens", "what each patch says after each layer, and when the answer appears"),
    ReportStep("dyvte.train", "gates that decide for each question when the image leaves", own_data=True),
    ReportStep(
        "dyvte.evaluate",
        "what policies cost in answers and save in computation",
        "--multirun policy=none,dynamic_exit",
    ),
    ReportStep("analysis.tables", "methods at matched cost"),
    ReportStep("analysis.cost", "measured latency, FLOPs and memory"),
)
OVERRIDES = "overrides.yaml"
"""File of a run folder with the words that Hydra was given, a list."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        step: which command made it.
        name: the step, and what tells several runs of it apart: `evaluate/dynamic_exit`. Unique on a page.
        config, fingerprint: its settings, and what it depends on; empty where they are not recorded.
        overrides: what its command was given; None where that is not recorded.
    """

    step: str
    name: str
    path: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    fingerprint: dict[str, Any]
    overrides: list[str] | None = None

    @classmethod
    def read(cls, step: str, name: str, path: Path) -> FinishedRun:
        """The run in a folder.

        Raises:
            RunFolderError: a file of it cannot be read.
        """
        contents = (
            _read(path / "summary.json", json.loads, {}),
            _read(path / "config.yaml", yaml.safe_load, {}),
            _read(path / "fingerprint.json", json.loads, {}),
        )
        return cls(step, name, path, *contents, _read(path / OVERRIDES, yaml.safe_load, None))

    def value(self, pointer: str) -> Any:
        """What stands in `summary.json` at a JSON pointer (RFC 6901); None where nothing does."""
        return lookup(self.summary, pointer)

    def figures(self) -> list[Path]:
        """Its figures, in alphabetical order."""
        return sorted(self.path.glob("figures/*.png"))

    @property
    def command(self) -> str | None:
        """The command that made it, as one would type it; None where the run folder does not say."""
        if self.overrides is None:
            return None
        (step,) = (each for each in REPORT_STEPS if each.name == self.step)
        return " ".join(["python -m", step.module, *map(shlex.quote, self.overrides)])

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


def _read(path: Path, parse: Any, default: Any) -> Any:
    """Content of a file, of the type of `default` (or a list of words where that is None)."""
    if not path.is_file():
        return default
    try:
        content = parse(path.read_text())
        return [str(each) for each in content or []] if default is None else dict(content or {})
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise RunFolderError(f"{path}: cannot be read ({why}); run its command again") from None


def lookup(content: Any, pointer: str) -> Any:
    """The value at a JSON pointer in nested dicts and lists, None where there is none."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(content, Mapping):
            content = content.get(key)
        elif isinstance(content, list) and key.isdigit() and int(key) < len(content):
            content = content[int(key)]
        else:
            return None
    return content


def known_values(curve: Sequence[float | None]) -> list[tuple[int, float]]:
    """Place and value of the entries of a curve that are known."""
    return [(index, value) for index, value in enumerate(curve) if value is not None]


def pointer(*parts: Any) -> str:
    """The JSON pointer of a path of keys and indices."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


Limits = tuple[str, str]
"""JSON pointers of the lower and the upper limit of an interval."""


def limits_of(place: str) -> Limits:
    """Where the limits of an interval stand that is stored as `[lower, upper]`."""
    return f"{place}/0", f"{place}/1"


def band_places(place: str, index: int | None = None) -> tuple[str, Limits]:
    """Where mean and limits stand of what is stored as `{mean, low, high}`, or of an entry where these are lists."""
    tail = "" if index is None else f"/{index}"
    return f"{place}/mean{tail}", (f"{place}/low{tail}", f"{place}/high{tail}")


def find_runs(patterns: Mapping[str, str]) -> tuple[list[FinishedRun], dict[str, list[Path]]]:
    """The finished runs below some folders, in the order of `REPORT_STEPS`, and the folders of unfinished ones.

    Args:
        patterns: step -> folder, in which `*` stands for any name; steps that are not in it are not looked for.
    """
    runs: list[FinishedRun] = []
    unfinished: dict[str, list[Path]] = {}
    for step in REPORT_STEPS:
        for path, stars in _matches(patterns[step.name]) if step.name in patterns else ():
            if (path / "summary.json").is_file():
                runs.append(FinishedRun.read(step.name, "/".join((step.name, *stars)), path))
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


def disagreements(runs: Sequence[FinishedRun]) -> list[str]:
    """Sentences on runs that are not of the same weights or the same data and so cannot be read together."""
    notes = []
    for what, attribute in (("weights of the model, or model.dtype", "weights"), ("questions", "data")):
        groups: dict[str | None, list[str]] = {}
        for run in runs:
            groups.setdefault(getattr(run, attribute), []).append(run.name)
        groups.pop(None, None)  # runs that do not say
        if len(groups) > 1:
            listed = "; ".join(f"{', '.join(names)} ({digest})" for digest, names in groups.items())
            notes.append(f"These runs were made with different {what}: {listed}. Their numbers are not comparable.")
    return notes


def first_command(step: ReportStep, given: Sequence[str]) -> str:
    """The command that makes what is missing, with those of the given overrides that choose its model and data."""
    chosen = [each for each in given if not (step.own_data and each.startswith("data"))]
    return " ".join([f"python -m {step.module}", *([step.arguments] if step.arguments else []), *chosen])


def settings_in(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a configuration by their dotted names; an empty group is one setting."""
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from settings_in(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content
