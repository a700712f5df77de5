"""Hugging Face data sets, from the Hub or from local Parquet, JSON, CSV and saved data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image

from dyvte.data.base import Dataset, Sample, check_limit, text_fingerprint, unique_ids
from dyvte.data.reading import find_image, most_frequent, read_answers, read_image, read_question
from dyvte.data.video import MAX_FRAMES, Video, video_of
from dyvte.errors import BrokenSample, ConfigError, DataError

ROLES = ("image", "video", "question", "answer", "id", "kind", "image_id")
FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


class HuggingFaceDataset(Dataset):
    """Rows of a data set, with a map from what a sample needs to the columns (settings: `conf/data/hf.yaml`).

    `columns` names those of `image`, `video`, `question`, `answer`, `id`, `kind`, `image_id`; only `question` is
    required. Images may be encoded in the column, be file names, data URLs or base64, alone or in a list of one; videos
    are file names or lists of frames, which are images. Of several reference answers the most frequent is taken, all
    stay in the metadata. Numbers of a `ClassLabel` are read as the names of the classes.
    """

    def __init__(
        self,
        path: str,
        columns: Mapping[str, str | None],
        split: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        image_folder: str | None = None,
        allow_outside: bool = False,
        question_suffix: str = "",
        max_frames: int = MAX_FRAMES,
        limit: int | None = None,
    ) -> None:
        check_limit(limit)
        if not path:
            raise ConfigError("no data to read: set data.path to a Hub id, a Parquet file or a folder")
        self.columns = {role: column for role, column in columns.items() if column}
        if unknown := sorted(set(self.columns) - set(ROLES)):
            raise ConfigError(f"data.columns has unknown keys {', '.join(unknown)}; known are {', '.join(ROLES)}")
        if "question" not in self.columns:
            raise ConfigError("data.columns.question is not set: name the column that holds the question")
        rows = _one_split(_load(path, subset, split, revision), split, path)
        for role, column in self.columns.items():
            if column not in rows.column_names:
                known = ", ".join(rows.column_names)
                raise DataError(f"{path} has no column {column!r} (set data.columns.{role} to one of {known})")
        rows = rows.select_columns(list(dict.fromkeys(self.columns.values())))
        for column in {self.columns[role] for role in ("image", "video") if role in self.columns}:
            # decoded here, sample by sample, so that one broken image does not end the run
            rows = rows.cast_column(column, _undecoded(rows.features[column]))
        self.rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        self.name = f"{path} {split}" if split else path
        self.image_folder = Path(image_folder) if image_folder is not None else None
        self.allow_outside = allow_outside
        own, caches = Path(path), (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
        self.own_folders: list[Path] = []
        if image_folder is None:  # then `datasets` itself names the images, by their full path
            self.own_folders = [own if own.is_dir() else own.parent] if own.exists() else list(map(Path, caches))
        self.class_names = {role: _class_names(rows.features[column]) for role, column in self.columns.items()}
        self.question_suffix, self.max_frames = question_suffix, max_frames
        ids = self.rows[self.columns["id"]] if "id" in self.columns else range(len(self.rows))
        self.ids = unique_ids(str(each) for each in ids)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Data set and row."""
        return f"{self.name} row {index}"

    def __getitem__(self, index: int) -> Sample:
        where = self.where(index)
        row = self.rows[index]
        values = {role: row[column] for role, column in self.columns.items()}
        film, media = values.get("video"), self._image(values.get("image"), where)
        question = read_question(values["question"], where, bool(film)) + self.question_suffix
        image, image_id = self._video(film, where) if film else media
        if film and media[0] is not None:
            raise BrokenSample(where, "has an image and a video; one of them a row is supported")
        answers, kind, given_id = (
            read_answers(values.get(role), where, self.class_names.get(role)) for role in ("answer", "kind", "image_id")
        )
        return Sample(
            id=self.ids[index],
            image=image,
            question=question,
            answer=most_frequent(answers),
            kind=", ".join(kind) or "all",
            image_id=", ".join(given_id) or image_id or self.ids[index],
            metadata={"answers": answers},
        )

    def _video(self, value: Any, where: str) -> tuple[Video, str]:
        """The video of a row, and a name that equal videos share."""

        def find(name: str) -> Path | bytes:
            return find_image(name, self.image_folder, where, self.allow_outside, self.own_folders, "video")

        found = video_of(value, where, find, lambda frame: self._image(frame, where)[0], self.max_frames)
        return found, hashlib.sha256(found.tobytes()).hexdigest()[:16]

    def _image(self, value: Any, where: str) -> tuple[Image.Image | None, str | None]:
        """The image of a row, and a name that equal images share."""
        if isinstance(value, list):
            present = [each for each in value if each is not None]
            if len(present) > 1:
                raise BrokenSample(where, f"has {len(present)} images; one a row is supported")
            return self._image(present[0] if present else None, where)
        content, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if not content and not name:
            return None, None
        if not content or isinstance(content, str):
            name = str(content or name)
            content = find_image(name, self.image_folder, where, self.allow_outside, self.own_folders)
            if isinstance(content, Path):
                return read_image(content, name, where), name
        if not isinstance(content, bytes):
            kind = type(content).__name__
            raise BrokenSample(where, f"the image is {kind}; encoded bytes or a file name are supported")
        return read_image(content, "embedded in the row", where), hashlib.sha256(content).hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """Of the rows, as `datasets` keeps track of them, and the columns used."""
        return text_fingerprint([self.rows._fingerprint, repr(sorted(self.columns.items())), self.question_suffix])


