"""`python -m analysis.api_reference`: docs/api.md, from the signatures and docstrings of the code.

First the names of `import dyvte`, then the modules in `MODULES`, each with the public functions, classes and constants
that it defines, in the order of the source. The same code gives the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import dyvte
from dyvte.store import write_atomic

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"

MODULES = {
    "Running": ("dyvte.config", "dyvte.errors", "dyvte.train", "dyvte.evaluate", "dyvte.generate", "dyvte.convert"),
    "Data": (
        "dyvte.data.base",
        "dyvte.data.shapes",
        "dyvte.data.llava_json",
        "dyvte.data.huggingface",
        "dyvte.data.metrics",
        "dyvte.exported",
    ),
    "Measuring": (
        "dyvte.instrument.attention",
        "dyvte.instrument.states",
        "dyvte.instrument.sweep",
        "dyvte.instrument.views",
        "dyvte.criteria",
        "dyvte.flops",
        "dyvte.measure",
    ),
    "Policies": (
        "dyvte.policies.base",
        "dyvte.policies.attention_policy",
        "dyvte.policies.token_scores",
        "dyvte.policies.dynamic_exit",
        "dyvte.policies.fitprune",
        "dyvte.policies.skip_attention",
    ),
    "Gates": ("dyvte.gates.labels", "dyvte.gates.training", "dyvte.gates.metrics", "dyvte.gates.controls"),
    "Runs": ("dyvte.store", "dyvte.runner", "dyvte.distributed"),
    "Statistics and figures": ("analysis.statistics", "analysis.exit_statistics", "analysis.plots"),
}
"""The modules on the page, under the headings they stand under."""

WIDTH = 100
"""Longer signatures are broken into one line an argument."""

ENTRIES = ("Args", "Attributes", "Raises")
"""Docstring sections made of `name: text` entries; the others are prose."""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write (default: docs/api.md)")
    page = parser.parse_args().page
    write_atomic(page, lambda out: out.write(reference().encode()))
    print(page)


def reference() -> str:
    """The page, as Markdown."""
    public = [name for name in dyvte.__all__ if not name.startswith("_")]
    lines = [
        "# API reference",
        "",
        "Written by `python -m analysis.api_reference` (`make docs`) from the docstrings; do not edit. What the words "
        "mean is in [concepts.md](concepts.md). Shapes: B samples, N positions, L decoder layers, H heads, d hidden "
        "size, k exit layer.",
        "",
        f"- [`import dyvte`](#import-dyvte): {', '.join(_link(f'dyvte.{name}', name) for name in public)}",
    ]
    for title, modules in MODULES.items():
        lines.append(f"- {title}: {', '.join(_link(name, name) for name in modules)}")
    lines += ["", "## import dyvte", "", _first_line(dyvte)]
    for name in public:
        lines += ["", *_name(f"dyvte.{name}", getattr(dyvte, name))]
    shown = {id(getattr(dyvte, name)) for name in public}
    for title, modules in MODULES.items():
        lines += ["", f"## {title}"]
        for name in modules:
            lines += ["", *_module(import_module(name), shown)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


# ------------------------------------------------------------------------ modules


@dataclass(frozen=True)
class _Constant:
    """A module's constant: its right-hand side as the source has it, and the string literal behind it."""

    source: str
    doc: str


def _module(module: ModuleType, shown: set[int]) -> Iterator[str]:
    """A module's section; objects with an id in `shown` are above already."""
    file = inspect.getsourcefile(module)
    assert file is not None
    path = Path(file).relative_to(ROOT).as_posix()
    yield f"### {module.__name__}"
    yield ""
    yield f"[{path}](../{path})"
    yield ""
    yield from _markdown(inspect.getdoc(module) or "")
    above = []
    for name, item in _public(module, Path(file).read_text()):
        if id(item) in shown:
            above.append(name)
        else:
            yield ""
            yield from _name(f"{module.__name__}.{name}", item)
    if above:
        yield ""
        yield f"Also here: {', '.join(_link(f'dyvte.{name}', name) for name in above)}."


def _public(module: ModuleType, source: str) -> Iterator[tuple[str, Any]]:
    """Documented public names that a module defines, in the order of its source."""
    body = ast.parse(source).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            item = getattr(module, statement.name)
            hidden = statement.name.startswith("_") or statement.name == "main"  # commands are in docs/index.md
            if not hidden and ast.get_docstring(statement):
                yield statement.name, item
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            doc = following.value if isinstance(following, ast.Expr) else None
            if (
                isinstance(target, ast.Name)
                and not target.id.startswith("_")
                and isinstance(doc, ast.Constant)
                and isinstance(doc.value, str)
            ):
                value = ast.get_source_segment(source, statement.value) or ""
                yield target.id, _Constant(value, inspect.cleandoc(doc.value))


# -------------------------------------------------------------------------- names


