"""The one writer of pages and pictures that a command makes, and the one rule of when they are out of date.

`docs/generated.json` says of each file (or part of a file, between two comments) which command made it, from which
weights and gates, and what came out. Something is out of date if what it was made from is not what ships, or if it is
not what the command wrote: then the command is to be run again. What its numbers are worth is for tests that
regenerate some of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from analysis.measuring.runs import shipped_files
from analysis.statistics.markdown import replace_section
from dyvte.runs.store import write_atomic, write_json

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path("docs/generated.json")


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The text of `docs/tooling/<template>.md.j2` with its values."""
    text = Path(__file__).with_name(f"{template}.md.j2").read_text()
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text).render(values)


def write_generated(
    file: str | Path, content: str | bytes, command: str, made_from: Sequence[str] = (), section: str | None = None,
    root: Path | None = None,
) -> None:  # fmt: skip
    """Write a file and remember where it is from.

    Args:
        file: relative to `root`, or below it.
        content: the whole file, or the part between `<!-- section -->` and `<!-- /section -->`.
        command: what a person runs to make it again.
        made_from: of the shipped model, `weights` and `gates`.
        section: name of the part; a file without its two comments is left alone.
        root: the repository; the current folder if not given.
    """
    root = Path.cwd() if root is None else root
    path = root / file
    name = path.resolve().relative_to(root.resolve()).as_posix()
    raw = content.encode() if isinstance(content, str) else content
    if section:
        if f"<!-- {section} -->" not in (before := path.read_text()):
            return
        text = replace_section(before, section, raw.decode())
        write_atomic(path, lambda out: out.write(text.encode()))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda out: out.write(raw))
    shipped = shipped_files()
    record = read_record(root)
    record[f"{name}#{section}" if section else name] = {
        "command": command, "made_from": {each: shipped[each] for each in made_from}, "content": _digest(raw)
    }  # fmt: skip
    write_json(root / RECORD, {name: record[name] for name in sorted(record) if (root / name.split("#")[0]).is_file()})


def read_record(root: Path = ROOT) -> dict[str, Any]:
    """File, or file#section -> command, made_from, content."""
    file = root / RECORD
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def out_of_date(root: Path = ROOT) -> list[str]:
    """A sentence for each file that is to be made again, with its command."""
    shipped, found = shipped_files(), []
    for name, entry in read_record(root).items():
        path, _, section = name.partition("#")
        if not (root / path).is_file():
            reason = "is missing"
        elif changed := [part for part, digest in entry["made_from"].items() if shipped[part] != digest]:
            reason = f"was made from other {' and '.join(changed)} than ship"
        elif _digest(_content(root / path, section)) != entry["content"]:
            reason = "is not what its command wrote"
        else:
            continue
        found.append(f"{name} {reason}: run {entry['command']}")
    return found


def _content(path: Path, section: str) -> bytes:
    if not section:
        return path.read_bytes()
    rest = path.read_text().partition(f"<!-- {section} -->\n")[2]
    return rest.partition(f"\n<!-- /{section} -->")[0].encode()


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
