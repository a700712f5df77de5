"""What a data set is to the rest of the package, and what all of them share."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from dyvte.errors import BrokenSample, ConfigError


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: Unique in its data set.
        image: RGB image, or None for a question without one.
        question: What the user says, without image placeholders and chat template.
        answer: The reference answer, or None where there is none.
        kind: What results are grouped by (question kind, benchmark category).
        image_id: The same for questions about the same image: they share a visual prefill and form one cluster of a
            bootstrap.
        metadata: Whatever else the source says, JSON types only.
    """

    id: str
    image: Image.Image | None
    question: str
    answer: str | None
    kind: str
    image_id: str
    metadata: dict[str, Any] = field(default_factory=dict)


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

    def __iter__(self) -> Iterator[Sample]:
        """All samples; the first broken one raises."""
        return (self[index] for index in range(len(self)))

    def readable(self) -> Iterator[Sample]:
        """The samples that are not broken."""
        for index in range(len(self)):
            with suppress(BrokenSample):
                yield self[index]


def build_dataset(cfg: DictConfig) -> Dataset:
    """The data set of a configuration in `conf/data/`: its `_target_` called with the other keys (without `name`)."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    settings.pop("name", None)
    return get_class(settings.pop("_target_"))(**settings)


def check_limit(limit: int | None) -> None:
    """Raise a `ConfigError` unless `limit` is None or a positive number."""
    if limit is not None and limit < 1:
        raise ConfigError(f"data.limit is {limit}; give a positive number, or null for all samples")


def check_question(question: Any, where: str) -> str:
    """The question as text, stripped; raises `BrokenSample` for anything else and for an empty one."""
    if not isinstance(question, str):
        raise BrokenSample(where, f"the question is {type(question).__name__}, not text")
    if not question.strip():
        raise BrokenSample(where, "the question is empty")
    return question.strip()


def read_image(source: Path | bytes, name: str, where: str) -> Image.Image:
    """Decode an image completely, as RGB.

    Args:
        source: File, or its content.
        name: What to call it in an error.
        where: File and line of the sample it belongs to.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        reason = "not an image that Pillow can read" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BrokenSample(where, f"image {name!r} is unreadable ({reason})") from error


def find_image(name: str, folder: Path | None, where: str) -> Path:
    """The path of an image file named by a sample; raises `BrokenSample` if there is none."""
    path = Path(name) if folder is None else folder / name
    if not path.is_file():
        under = f" under {folder}/" if folder is not None else ""
        raise BrokenSample(where, f"image {name!r} not found{under} (set data.image_folder)")
    return path


def unique_ids(ids: Iterable[str]) -> list[str]:
    """The ids, with `~2`, `~3`, ... on repetitions: tables are joined by id, and LLaVA's training file repeats some."""
    copies: Counter[str] = Counter()
    unique: list[str] = []
    taken: set[str] = set()
    for each in ids:
        name = each
        while name in taken:
            copies[each] += 1
            name = f"{each}~{copies[each] + 1}"
        taken.add(name)
        unique.append(name)
    return unique


def text_fingerprint(lines: Iterable[str | bytes]) -> str:
    """SHA-256 of some lines, shortened to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line if isinstance(line, bytes) else line.encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]
