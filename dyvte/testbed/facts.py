"""Facts about a scene, drawn at random for a question to ask: what both testbeds ask, each in its own words.

Yes and no are drawn before the fact, and a fact is drawn only where either answer was possible. The order of draws is
part of the data: change it, and every question changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeVar

import numpy as np

from dyvte.testbed.world import ATTRIBUTES, VALUES, Object, Scene

T = TypeVar("T")
Named = tuple[Object, str]
"""An object with a description that fits no other."""

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
MAX_COUNT = 3
MAX_NUMBER = 9

# Probability with which a count question with a given answer is kept, so that the four answers come equally often:
# inverse to how often a scene admits them (measured over 20,000 scenes; a test holds the outcome to balance).
COUNT_KEEP = {0: 0.26, 1: 0.345, 2: 0.443, 3: 1.0}


@dataclass(frozen=True)
class PairFact:
    """A question about two described objects: `asked` is a direction or an attribute."""

    first: Named
    second: Named
    asked: str
    yes: bool


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, each as likely."""
    return items[int(rng.integers(len(items)))]


def draw_arithmetic(rng: np.random.Generator) -> tuple[str, int]:
    """A sum or difference in words, and its result."""
    result, plus = int(rng.integers(MAX_NUMBER + 1)), bool(rng.integers(2))
    if plus:
        first = int(rng.integers(result + 1))
        return f"{first} plus {result - first}", result
    second = int(rng.integers(MAX_NUMBER - result + 1))
    return f"{result + second} minus {second}", result


def draw_existence(scene: Scene, rng: np.random.Generator) -> tuple[dict[str, str], bool] | None:
    """Two values, by attribute, and whether one object has both; those of a near miss are each true of something."""
    omitted = pick(rng, ATTRIBUTES)
    first, second = (a for a in ("size", "color", "shape") if a != omitted)
    present = sorted({(o[first], o[second]) for o in scene.objects})
    near = sorted({(o[first], p[second]) for o in scene.objects for p in scene.objects} - set(present))
    if not near:
        return None
    yes = bool(rng.integers(2))
    pair = pick(rng, present if yes else near)
    return {first: pair[0], second: pair[1]}, yes


def draw_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str, int] | None:
    """An attribute, a value of it, and how many objects have it."""
    target = int(rng.integers(MAX_COUNT + 1))
    attribute = pick(rng, ("color", "shape"))
    fitting = [v for v in VALUES[attribute] if sum(o[attribute] == v for o in scene.objects) == target]
    if not fitting or rng.random() > COUNT_KEEP[target]:
        return None
    return attribute, pick(rng, fitting), target


def _pairs(named: Sequence[Named]) -> list[tuple[Named, Named]]:
    return [(a, b) for a, b in permutations(named, 2) if a[0] is not b[0]]


def draw_attribute(rng: np.random.Generator) -> str:
    """An attribute to leave out of the descriptions, or to ask for."""
    return pick(rng, ATTRIBUTES)


def draw_relation(named: Sequence[Named], rng: np.random.Generator) -> PairFact | None:
    """Whether the first of two described objects lies in a direction of the second."""
    pairs = _pairs(named)
    if not pairs:
        return None
    (a, first), (b, second) = pick(rng, pairs)
    options = []
    if a.column != b.column:
        options.append("left" if a.column < b.column else "right")
    if a.row != b.row:
        options.append("above" if a.row < b.row else "below")
    truth, yes = pick(rng, options), bool(rng.integers(2))
    return PairFact((a, first), (b, second), truth if yes else OPPOSITE[truth], yes)


def draw_comparison(named: Sequence[Named], asked: str, rng: np.random.Generator) -> PairFact | None:
    """Whether two described objects have the asked attribute in common."""
    pairs = _pairs(named)
    same = [(a, b) for a, b in pairs if a[0][asked] == b[0][asked]]
    different = [(a, b) for a, b in pairs if a[0][asked] != b[0][asked]]
    if not same or not different:
        return None
    yes = bool(rng.integers(2))
    first, second = pick(rng, same if yes else different)
    return PairFact(first, second, asked, yes)
