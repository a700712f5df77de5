"""Captions and look-ups in plain English: dense practice in finding objects, for training only."""

from __future__ import annotations

import numpy as np

from dyvte.testbed.facts import draw_attribute, draw_comparison, draw_count, pick
from dyvte.testbed.questions import moves
from dyvte.testbed.smol import phrases
from dyvte.testbed.smol.questions import choose_frame, fill, tell, unique_nouns
from dyvte.testbed.world import ATTRIBUTES, Scene


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence for every object, in random order."""
    order = [scene.objects[int(i)] for i in rng.permutation(len(scene.objects))]
    return " ".join(f"A {o.size} {o.color} {o.shape} at the {o.place}." for o in order)


def _step(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    asked = pick(rng, ATTRIBUTES)
    named = unique_nouns(scene, asked)
    if not named:
        return None
    item, name = pick(rng, named)
    if not (open_moves := moves(scene, item, asked)):
        return None
    step, end = pick(rng, open_moves)
    told = tell(name, [step])
    return f"{told[0].upper()}{told[1:]}: which {asked}?", end[asked]


def _pair(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    asked = draw_attribute(rng)
    fact = draw_comparison(unique_nouns(scene, asked), asked, rng)
    if fact is None:
        return None
    named = f"{fact.first[1][0].upper()}{fact.first[1][1:]}, {fact.second[1]}"
    if rng.random() < 0.35:  # what is compared, said aloud
        return f"{named}: which {asked}s?", f"{fact.first[0][asked]}, {fact.second[0][asked]}"
    return f"{named}: same {asked}?", "yes" if fact.yes else "no"


def _tally(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    fact = draw_count(scene, rng)
    if fact is None:
        return None
    attribute, value, number = fact
    return f"{value.capitalize()} {'shapes' if attribute == 'color' else 'ones'}: how many?", str(number)


def look_up(
    scene: Scene,
    rng: np.random.Generator,
    step_share: float = 0.0,
    pair_share: float = 0.0,
    tally_share: float = 0.0,
) -> tuple[str, str] | None:
    """The shortest practice in finding one object: a name or a place, and what is asked for; with its answer.

    A `step_share` of them go one step on from the object that is named, a `pair_share` compare two, a `tally_share`
    count.
    """
    if step_share or pair_share or tally_share:
        drawn = rng.random()
        for share, practice in ((step_share, _step), (pair_share, _pair), (tally_share, _tally)):
            if drawn < share:
                return practice(scene, rng)
            drawn -= share
    if rng.random() < 0.3:
        item, asked = pick(rng, scene.objects), pick(rng, ATTRIBUTES)
        return f"The shape at the {item.place}: which {asked}?", item[asked]
    if rng.random() < 0.35:
        named = unique_nouns(scene, pick(rng, ATTRIBUTES))
        if not named:
            return None
        item, name = pick(rng, named)
        _, frame = choose_frame(phrases.PLACE, rng, "known")
        return fill(frame, x=name), item.place
    asked = pick(rng, ATTRIBUTES)
    named = unique_nouns(scene, asked)
    if not named:
        return None
    item, name = pick(rng, named)
    return f"{name[0].upper()}{name[1:]}: which {asked}?", item[asked]