def _name(name: str, item: Any) -> Iterator[str]:
    """A function, class or constant under a heading of its own."""
    yield f"#### {name}"
    yield ""
    short = name.rpartition(".")[2]
    if isinstance(item, _Constant):
        if "\n" not in item.source and len(item.source) + len(short) + 3 <= WIDTH:
            yield from _code(f"{short} = {item.source}")
        yield from _markdown(item.doc)
    elif inspect.isclass(item):
        yield from _class(short, item)
    elif callable(item):
        yield from _code(f"{short}{_signature(item)}")
        yield from _markdown(inspect.getdoc(item) or "")
    else:
        yield from _code(f"{short} = {item!r}")


def _class(name: str, item: type) -> Iterator[str]:
    bases = [base.__name__ for base in item.__bases__ if base is not object]
    of = f" based on {', '.join(f'`{base}`' for base in bases)}" if bases else ""
    how = "dataclass" if is_dataclass(item) and "__dataclass_fields__" in vars(item) else "class"
    yield f"*{how}*{of}"
    yield ""
    if "__init__" in vars(item):
        yield from _code(f"{name}{_signature(vars(item)['__init__'], drop_first=True)}")
    yield from _markdown(inspect.getdoc(item) or "")
    for member, value in vars(item).items():
        if member.startswith("_") and member != "__call__":
            continue
        kind, function = _member(value)
        if function is None or not function.__doc__:
            continue
        yield ""
        if kind == "property":
            yield f"**`{name}.{member}`** (property)"
        else:
            yield from _code(f"{name}.{member}{_signature(function, drop_first=kind != 'staticmethod')}", last=True)
        yield ""
        yield from _markdown(inspect.getdoc(function) or "")


def _member(value: Any) -> tuple[str, Any]:
    """What kind of member a class attribute is, and the function that documents it (None: no member to show)."""
    if isinstance(value, property):
        return "property", value.fget
    if isinstance(value, cached_property):
        return "property", value.func
    if isinstance(value, (classmethod, staticmethod)):
        return type(value).__name__, value.__func__
    return "method", value if inspect.isfunction(value) else None


def _signature(function: Any, drop_first: bool = False) -> str:
    """Arguments and return type as the source writes them, broken into lines where they are long."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1 if drop_first else 0 :]
    words: list[str] = []
    keyword_only = False
    for parameter in parameters:
        if parameter.name.startswith("_"):  # a field that a dataclass keeps for itself
            continue
        keyword_only |= parameter.kind is parameter.VAR_POSITIONAL
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        words.append(_parameter(parameter))
    returned = signature.return_annotation
    arrow = f" -> {_annotation(returned)}" if returned not in (signature.empty, None, "None") else ""
    line = f"({', '.join(words)}){arrow}"
    if len(line) + len(getattr(function, "__name__", "")) <= WIDTH:
        return line
    return "(\n" + "".join(f"    {word},\n" for word in words) + f"){arrow}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    text = stars + parameter.name
    typed = parameter.annotation is not parameter.empty
    if typed:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {_default(parameter.default)}" if typed else f"={_default(parameter.default)}"
    return text


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _default(value: Any) -> str:
    """A default that reads the same on every machine: neither memory addresses nor absolute paths."""
    text = repr(value)
    if callable(value) or " at 0x" in text:
        return getattr(value, "__name__", "...")
    return "..." if isinstance(value, Path) or text == "<factory>" else text


# ----------------------------------------------------------------------- Markdown


def _markdown(docstring: str) -> Iterator[str]:
    """A docstring in Google's style as Markdown: sections become lists; indented code stays as it is."""
    lines = docstring.splitlines()
    while lines:
        title = re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", lines[0])
        if title is None:
            yield _plain(lines.pop(0))
            continue
        lines.pop(0)
        section = []
        while lines and (lines[0].startswith("    ") or not lines[0].strip()):
            section.append(lines.pop(0)[4:])
        yield f"**{title[1]}**"
        yield ""
        yield from _entries(section) if title[1] in ENTRIES else map(_plain, section)
        if lines and section and section[-1].strip():
            yield ""


def _entries(section: list[str]) -> Iterator[str]:
    for line in section:
        if entry := re.match(r"([\w*][\w*., ]*): (.*)", line):
            names = ", ".join(f"`{each}`" for each in entry[1].split(", "))
            yield f"- {names}: {_plain(entry[2])}"
        else:
            yield f"  {_plain(line.lstrip())}" if line.strip() else ""


def _plain(line: str) -> str:
    """A line without Sphinx roles, and with `<` outside of code kept from being HTML."""
    if line.startswith("    "):
        return line
    line = re.sub(r":\w+:(`[^`]+`)", r"\1", line).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else part.replace("<", "\\<") for part in parts)


def _code(text: str, last: bool = False) -> list[str]:
    return ["```py", text, "```", *([] if last else [""])]


def _link(heading: str, text: str) -> str:
    return f"[`{text}`](#{slug(heading)})"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _first_line(item: Any) -> str:
    return (inspect.getdoc(item) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
