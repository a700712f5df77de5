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
    "not_tested_by_attention": "not tested by attention",
}
ADVICE = {
    "images": "more images would (data.limit=)",
    "layers": "it cannot be decided for a decoder of so few layers",
    "shape": "a model with more layers would",
    "valley": "more questions may sharpen the curve (data.limit=)",
}
"""What would decide a verdict that a claim leaves open."""
SHORT = {
    "images": "too few images",
    "layers": "too few layers",
    "shape": "a plain curve fits as well",
    "valley": "no clear fall and rise",
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
        'Three stages of attention found: they begin at layers 0, 3 and 8.'
    """
    reasons = stages.get("reasons") or ["no reason is recorded"]
    if stages["verdict"] == "three_stage":
        first, second = stages["boundaries"]
        return f"Three stages of attention found: they begin at layers 0, {first} and {second}."
    if stages["verdict"] == "other":
        return f"No three stages of attention in this model: {reasons[0]}."
    advice = ADVICE[_open_claim(stages)]
    return f"Three stages of attention neither shown nor ruled out: {reasons[0]}. What would decide it: {advice}."


def verdict_in_short(stages: Mapping[str, Any]) -> str:
    """The verdict and what it hangs on, as a line of a figure.

    Example:
        >>> verdict_in_short({"verdict": "undetermined", "claims": {"valley": "found", "shape": "undetermined"}})
        'three stages: undetermined (a plain curve fits as well)'
    """
    return f"three stages: {verdict_word(stages['verdict'])} ({SHORT[_open_claim(stages)]})"


def _open_claim(stages: Mapping[str, Any]) -> str:
    """The claim that decides, or what there is too little of."""
    claims = stages.get("claims") or {}
    wanted = "not_found" if stages["verdict"] == "other" else "undetermined"
    if failed := [name for name in ("valley", "shape") if claims.get(name) == wanted]:
        return failed[0]
    return "layers" if " layers; " in str((stages.get("reasons") or [""])[0]) else "images"
