"""Look-ups: the shortest practice in finding an object and following steps, for training only.

A key that fits one object, steps as questions take them, and what is asked for, in as few words as possible::

    red circle size -> small             at top left color -> green
    red circle go left shape -> cross    small triangle at -> bottom right

and the kinds of question that follow no path without the words that carry nothing::

    red circle ? -> yes    how many red ? -> 2    red circle left small cross ? -> no

A question of the same content takes three times the words, and a decoder that sees only questions stays for thousands
of steps where it names an attribute of the wrong object (docs/testbed.md).
"""

from __future__ import annotations

import numpy as np

from dyvte.testbed.facts import pick
from dyvte.testbed.questions import IMAGE_KINDS, KINDS, PATH_KINDS, ask, moves, unique_names
from dyvte.testbed.tours import PLACE
from dyvte.testbed.world import ATTRIBUTES, Object, Scene

ASK_PLACE, BY_PLACE = 0.2, 0.3  # shares of the look-ups that ask where an object is, and of the keys that are places
BRIEF_KINDS = tuple(k for k in IMAGE_KINDS if k not in PATH_KINDS)
FILLERS = frozenset(["is", "are", "there", "a", "the", "do", "and", "have", "of", "objects"])


def look_up(scene: Scene, rng: np.random.Generator, steps: int) -> tuple[str, str] | None:
    """A look-up of ``steps`` steps with its answer, or None if the draw admits none."""
    asked = PLACE if rng.random() < ASK_PLACE else pick(rng, ATTRIBUTES)
    if rng.random() < BY_PLACE and (asked != PLACE or steps):
        start: Object = pick(rng, scene.objects)
        words = [PLACE, start.place]
    else:
        names = unique_names(scene, asked if asked != PLACE else pick(rng, ATTRIBUTES))
        if not names:
            return None
        start, name = pick(rng, names)
        words = [name]
    here = start
    for _ in range(steps):
        if not (open_moves := moves(scene, here, asked)):
            return None
        step, here = pick(rng, open_moves)
        words += ["go", step]
    return " ".join([*words, asked]), here.place if asked == PLACE else here[asked]


def brief(scene: Scene, rng: np.random.Generator, max_hops: int) -> tuple[str, str] | None:
    """A question that follows no path, of at most ``max_hops`` hops, in its telling words alone, with its answer."""
    kinds = [k for k in BRIEF_KINDS if KINDS[k] <= max_hops]
    question = ask(scene, pick(rng, kinds), rng, tries=4)
    if question is None:
        return None
    return " ".join(w for w in question.text.split() if w not in FILLERS), question.answer
