"""LLaVA's own files: the training JSON with conversations and the evaluation JSONL, with an image folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dyvte.data.base import Dataset, Sample, check_limit, text_fingerprint, unique_ids
from dyvte.data.reading import find_image, most_frequent, read_answers, read_image, read_question
from dyvte.data.video import MAX_FRAMES, Video, video_of
from dyvte.errors import BrokenSample, ConfigError, DataError

TURNS = ("first", "single", "all")


class LlavaJsonDataset(Dataset):
    """Records of LLaVA's training and evaluation files (settings: `conf/data/llava_json.yaml`).

    Training: `{"id", "image", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}`; evaluation:
    `{"question_id", "image", "text"}` with optional `answer` or `label` and `category`; as one JSON list or one record
    a line. In place of `image`, `video` names a file or a list of frames. Images are decoded as LLaVA's own loader
    does: not turned by their EXIF orientation, without their transparency (see `dyvte.data.reading.to_rgb`).
    """

    def __init__(
        self,
        file: str,
        image_folder: str | None = None,
        allow_outside: bool = False,
        turns: str = "first",
        require_image: bool = False,
        max_frames: int = MAX_FRAMES,
        limit: int | None = None,
    ) -> None:
        check_limit(limit)
        if turns not in TURNS:
            raise ConfigError(f"data.turns is {turns!r}; choose one of {', '.join(TURNS)}")
        if not file:
            raise ConfigError("no data to read: set data.file to a JSON or JSONL file")
        self.file = Path(file)
        self.image_folder = Path(image_folder) if image_folder is not None else None
        self.allow_outside, self.max_frames = allow_outside, max_frames
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.file}: {error.strerror} (set data.file)") from error
        self.entries: list[_Entry] = []
        for line, record in _records(content, self.file):
            where = f"{self.file} line {line}"
            for entry in _questions(record, turns, where):
                if not (require_image and isinstance(entry, dict) and not (entry["image"] or entry["video"])):
                    self.entries.append(entry)
            if limit is not None and len(self.entries) >= limit:
                break
        self.entries = self.entries[:limit]
        if not self.entries:
            raise DataError(f"{self.file} holds no question that data.turns and data.require_image let through")
        self.ids = unique_ids(entry.where if isinstance(entry, BrokenSample) else entry["id"] for entry in self.entries)
        self._fingerprint = text_fingerprint([content])

    def __len__(self) -> int:
        return len(self.entries)

    def where(self, index: int) -> str:
        """File and line."""
        entry = self.entries[index]
        return entry.where if isinstance(entry, BrokenSample) else str(entry["where"])

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        if isinstance(entry, BrokenSample):
            raise BrokenSample(entry.where, entry.why)
        where, name, film = entry["where"], entry["image"], entry["video"]
        question = read_question(entry["question"], where, bool(film))
        answers = read_answers(entry["answer"], where)
        image: Image.Image | Video | None = None
        if film:
            find, frame = partial(self._find, where, what="video"), partial(self._image, where)
            image = video_of(film, where, find, frame, self.max_frames)
            name = film if isinstance(film, str) else " ".join(map(str, film))
        elif name:
            image = self._image(where, name)
        return Sample(
            id=self.ids[index],
            image=image,
            question=question,
            answer=most_frequent(answers),
            kind=", ".join(read_answers(entry["kind"], where)) or "all",
            image_id=name or self.ids[index],
            metadata={"question_id": entry["question_id"]},
        )

    def _image(self, where: str, name: Any) -> Image.Image:
        if not isinstance(name, str):
            raise BrokenSample(where, f"a frame must be a file name, not {type(name).__name__}")
        return read_image(self._find(where, name), name, where, "llava")

    def _find(self, where: str, name: str, what: str = "image") -> Path | bytes:
        return find_image(name, self.image_folder, where, self.allow_outside, what=what)

    @property
    def fingerprint(self) -> str:
        """Of the file's content (the images' is not read)."""
        return self._fingerprint


_Entry = dict[str, Any] | BrokenSample


def _records(content: bytes, file: Path) -> Iterator[tuple[int, Any]]:
    """Line number and record (or a `BrokenSample`) of each element of a JSON list or each line of a JSONL file."""
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_list(content, file)
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "msg", str(error))
                yield number, BrokenSample(f"{file} line {number}", f"not a JSON record ({reason})")


def _json_list(content: bytes, file: Path) -> Iterator[tuple[int, Any]]:
    # Element by element instead of json.loads, which does not tell the lines of the elements.
    try:
        text = content.decode("utf-8-sig")
        decoder, space = json.JSONDecoder(), re.compile(r"\s*")
        position = _skip(space, text, text.index("[") + 1)
        counted, line = 0, 1
        while text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            counted = position
            record, position = decoder.raw_decode(text, position)
            yield line, record
            position = _skip(space, text, position)
            if text[position : position + 1] == ",":
                position = _skip(space, text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
        if (after := _skip(space, text, position + 1)) < len(text):
            raise json.JSONDecodeError("text behind the list", text, after)
    except json.JSONDecodeError as error:
        raise DataError(f"{file} line {error.lineno} column {error.colno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists nested as deep
        raise DataError(f"{file}: not JSON that can be read ({error})") from error


def _skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _questions(record: Any, turns: str, where: str) -> Iterator[_Entry]:
    """The questions of one record that `turns` asks for; what is wrong with the record as a `BrokenSample`."""
    if isinstance(record, BrokenSample):
        yield record
        return
    try:
        pairs = _question_answer_pairs(record, where)
        image, video = _media(record, where)
    except BrokenSample as broken:
        yield broken
        return
    if turns == "single" and len(pairs) > 1:
        return
    question_id = next((record[key] for key in ("question_id", "id") if record.get(key) is not None), where)
    for turn, (question, answer) in enumerate(pairs if turns == "all" else pairs[:1]):
        yield {
            "id": str(question_id) if turn == 0 else f"{question_id}#{turn}",
            "question_id": question_id,
            "image": image,
            "video": video,
            "question": question,
            "answer": answer,
            "kind": record.get("kind", record.get("category")),
            "where": where,
        }


def _question_answer_pairs(record: Any, where: str) -> list[tuple[Any, Any]]:
    if not isinstance(record, dict):
        raise BrokenSample(where, f"a record must be a JSON object, not {type(record).__name__}")
    if "conversations" not in record:
        if "text" not in record:
            keys = ", ".join(map(repr, record)) or "nothing"
            raise BrokenSample(where, f"a record must have 'conversations' or 'text', this one has {keys}")
        return [(record["text"], record.get("answer", record.get("label")))]
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) and "value" in t for t in turns):
        raise BrokenSample(where, "'conversations' must be a list of {'from': ..., 'value': ...}")
    turns = turns[turns[0].get("from") == "gpt" :]  # LLaVA's own code leaves out a first turn of the model
    speakers = [turn.get("from") for turn in turns]
    if not turns:
        raise BrokenSample(where, "'conversations' holds no question")
    if speakers != ["human", "gpt"] * (len(turns) // 2):
        raise BrokenSample(where, f"'conversations' must alternate between human and gpt, starts with {speakers[:3]}")
    return [(turns[i]["value"], turns[i + 1]["value"]) for i in range(0, len(turns), 2)]


def _media(record: dict[str, Any], where: str) -> tuple[str | None, str | list[Any] | None]:
    """The name of the record's image, and that of its video or its list of frames."""
    if other := next((key for key in ("audio", "audios") if record.get(key)), None):
        raise BrokenSample(where, f"names {other}; images and videos are supported, not sound")
    image, video = record.get("image") or record.get("images"), record.get("video") or record.get("videos")
    if image and video:
        raise BrokenSample(where, "names an image and a video; one of them an entry is supported")
    if isinstance(image, list):
        if len(image) > 1:
            raise BrokenSample(where, f"has {len(image)} images; one an entry is supported")
        image = image[0] if image else None
    for what, value, kinds, wanted in (
        ("image", image, str, "a file name"),
        ("video", video, (str, list), "a file name or a list of frames"),
    ):
        if value is not None and not isinstance(value, kinds):
            raise BrokenSample(where, f"{what!r} must be {wanted}, not {type(value).__name__}")
    return image or None, video or None
