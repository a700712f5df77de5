"""Which questions need the image: by what the data say of them, not by what the model under test answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

BY_DATA, BY_ANSWERS = "hops", "answers"
"""What said which questions need the image: the data's own `hops`, or the model's answers without it."""


def known_hops(metadata: Mapping[str, Any]) -> int | None:
    """How many look-ups in the image a question takes, from its sample's metadata; None where these do not say.

    Example:
        >>> known_hops({"hops": 2}), known_hops({"hops": "many"})
        (2, None)
    """
    hops = metadata.get("hops")
    return hops if isinstance(hops, int) and not isinstance(hops, bool) and hops >= 0 else None


def needs_image(hops: Sequence[int | None], otherwise: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], str]:
    """Which of n questions need the image, and what said so.

    Choosing questions by the model's own answers is choosing by the outcome: what it then gets right without an image
    is left out by construction. So the data's word is taken, where they have it for every question.

    Args:
        hops: of each question, see `known_hops`.
        otherwise: [n] whether the model answers otherwise without the image, for data that do not say.

    Returns:
        [n], and `BY_DATA` or `BY_ANSWERS`.
    """
    if len(hops) and all(each is not None for each in hops):
        return np.array([bool(each) for each in hops]), BY_DATA
    return np.asarray(otherwise, dtype=bool), BY_ANSWERS


def in_words(said_by: str) -> str:
    """What is true of the questions that need the image, to follow on their number.

    Example:
        >>> in_words("hops")
        'need the image: they ask for something in it, as the data say (hops)'
    """
    if said_by == BY_DATA:
        return "need the image: they ask for something in it, as the data say (hops)"
    return "need the image: without it the model answers otherwise (the data do not say which do)"
