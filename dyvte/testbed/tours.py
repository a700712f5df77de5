"""Tours of a scene: dense practice in finding objects and following steps, for training only.

A tour stops at some objects and states facts about each in random order, the kind of fact first; between two stops it
either follows a step as questions do or starts anew at a random object::

    color red size small at top left go right shape circle size large , at bottom center shape cross ...

A question teaches one answer; a tour of the same length teaches a dozen. Only words that the image decides carry the
full weight of the loss: a value counts as *decided* when everything said so far leaves no choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dyvte.testbed.facts import pick
from dyvte.testbed.questions import follow, moves
from dyvte.testbed.world import ATTRIBUTES, COLUMNS, ROWS, Object, Scene

TOUR_PROMPT = "tour the image ."
PLACE = "at"
FACTS = (*ATTRIBUTES, PLACE)
FEWEST_FACTS = 2


@dataclass(frozen=True)
class TourWord:
    """One word of a tour, and whether the image and the words before it leave no other choice."""

    text: str
    decided: bool


def _values(item: Object, fact: str) -> tuple[str, ...]:
    return (ROWS[item.row], COLUMNS[item.column]) if fact == PLACE else (item[fact],)


def tour(scene: Scene, rng: np.random.Generator, stops: int, step_share: float = 0.6) -> list[TourWord]:
    """A tour of ``stops`` stops; ``step_share`` of the moves follow a step, the others start anew."""
    words: list[TourWord] = []
    here = pick(rng, scene.objects)
    fitting = list(scene.objects)  # the objects the tour may be at, as far as its words tell
    for stop in range(stops):
        if stop:
            if rng.random() < step_share and (open_moves := moves(scene, here)):
                step, here = pick(rng, open_moves)
                words += [TourWord("go", False), TourWord(step, False)]
                reached = [end for o in fitting if (end := follow(scene, o, step)) is not None]
                fitting = list(dict.fromkeys(reached))
            else:
                words.append(TourWord(",", False))
                here, fitting = pick(rng, scene.objects), list(scene.objects)
        number = int(rng.integers(FEWEST_FACTS, len(FACTS) + 1))
        for fact in rng.permutation(FACTS)[:number]:
            words.append(TourWord(str(fact), False))
            for position, value in enumerate(_values(here, str(fact))):
                possible = {_values(o, str(fact))[position] for o in fitting}
                words.append(TourWord(value, len(possible) == 1))
                fitting = [o for o in fitting if _values(o, str(fact))[position] == value]
    return words
