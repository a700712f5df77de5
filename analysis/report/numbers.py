"""Numbers as a page shows them."""

from __future__ import annotations

from typing import Any


def written(value: Any, unit: str) -> str:
    """A number as the page shows it; a dash where there is none."""
    if value is None or value == "":
        return "–"
    if isinstance(value, str):
        return value
    text = {
        "share": lambda: f"{100 * value:.1f}%",
        "points": lambda: f"{100 * value:+.1f} points",
        "layer": lambda: f"{value:g}" if float(value).is_integer() else f"{value:.1f}",
        "log": lambda: f"{value:+.2f}",
        "ratio": lambda: f"{value:.3f}",
        "count": lambda: f"{value:,.0f}",
        "nats": lambda: f"{value:.2g}",
        "plain": lambda: f"{value:.3g}",
    }[unit]()
    return text.replace("-", "−") if text[0] == "-" else text


def interval_text(low: Any, high: Any, unit: str) -> str:
    """Limits in brackets; a limit that is not reached is a dash."""
    short = "share" if unit == "points" else unit
    low, high = (written(each, short).removesuffix("%") for each in (low, high))
    return f"[{low}, {high}]"
