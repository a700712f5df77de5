"""What a data set is to the rest of the package, and what all of them share."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from dyvte.data.video import Video
from dyvte.errors import BrokenSample, ConfigError
from dyvte.runs.targets import build


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: Unique in its data set.
        image: RGB image, or video, or None for a question without one.
        question: What the user says, without image placeholders and chat template.
        answer: The reference answer, or None where there is none.
        kind: What results are grouped by (question kind, benchmark category).
        image_id: The same for questions about the same image: they form one cluster of a bootstrap. It may also name
            what several images have in common (a patient, a video); see `image_numbers` for what shares a prefill.
        metadata: Whatever else the source says, JSON types only.
    """

    id: str
    image: Image.Image | Video | None
    question: str
    answer: str | None
    kind: str
    image_id: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def picture(self) -> Image.Image | None:
        """The image, for what shows it; None where the question is about a video or shows none."""
        return None if isinstance(self.image, Video) else self.image


class Dataset(ABC):
    """A sequence of samples. Questions about the same image should be neighbours: they are then computed together."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples, broken ones included."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, its image read from disk or drawn.

        Raises:
            BrokenSample: The sample cannot be used; the message names file and line, or data set and row.
            IndexError: There is no such sample.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when any sample does. A run is only continued on the data that it was started on."""

    def where(self, index: int) -> str:
        """Where a reader finds sample `index`: file and line, or data set and row."""
        return f"{type(self).__name__} sample {index}"

    def __iter__(self) -> Iterator[Sample]:
        """All samples; the first broken one raises."""
        return (self[index] for index in range(len(self)))

    def readable(self) -> Iterator[Sample]:
        """The samples that are not broken."""
        for index in range(len(self)):
            with suppress(BrokenSample):
                yield self[index]


def build_dataset(cfg: DictConfig, stored: bool = False, own: DictConfig | None = None) -> Dataset:
    """The data set of a configuration in `conf/data/`: its `_target_` called with the other keys (without `name`).

    Args:
        cfg: the configuration.
        stored: whether it was read from a file, as that of a run folder: then nothing in it is filled in from the
            environment, its class must be one of dyvte's, and its files must lie in the current folder.
        own: what the user has given as data; its class and its files are allowed too.

    Raises:
        ConfigError: the class or a setting is not possible.
    """
    settings: Any = OmegaConf.to_container(cfg, resolve=not stored)
    settings.pop("name", None)
    if "_target_" not in settings:
        raise ConfigError("data has no _target_: choose one of conf/data/, for instance data=llava_json")
    given: Any = {} if own is None else OmegaConf.to_container(own, resolve=True)
    if stored:
        _check_files(settings, given)
    return build(settings, Dataset, stored=stored, known=given.get("_target_", ""))


def _check_files(settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse stored settings that would read files which the user has not named."""
    for name, value in settings.items():
        if value == given.get(name):
            continue
        if name == "allow_outside" and value:
            raise ConfigError(
                "a stored configuration has allow_outside=true: say so yourself with data.allow_outside=true"
            )
        if not isinstance(value, str):
            continue
        path = Path(os.path.normpath(Path.cwd() / value))  # links are followed, those in a folder are its owner's
        if value.startswith("~") or not path.is_relative_to(Path.cwd()):
            raise ConfigError(
                f"a stored configuration names data outside of the current folder, {name}={value}: say that it may be "
                f"read with data.{name}={value}"
            )


def check_limit(limit: int | None) -> None:
    """Refuse a `data.limit` that is neither None nor a positive whole number."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ConfigError(f"data.limit is {limit}; give a positive whole number, or null for all samples")


def image_numbers(samples: Sequence[Sample]) -> list[int]:
    """Equal numbers for questions on the same pixels; a question without image has its own.

    The same `image_id` alone is not enough: it may name a patient or a video with several images.
    """
    seen: dict[tuple[Any, ...], int] = {}
    numbers = []
    for row, sample in enumerate(samples):
        image = sample.image
        key = (row,) if image is None else (sample.image_id, image.size, hashlib.sha256(image.tobytes()).digest())
        numbers.append(seen.setdefault(key, len(seen)))
    return numbers


def sample_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """What every table of samples says of them: ids, kind, metadata (as JSON), question and reference answer."""
    return {
        "id": [sample.id for sample in samples],
        "image_id": [sample.image_id for sample in samples],
        "kind": [sample.kind for sample in samples],
        "metadata": [json.dumps(sample.metadata, sort_keys=True) for sample in samples],
        "question": [sample.question for sample in samples],
        "reference": [sample.answer for sample in samples],
    }


def unique_ids(ids: Iterable[str]) -> list[str]:
    """The ids, with `~2`, `~3`, ... on repetitions: tables are joined by id, and LLaVA's training file repeats some."""
    copies: Counter[str] = Counter()
    unique: list[str] = []
    taken: set[str] = set()
    for each in ids:
        plain = each.encode("utf-8", "replace").decode()  # a lone surrogate fits into no table
        name = plain
        while name in taken:
            copies[plain] += 1
            name = f"{plain}~{copies[plain] + 1}"
        taken.add(name)
        unique.append(name)
    return unique


def text_fingerprint(lines: Iterable[str | bytes]) -> str:
    """SHA-256 of some lines, shortened to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()[:16]
