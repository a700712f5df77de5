"""Files that somebody else may have written: every error names the file, and no name in one leads out of its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dyvte.errors import DyvteError, ModelError

MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"),
    *("preprocessor_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json"),
)
"""JSON files of a model in Hub layout; transformers ignores some of them when they are damaged."""


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def short(value: Any) -> str:
    """A value from a file as it fits into an error."""
    shown = "".join(each if each.isprintable() else "?" for each in repr(value)[:200])
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def read_json(
    path: Path, kind: type[DyvteError] = ModelError, remedy: str = "copy or download it again"
) -> dict[str, Any]:
    """The JSON object in a file; a file that is missing, damaged or holds something else is an error of some kind.

    Example:
        >>> read_json(Path("nowhere.json"))
        Traceback (most recent call last):
        dyvte.errors.ModelError: nowhere.json cannot be read (No such file or directory): copy or download it again
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise kind(f"{path} cannot be read ({reason_of(error)}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        what = "it is empty" if not path.stat().st_size else reason_of(error)
        raise kind(f"{path} is damaged, not JSON ({what}): {remedy}") from None
    if not isinstance(content, dict):
        raise kind(f"{path} is damaged, a {type(content).__name__} where an object should be: {remedy}")
    return content


def file_inside(folder: Path, name: Any, said_by: Path) -> Path:
    """The file of a folder that another file of it names; a name that leads out of the folder is refused.

    Links are followed: those in a folder are its owner's (the cache of the Hub consists of them).
    """
    path = Path(os.path.normpath(name)) if isinstance(name, str) and "\0" not in name else Path()
    if path.is_absolute() or not path.parts or path.parts[0] == "..":
        raise ModelError(f"{said_by} names {short(name)}, which is outside of its folder: it is not read")
    return folder / str(name)


def indexed_files(index: Path) -> list[Path]:
    """The weight files that an index in Hub layout names, sorted; each must be there, within the folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index} is damaged (no weight_map): copy or download it again")
    files = sorted({file_inside(index.parent, name, index) for name in names.values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{index.parent}: {missing[0]} is missing ({index.name} names it); download it again")
    return files


def check_safetensors(
    path: Path, kind: type[DyvteError] = ModelError, remedy: str = "copy or download it again"
) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor of a file, and nothing else, is read; errors are those of `read_json`."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (each.get_dtype(), list(each.get_shape())) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise kind(f"{path}: not a safetensors file that can be read ({reason_of(error)}); {remedy}") from None


def check_model_folder(folder: Path) -> None:
    """Check the files of a model in Hub layout before transformers reads them; the first damaged one is an error."""
    for name in MODEL_FILES:
        if (folder / name).is_file():
            read_json(folder / name)
    weights = [file for file in [folder / "model.safetensors"] if file.is_file()]
    for index in folder.glob("*.index.json"):
        named = indexed_files(index)
        weights += named if index.name == "model.safetensors.index.json" else []
    for file in weights:
        check_safetensors(file)
