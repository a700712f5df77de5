"""Captions and look-ups in plain English: dense practice in finding objects, for training only."""

from __future__ import annotations

import numpy as np

from dyvte.testbed.facts import pick
from dyvte.testbed.questions import DIRECTIONS, SAME, follow
from dyvte.testbed.smol import phrases
from dyvte.testbed.smol.questions import choose_frame, fill, tell, unique_nouns
from dyvte.testbed.world import ATTRIBUTES, COLUMNS, ROWS, Object, Scene


def place(item: Object) -> str:
    """Where an object lies, in two words."""
    return f"{ROWS[item.row]} {COLUMNS[item.column]}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence for every object, in random order."""
    order = [scene.objects[int(i)] for i in rng.permutation(len(scene.objects))]
    return " ".join(f"A {o.size} {o.color} {o.shape} at the {place(o)}." for o in order)


def _step(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    asked = pick(rng, ATTRIBUTES)
    named = unique_nouns(scene, asked)
    if not named:
        return None
    item, name = pick(rng, named)
    # a step through the asked attribute would give the answer away
    steps = [s for s in (*DIRECTIONS, *SAME) if SAME.get(s) != asked]
    open_steps = [(s, end) for s in steps if (end := follow(scene, item, s)) is not None]
    if not open_steps:
        return None
    step, end = pick(rng, open_steps)
    told = tell(name, [step])
    return f"{told[0].upper()}{told[1:]}: which {asked}?", end[asked]


def look_up(scene: Scene, rng: np.random.Generator, step_share: float = 0.0) -> tuple[str, str] | None:
    """The shortest practice in finding one object: a name or a place, and what is asked for; with its answer.

    A `step_share` of them go one step on from the object that is named.
    """
    if step_share and rng.random() < step_share:
        return _step(scene, rng)
    if rng.random() < 0.3:
        item, asked = pick(rng, scene.objects), pick(rng, ATTRIBUTES)
        return f"The shape at the {place(item)}: which {asked}?", item[asked]
    if rng.random() < 0.35:
        named = unique_nouns(scene, pick(rng, ATTRIBUTES))
        if not named:
            return None
        item, name = pick(rng, named)
        _, frame = choose_frame(phrases.PLACE, rng, "known")
        return fill(frame, x=name), place(item)
    asked = pick(rng, ATTRIBUTES)
    named = unique_nouns(scene, asked)
    if not named:
        return None
    item, name = pick(rng, named)
    return f"{name[0].upper()}{name[1:]}: which {asked}?", item[asked]
