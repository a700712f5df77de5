"""All methods by name: what `policy=NAME` runs, tables list and comparisons choose from.

A method is a `Policy` that `dyvte` exports and that has a name; what else there is to know about it is on its class.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

import dyvte
from dyvte.policies.base import Policy


@cache
def methods() -> dict[str, type[Policy]]:
    """Every method by its name, in the order in which `dyvte` exports them."""
    found: dict[str, type[Policy]] = {}
    for public, module in dyvte._PUBLIC.items():
        if module.startswith("dyvte.policies."):
            value = getattr(import_module(module), public)
            if isinstance(value, type) and issubclass(value, Policy) and value.name:
                found[value.name] = value
    return found


@cache
def labels() -> dict[str, str]:
    """What tables and figures call every method."""
    return {name: method.label for name, method in methods().items()}
