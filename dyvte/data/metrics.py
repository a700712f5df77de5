"""Whether a generated answer is the reference answer."""

from __future__ import annotations

import re

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = re.compile(r"[^\w\s]")


def normalize_answer(answer: str) -> str:
    """Lower case, without punctuation and English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", answer.lower())).split())


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are equal after `normalize_answer`, or as they are where that leaves nothing."""
    normalized = normalize_answer(reference)
    if not normalized:
        return answer.strip() == reference.strip()
    return normalize_answer(answer) == normalized
