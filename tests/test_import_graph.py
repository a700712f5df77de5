"""The house shows itself: who imports whom, without a circle, and no room or file too full."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dyvte", "analysis", "benchmarks", "docs/tooling")
MOST_FILES, MOST_LINES = 14, 450


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in python_files()}


def under_type_checking(tree: ast.Module) -> set[ast.AST]:
    """What only a type checker reads."""
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imported_by(module: str, types_too: bool = False) -> set[str]:
    """Modules of the repository that a file imports."""
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    left_out = set() if types_too else under_type_checking(tree)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{name}.{alias.name}" for alias in node.names}
            found |= (inner & set(MODULES)) or {name}
            if inner - set(MODULES):
                found.add(name)
    return (found & set(MODULES)) - {module}


def test_no_circle_of_files() -> None:
    """Imports within functions count too."""
    graph = nx.DiGraph([(module, other) for module in MODULES for other in imported_by(module)])
    assert graph.has_edge("dyvte.train", "dyvte.gates.training"), "the graph is not empty"
    circles = [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]
    assert not circles


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("dyvte", {"dyvte"}),
        ("analysis", {"analysis", "dyvte"}),
        ("benchmarks", {"benchmarks", "analysis", "dyvte"}),
        ("docs", {"docs", "benchmarks", "analysis", "dyvte"}),
    ],
)
def test_who_may_import_whom(folder: str, allowed: set[str]) -> None:
    for module in MODULES:
        if module.split(".")[0] == folder:
            others = {other.split(".")[0] for other in imported_by(module, types_too=True)}
            assert others <= allowed, f"{module} imports {sorted(others - allowed)}"


def test_inside_analysis_imports_are_relative() -> None:
    """The wheel carries the folder under another name."""
    for path in (ROOT / "analysis").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "analysis"], path


def test_no_folder_and_no_file_is_too_full() -> None:
    folders: dict[Path, int] = {}
    for path in python_files():
        lines = len(path.read_text().splitlines())
        assert lines <= MOST_LINES, f"{path.relative_to(ROOT)} has {lines} lines"
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
    crowded = {folder.relative_to(ROOT).as_posix(): count for folder, count in folders.items() if count > MOST_FILES}
    assert not crowded
