"""Classes that configurations name (`_target_`): checked before they are called, so that no file can run code.

A command may use any class of the expected kind that its user named. What is read back from a run folder, a recipe or a
gate folder may name classes of this package and optimizers of torch only: folders are shared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from dyvte.errors import ConfigError, DyvteError

KNOWN_PACKAGES = ("dyvte", "torch.optim")
"""Packages whose classes a stored configuration may name."""


def build(settings: Mapping[str, Any], kind: type, *first: Any, stored: bool = False, known: str = "") -> Any:
    """Call what `_target_` names with the other settings, which may hold further `_target_` of the same kind.

    Args:
        settings: plain data; `_target_` is a class, or a class method such as `VTW.calibrate`.
        kind: class that the target must be, or come from.
        *first: arguments before the settings.
        stored: whether the settings are from a file that somebody else may have written.
        known: a target that the user has named too: stored settings may name it themselves, not those within them.
    """
    arguments = {key: _built(each, kind, stored) for key, each in settings.items() if key != "_target_"}
    target = find_target(settings["_target_"], kind, stored and settings["_target_"] != known)
    try:
        inspect.signature(target).bind(*first, **arguments)
    except TypeError as error:
        raise ConfigError(f"{settings['_target_']}: {error}") from error
    try:
        return target(*first, **arguments)
    except DyvteError:
        raise
    except (ValueError, TypeError) as error:  # a class says so of a setting that is out of range
        raise ConfigError(f"{target.__qualname__}: {' '.join(str(error).split())}") from error


def _built(value: Any, kind: type, stored: bool) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, kind, stored=stored)
        return {key: _built(each, kind, stored) for key, each in value.items()}
    return [_built(each, kind, stored) for each in value] if isinstance(value, (list, tuple)) else value


def find_target(name: Any, kind: type, stored: bool = False) -> Callable[..., Any]:
    """The class or class method that a `_target_` names; a stored configuration may name `KNOWN_PACKAGES` only.

    Example:
        >>> from dyvte.data import Dataset
        >>> find_target("dyvte.data.shapes.ShapesDataset", Dataset).__name__
        'ShapesDataset'
    """
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"_target_ is {name!r}: give the full name of a class, as package.module.Class")
    if stored and not name.startswith(tuple(f"{package}." for package in KNOWN_PACKAGES)):
        raise ConfigError(f"a stored configuration names {name}, which is not a class of dyvte: it is not run")
    found: Any = None
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:length]).startswith(str(error.name)):
                raise ConfigError(f"_target_ {name}: {error}") from error
            continue
        break
    owner: Any = None  # the class that the name leads through
    for part in parts[length:] if found is not None else ():
        found = getattr(found, part, None)
        owner = found if inspect.isclass(found) else owner
    if found is None:
        raise ConfigError(f"_target_ {name}: there is no such class")
    package = str(getattr(owner, "__module__", ""))
    foreign = stored and not f"{package}.".startswith(tuple(f"{known}." for known in KNOWN_PACKAGES))
    if owner is None or foreign or not issubclass(owner, kind) or not callable(found):
        raise ConfigError(f"_target_ {name} is not a {kind.__name__}")
    return found
