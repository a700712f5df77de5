"""Whether a generated answer is the reference answer.

A plain exact match, the same for every data set. Official scores of a benchmark are lmms-eval's (`dyvte` is one of its
models, see docs/policies.md).
"""

from __future__ import annotations

import re
import unicodedata

# "the" and "an" before a word; "a" only at the start, where it is no option letter or grade ("vitamin A")
_ARTICLE = re.compile(r"(?<!\w)(?:the|an)\s+(?=\w)|^\W*a\s+(?=\w{2})")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_OF_A_NUMBER = re.compile(r"(?<![\w.])-(?=\.?\d)|(?<!\w)\.(?=\d)|(?<=\d)\.(?=\d)")
_DASHES = str.maketrans("−‐‑–—﹣-", "-" * 7)


def normalize_answer(answer: str) -> str:
    """Lower case in one Unicode form (NFC), without punctuation, symbols and English articles, single spaces.

    Punctuation and symbols are Unicode's categories P and S, so vowel signs stay; signs and decimal points of numbers
    stay too, and an article goes only where a word follows it.

    Example:
        >>> normalize_answer("The Cat."), normalize_answer("(A)"), normalize_answer("-1,000.5 %")
        ('cat', 'a', '-1000.5')
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", answer).casefold())
    text = _THOUSANDS.sub("", _ARTICLE.sub(" ", text).translate(_DASHES))
    kept = {match.start() for match in _OF_A_NUMBER.finditer(text)}
    letters = (each if i in kept or unicodedata.category(each)[0] not in "PS" else " " for i, each in enumerate(text))
    return " ".join("".join(letters).split())


def correctness(answer: str, reference: str | None) -> float:
    """1 for an `exact_match`, 0 for none; NaN without a reference."""
    return float("nan") if reference is None else float(exact_match(answer, reference))


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are equal after `normalize_answer`, or as they are where that leaves nothing."""
    normalized = normalize_answer(reference)
    if not normalized:
        return unicodedata.normalize("NFC", answer).strip() == unicodedata.normalize("NFC", reference).strip()
    return normalize_answer(answer) == normalized
