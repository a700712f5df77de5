"""Look-ups: the shortest practice in finding an object and following steps, for training only.

A key that fits one object, steps as questions take them, and what is asked for, in as few words as possible::

    red circle size -> small             at top left color -> green
    red circle go left shape -> cross    small triangle at -> bottom right

A question of the same content takes three times the words, and a decoder that sees only questions stays for thousands
of steps where it names an attribute of the wrong object (docs/testbed.md).
"""

from __future__ import annotations

import numpy as np

from dyvte.testbed.questions import STAY, STEPS, follow, unique_names
from dyvte.testbed.world import ATTRIBUTES, COLUMNS, ROWS, Object, Scene

PLACE = "at"


def place(item: Object) -> str:
    """Where an object lies, in two words."""
    return f"{ROWS[item.row]} {COLUMNS[item.column]}"


def _choice(rng: np.random.Generator, items):  # type: ignore[no-untyped-def]
    return items[int(rng.integers(len(items)))]


def look_up(
    scene: Scene, rng: np.random.Generator, steps: int, by_place: float = 0.3, ask_place: float = 0.2
) -> tuple[str, str] | None:
    """A look-up of ``steps`` steps with its answer, or None if the draw admits none.

    Args:
        steps: steps to follow from the object that the key names.
        by_place: share of the keys that are places.
        ask_place: share of the look-ups that ask where an object is.
    """
    asked = PLACE if rng.random() < ask_place else str(_choice(rng, ATTRIBUTES))
    if rng.random() < by_place and (asked != PLACE or steps):
        start: Object = _choice(rng, scene.objects)
        words = [PLACE, place(start)]
    else:
        names = unique_names(scene, asked if asked != PLACE else str(_choice(rng, ATTRIBUTES)))
        if not names:
            return None
        start, name = _choice(rng, names)
        words = [name]
    here = start
    for _ in range(steps):
        # a step through the asked attribute would give the answer away
        open_steps = [s for s in STEPS if s not in (STAY, f"same-{asked}") and follow(scene, here, s) is not None]
        if not open_steps:
            return None
        step = str(_choice(rng, open_steps))
        words += ["go", step]
        here = follow(scene, here, step)  # type: ignore[assignment]
    return " ".join([*words, asked]), place(here) if asked == PLACE else here[asked]
