"""Questions in plain English about the testbed's scenes, of zero to four hops, and two kinds that need knowledge.

A *hop* is one look-up in the image, as in `dyvte.testbed.questions`. Questions of one to four hops (`PATH_KINDS`) are
asked in two forms. *Told*, the path is a noun phrase: "What size is the shape directly left of the red circle?".
*Walked*, it has three steps, one to three of which stay where they are: "Start at the red circle, move to the left,
stay on this shape, stay on this shape. What size is that shape?". Walked questions of all depths have the same words,
the same number of tokens and the same answers, so that their exit depths compare without a confound.

`recall_look` ("What size is the shape that has the color of a ripe banana?") must resolve its text before the image
can be read; `look_recall` ("Which of banana, grass, sky, blood has the color of the large circle?") after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dyvte.testbed.facts import (
    Named,
    PairFact,
    draw_arithmetic,
    draw_attribute,
    draw_comparison,
    draw_count,
    draw_existence,
    draw_relation,
    pick,
)
from dyvte.testbed.questions import DIRECTIONS, NO, SAME, STAY, YES, draw_steps, follow, unique_names
from dyvte.testbed.smol import phrases
from dyvte.testbed.world import ATTRIBUTES, Object, Scene

Paraphrases = Literal["known", "held_out", "all"]

KINDS: dict[str, int] = {
    "arithmetic": 0,
    "knowledge": 0,
    "existence": 1,
    "attribute": 1,
    "count": 1,
    "recall_look": 1,
    "look_recall": 1,
    "relation": 2,
    "same_attribute": 2,
    "neighbor": 2,
    "comparison": 2,
    "two_hop": 3,
    "three_hop": 4,
}
IMAGE_KINDS: tuple[str, ...] = tuple(kind for kind, hops in KINDS.items() if hops)
PATH_KINDS: tuple[str, ...] = ("attribute", "same_attribute", "neighbor", "two_hop", "three_hop")
MATCHED_KINDS: tuple[str, ...] = ("attribute", "neighbor", "two_hop", "three_hop")
"""Walked questions asked of one scene as a group, one of each number of hops."""

NUM_PATHS_STEPS = 3


@dataclass(frozen=True)
class EnglishQuestion:
    """A question with its answer.

    Attributes:
        form: "told" or "walked" for the path kinds, else "".
        paraphrase: Index of its frame among the kind's sixteen.
        steps: Of a path.
        target: Cells (row, column) of the objects that the answer rests on: the asked one last.
    """

    kind: str
    text: str
    answer: str
    form: str = ""
    paraphrase: int = 0
    steps: tuple[str, ...] = ()
    target: tuple[tuple[int, int], ...] = ()

    @property
    def hops(self) -> int:
        """Look-ups in the image that the answer takes."""
        return KINDS[self.kind]


def choose_frame(frames: Sequence[str], rng: np.random.Generator, paraphrases: Paraphrases) -> tuple[int, str]:
    """A frame and its index among all: of those that training uses, of the held-out ones, or of all."""
    first, last = {
        "known": (0, len(frames) - phrases.HELD_OUT),
        "held_out": (len(frames) - phrases.HELD_OUT, len(frames)),
        "all": (0, len(frames)),
    }[paraphrases]
    index = int(rng.integers(first, last))
    return index, frames[index]


def fill(frame: str, **slots: str) -> str:
    """Put words into a frame; a sentence begins with a capital."""
    text = frame.format(**slots)
    return text[0].upper() + text[1:]


def noun(item: Object, mentioned: Sequence[str]) -> str:
    """An object by some of its attributes: "the small red shape", "the red circle", "the circle", "the small shape"."""
    words = [item[a] for a in ("size", "color") if a in mentioned]
    return " ".join(["the", *words, item.shape if "shape" in mentioned else "shape"])


def unique_nouns(scene: Scene, omitted: str) -> list[Named]:
    """Every name without the attribute `omitted` that fits exactly one object, each with its object."""
    return unique_names(scene, omitted, noun)


def tell(name: str, steps: Sequence[str]) -> str:
    """A path as a noun phrase, its last step first."""
    for step in steps:
        if step in DIRECTIONS:
            name = phrases.DIRECTION_PHRASES[step].format(x=name)
        elif step != STAY:
            name = phrases.SAME_PHRASE.format(attribute=SAME[step], x=name)
    return name


Asker = Callable[[Scene, np.random.Generator, Paraphrases], "EnglishQuestion | None"]


def _arithmetic(scene: Scene, rng: np.random.Generator, paraphrases: Paraphrases) -> EnglishQuestion:
    asked, result = draw_arithmetic(rng)
    index, frame = choose_frame(phrases.ARITHMETIC, rng, paraphrases)
    return EnglishQuestion("arithmetic", fill(frame, sum=asked), str(result), paraphrase=index)


def _knowledge(scene: Scene, rng: np.random.Generator, paraphrases: Paraphrases) -> EnglishQuestion:
    asked = pick(rng, tuple(phrases.THINGS))
    value = pick(rng, tuple(phrases.THINGS[asked]))
    thing = pick(rng, tuple(phrases.THINGS[asked][value].values()))
    index, frame = choose_frame(phrases.KNOWLEDGE, rng, paraphrases)
    return EnglishQuestion("knowledge", fill(frame, asked=asked, thing=thing), value, paraphrase=index)


def _existence(scene: Scene, rng: np.random.Generator, paraphrases: Paraphrases) -> EnglishQuestion | None:
    fact = draw_existence(scene, rng)
    if fact is None:
        return None
    values, yes = fact
    words = " ".join([*values.values(), *([] if "shape" in values else ["shape"])])
    index, frame = choose_frame(phrases.EXISTENCE, rng, paraphrases)
    target = tuple(o.cell for o in scene.objects if all(o[a] == v for a, v in values.items()))
    return EnglishQuestion("existence", fill(frame, a=f"a {words}"), YES if yes else NO, "", index, (), target)


def _count(scene: Scene, rng: np.random.Generator, paraphrases: Paraphrases) -> EnglishQuestion | None:
    fact = draw_count(scene, rng)
    if fact is None:
        return None
    attribute, value, number = fact
    plural = {"cross": "crosses"}.get(value, f"{value}s") if attribute == "shape" else f"{value} shapes"
    index, frame = choose_frame(phrases.COUNT, rng, paraphrases)
    cells = tuple(o.cell for o in scene.objects if o[attribute] == value)
    return EnglishQuestion("count", fill(frame, x=plural), str(number), "", index, (), cells)


def _of_a_pair(kind: str, fact: PairFact | None, frames: Sequence[str], slot: str, rng: np.random.Generator,
               paraphrases: Paraphrases) -> EnglishQuestion | None:  # fmt: skip
    if fact is None:
        return None
    words = {"left": "to the left of", "right": "to the right of"}.get(fact.asked, fact.asked)
    index, frame = choose_frame(frames, rng, paraphrases)
    text = fill(frame, x=fact.first[1], y=fact.second[1], **{slot: words})
    cells = fact.first[0].cell, fact.second[0].cell
    return EnglishQuestion(kind, text, YES if fact.yes else NO, "", index, (), cells)


def _relation(scene: Scene, rng: np.random.Generator, paraphrases: Paraphrases) -> EnglishQuestion | None:
    fact = draw_relation(unique_nouns(scene, draw_attribute(rng)), rng)
    return _of_a_pair("relation", fact, phrases.RELATION, "where", rng, paraphrases)


def _comparison(scene: Scene, rng: np.random.Generator, paraphrases: Paraphrases) -> EnglishQuestion | None:
    asked = draw_attribute(rng)
    fact = draw_comparison(unique_nouns(scene, asked), asked, rng)
    return _of_a_pair("comparison", fact, phrases.COMPARISON, "asked", rng, paraphrases)


def _recall_look(scene: Scene, rng: np.random.Generator, paraphrases: Paraphrases) -> EnglishQuestion | None:
    known = pick(rng, tuple(phrases.THINGS))
    values = [o[known] for o in scene.objects]
    fitting = [o for o in scene.objects if values.count(o[known]) == 1 and o[known] in phrases.THINGS[known]]
    if not fitting:
        return None
    item, asked = pick(rng, fitting), pick(rng, [a for a in ATTRIBUTES if a != known])
    thing = pick(rng, tuple(phrases.THINGS[known][item[known]].values()))
    index, frame = choose_frame(phrases.RECALL_LOOK, rng, paraphrases)
    text = fill(frame, asked=asked, known=known, thing=thing)
    return EnglishQuestion("recall_look", text, item[asked], "", index, (), (item.cell,))


def _look_recall(scene: Scene, rng: np.random.Generator, paraphrases: Paraphrases) -> EnglishQuestion | None:
    known = pick(rng, tuple(phrases.THINGS))
    named = [(o, n) for o, n in unique_nouns(scene, known) if o[known] in phrases.THINGS[known]]
    if not named:
        return None
    item, name = pick(rng, named)
    values = [item[known], *(v for v in phrases.THINGS[known] if v != item[known])]
    # the right one, and three of other values
    chosen = [values[0], *(values[1 + int(i)] for i in rng.permutation(len(values) - 1)[:3])]
    words = [pick(rng, tuple(phrases.THINGS[known][value])) for value in chosen]
    options = [words[int(i)] for i in rng.permutation(len(words))]
    index, frame = choose_frame(phrases.LOOK_RECALL, rng, paraphrases)
    things = f"{', '.join(options[:-1])} or {options[-1]}"
    text = fill(frame, things=things, known=known, x=name)
    return EnglishQuestion("look_recall", text, words[0], "", index, (), (item.cell,))


def _follow(scene: Scene, start: Object, steps: Sequence[str]) -> list[Object] | None:
    """The objects on a path, start included; None where it leads nowhere or back to an object it has passed."""
    passed = [start]
    for step in steps:
        reached = follow(scene, passed[-1], step)
        if reached is None or reached in passed:
            return None
        passed.append(reached)
    return passed


def _path(
    scene: Scene,
    kind: str,
    named: Named,
    asked: str,
    rng: np.random.Generator,
    form: str,
    frame: tuple[int, str],
    tries: int,
) -> EnglishQuestion | None:
    start, name = named
    for _ in range(tries):
        steps = draw_steps(kind, asked, rng)
        passed = _follow(scene, start, steps)
        if passed is None:
            continue
        index, words = frame
        if form == "told":
            text = fill(words, asked=asked, x=tell(name, steps))
        else:
            slots = list(steps)
            while len(slots) < NUM_PATHS_STEPS:  # pauses anywhere on the way
                slots.insert(int(rng.integers(len(slots) + 1)), STAY)
            told = dict(zip(("first", "second", "third"), (phrases.STEP_PHRASES[s] for s in slots), strict=True))
            text = fill(words, asked=asked, x=name, **told)
        target = tuple(o.cell for o in passed)
        return EnglishQuestion(kind, text, passed[-1][asked], form, index, steps, target)
    return None


def _ask_path(scene: Scene, kind: str, rng: np.random.Generator, paraphrases: Paraphrases) -> EnglishQuestion | None:
    form = "told" if rng.integers(2) else "walked"
    asked = pick(rng, ATTRIBUTES)
    named = unique_nouns(scene, asked)
    if not named:
        return None
    frame = choose_frame(phrases.PATH if form == "told" else phrases.WALK, rng, paraphrases)
    return _path(scene, kind, pick(rng, named), asked, rng, form, frame, tries=1)


_ASKERS: dict[str, Asker] = {
    "arithmetic": _arithmetic,
    "knowledge": _knowledge,
    "existence": _existence,
    "count": _count,
    "relation": _relation,
    "comparison": _comparison,
    "recall_look": _recall_look,
    "look_recall": _look_recall,
}


def ask(
    scene: Scene,
    kind: str,
    rng: np.random.Generator,
    paraphrases: Paraphrases = "known",
    tries: int = 12,
) -> EnglishQuestion | None:
    """One question of a kind about a scene, or None if the scene (or the draw) admits none."""
    if kind not in KINDS:
        raise ValueError(f"unknown question kind {kind!r}; choose from {sorted(KINDS)}")
    # a second try at a count would favour the answers that most scenes admit
    for _ in range(1 if kind == "count" else tries):
        if kind in PATH_KINDS:
            question = _ask_path(scene, kind, rng, paraphrases)
        else:
            question = _ASKERS[kind](scene, rng, paraphrases)
        if question is not None:
            return question
    return None


def ask_matched(
    scene: Scene, rng: np.random.Generator, paraphrases: Paraphrases = "known", tries: int = 24
) -> dict[str, EnglishQuestion] | None:
    """A walked question of each number of hops from one start, about one attribute, in one paraphrase; else None."""
    for _ in range(tries):
        asked = pick(rng, ATTRIBUTES)
        named = unique_nouns(scene, asked)
        if not named:
            continue
        start, frame = pick(rng, named), choose_frame(phrases.WALK, rng, paraphrases)
        group = {k: _path(scene, k, start, asked, rng, "walked", frame, tries) for k in MATCHED_KINDS}
        found = {k: q for k, q in group.items() if q is not None}
        if len(found) == len(group):
            return found
    return None