def _load(
    path: str, subset: str | None, split: str | None, revision: str | None
) -> datasets.Dataset | datasets.DatasetDict:
    local = Path(path)
    try:
        if local.is_file():
            if local.suffix not in FILE_FORMATS:
                raise DataError(f"cannot read {path}: its name ends in none of {', '.join(FILE_FORMATS)}")
            return datasets.load_dataset(FILE_FORMATS[local.suffix], data_files=str(local))
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            return datasets.load_from_disk(path)
        if local.exists():
            return datasets.load_dataset(path, subset)
        _check_hub(path, revision)
        return datasets.load_dataset(path, subset, split=split, revision=revision)  # no other split is downloaded
    except StopIteration:  # what `datasets` raises where a file holds no row
        raise DataError(f"cannot load data set {path!r}: it holds no rows (set data.path)") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # "An error occurred while generating the dataset" hides what it was
        hidden = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None
        told = error.__cause__ if hidden else error
        reason = next(iter(str(told).strip().splitlines()), type(told).__name__)
        raise DataError(f"cannot load data set {path!r}: {reason} (set data.path)") from error


def _check_hub(path: str, revision: str | None) -> None:
    """Ask the Hub for the data set once, instead of the minute of retries that `load_dataset` makes offline."""
    if huggingface_hub.constants.is_offline_mode():
        return
    failed = f"cannot load data set {path!r}"
    try:
        huggingface_hub.dataset_info(path, revision=revision, timeout=10)
    except HFValidationError as error:
        raise DataError(f"{failed}: no such file or folder, and not a Hub id (set data.path)") from error
    except RevisionNotFoundError as error:
        raise DataError(f"{failed}: the Hub has no revision {revision!r} of it (set data.revision)") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"{failed}: not on the Hub under this name, or private (then run `hf auth login`)") from error
    except Exception as error:  # whatever the HTTP client raises without a connection
        raise DataError(
            f"{failed}: the Hugging Face Hub cannot be reached; set data.path to a local file, or HF_HUB_OFFLINE=1 to "
            "use what is cached here"
        ) from error


def _one_split(loaded: datasets.Dataset | datasets.DatasetDict, split: str | None, path: str) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise DataError(f"{path} has no split {split!r} (set data.split to one of {', '.join(loaded)})")
    return loaded[split]


def _undecoded(feature: Any) -> Any:
    """A column's type with its images or videos, in lists too, left as they are stored."""
    if isinstance(feature, (datasets.Image, datasets.Video)):
        return type(feature)(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_undecoded(feature.feature))
    return feature


def _class_names(feature: Any) -> list[str] | None:
    """Names of the classes that a column's numbers stand for, None for another column."""
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
