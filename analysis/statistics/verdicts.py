"""Verdicts in words that say what was found and what would decide it, for terminals, figures and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def image_use_in_words(exits: Mapping[str, Any]) -> list[str]:
    """Until which layer a model uses its image and what its answers are without it, from a summary of `analysis.exits`.

    Nothing is computed here but the share of the FLOPs of an exit.
    """
    stops, last = exits.get("findings", {}).get("contribution_stops", {}), exits["num_layers"]
    layer, verdict = stops.get("exit_layer"), stops.get("verdict")
    agreement, flops = exits.get("agreement") or [], exits.get("flops_decoder") or []
    sentences = []
    if verdict == "found" and layer is not None:
        cost = f"{flops[layer] / flops[last]:.1%}" if len(flops) > last else "–"
        sentences.append(
            f"The image is used by the first {layer} of {last} layers: without it in the later ones "
            f"{agreement[layer]:.1%} of the answers stay, at {cost} of the decoder's FLOPs in the prefill."
        )
    elif verdict is not None:
        why = f" ({stops['reasons'][0]})" if stops.get("reasons") else ""
        more = " More questions may decide it (data.limit=)." if verdict == "undetermined" else ""
        sentences.append(f"Whether the image stops being used at some layer: {verdict_word(verdict)}{why}.{more}")
    if agreement:
        sentences.append(f"If the decoder sees no image at all, {agreement[0]:.1%} of the answers stay the same.")
    return sentences


def stages_held_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """The stages of a stage table's first split, by attention and by cause."""
    first = [row for row in rows if row["split"] == rows[0]["split"]]

    def judged(key: str) -> str:
        return "; ".join(f"{row['stage']} {verdict_word(row[key])}" for row in first)

    return f"Stages by attention: {judged('by_attention')}. By cause: {judged('by_cause')}."
