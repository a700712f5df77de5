"""A hook of mkdocs: formulas become MathML as the site is built, which browsers draw without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)
"""What arithmatex leaves for MathJax: inline in a span, on a line of its own in a div."""


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas of a page."""
    return FORMULA.sub(lambda found: as_mathml(html.unescape(found[2]), found[1] == "div"), content)


def as_mathml(formula: str, on_its_own: bool) -> str:
    """A formula of LaTeX as MathML.

    Example:
        >>> as_mathml("x^2", False).startswith("<math")
        True
    """
    return str(convert(formula.strip(), display="block" if on_its_own else "inline"))
