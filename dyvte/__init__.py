"""Look inside multimodal LLMs and skip the visual tokens that they no longer use.

The names in `__init__.pyi` are imported when they are first used, so `import dyvte` itself costs nothing.
"""

from __future__ import annotations

import ast
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from dyvte.version import __version__

# Threads of OpenMP that wait shall sleep, not spin: beside a busy process spinning makes commands several times slower.
# It has to be set before torch starts; a value of your own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text())
_PUBLIC = {
    name.name: str(node.module) for node in _STUB.body if isinstance(node, ast.ImportFrom) for name in node.names
}
"""The module of every public name (a stub that is read at run time too is Scientific Python's SPEC 1)."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dyvte' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
