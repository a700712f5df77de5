"""Verdicts in words that say what was found and what would decide it, for terminals, figures and pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VERDICTS = {
    "three_stage": "found",
    "found": "found",
    "other": "not found",
    "not_found": "not found",
    "undetermined": "undetermined",
}
ADVICE = {
    "images": "more images would (data.limit=)",
    "layers": "it cannot be decided for a decoder of so few layers",
    "order": "more questions do not help here, a model with more layers would",
    "shape": "more questions may sharpen the curve (data.limit=)",
    "share": "attention within the image may not be what the middle layers are about: see measures.png",
    "effect": "more questions may sharpen the curve (data.limit=)",
}
"""What would decide a verdict that a check leaves open."""
CHECK_ORDER = (("effect", "order", "shape", "share"), ("effect", "shape", "order", "share"))
"""Which failing check is named first: of an open verdict, and of one against three stages."""
SHORT = {
    "images": "too few images",
    "layers": "too few layers",
    "order": "their order may be chance",
    "shape": "a plain curve fits as well",
    "share": "attention within a modality does not peak in the middle",
    "effect": "no clear fall and rise",
}


def verdict_word(name: str) -> str:
    """`found`, `not found` or `undetermined`.

    Example:
        >>> verdict_word("three_stage")
        'found'
    """
    return VERDICTS.get(name, name.replace("_", " "))


def verdict_in_words(stages: Mapping[str, Any]) -> str:
    """What `stages` of a summary says, in a sentence or two, and for an open question what would decide it.

    Example:
        >>> verdict_in_words({"verdict": "three_stage", "boundaries": [3, 8]})
        'Three stages found: they begin at layers 0, 3 and 8.'
    """
    reasons = stages.get("reasons") or ["no reason is recorded"]
    if stages["verdict"] == "three_stage":
        first, second = stages["boundaries"]
        return f"Three stages found: they begin at layers 0, {first} and {second}."
    if stages["verdict"] == "other":
        return f"No three stages in this model: {reasons[0]}."
    return (
        f"Three stages neither shown nor ruled out: {reasons[0]}. What would decide it: {ADVICE[_open_check(stages)]}."
    )


def verdict_in_short(stages: Mapping[str, Any]) -> str:
    """The verdict and what it hangs on, as a line of a figure.

    Example:
        >>> verdict_in_short({"verdict": "undetermined", "checks": {"order": False}})
        'three stages: undetermined (their order may be chance)'
    """
    return f"three stages: {verdict_word(stages['verdict'])} ({SHORT[_open_check(stages)]})"


def _open_check(stages: Mapping[str, Any]) -> str:
    """The first check that fails, or what there is too little of."""
    checks = stages.get("checks") or {}
    failed = [name for name in CHECK_ORDER[stages["verdict"] == "other"] if checks.get(name) is False]
    if failed or stages["verdict"] == "other":
        return failed[0] if failed else "effect"
    return "layers" if " layers; " in str((stages.get("reasons") or [""])[0]) else "images"
