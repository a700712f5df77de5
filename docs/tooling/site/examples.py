"""How the reference shows docstrings: an extension of griffe."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """A docstring's `Example:` is the same section as `Examples:`, and is shown as code."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rename the section of anything that has one."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
