"""Questions about the testbed's scenes, of known depth, and captions.

A *hop* is one look-up in the image: finding the object a question names is the first, following it to a neighbour or to
the other object of the same colour is one more. Questions of one, two and three hops (kinds ``attribute``,
``same_attribute`` / ``neighbor`` and ``two_hop``) share one template, one length and one answer set::

    from the red circle go stay  then stay       : what size ?      1 hop
    from the red circle go left  then stay       : what size ?      2 hops, kind neighbor
    from the red circle go stay  then same-color : what size ?      2 hops, kind same_attribute
    from the red circle go same-color then left  : what size ?      3 hops, kind two_hop

so that their exit depths compare without a confound. A description names one or two attributes of an object ("red
shape", "red circle") and every path question asks for another one, which no step of the path can reveal: a guesser who
never sees the image is left with chance. Yes/no answers are drawn before the question, and a question is asked only
where either answer was possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from dyvte.errors import ConfigError
from dyvte.testbed.facts import (
    Named,
    draw_arithmetic,
    draw_attribute,
    draw_comparison,
    draw_count,
    draw_existence,
    draw_relation,
    pick,
)
from dyvte.testbed.world import ATTRIBUTES, Object, Scene, render, scene_stream

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
STAY = "stay"
SAME = {f"same-{attribute}": attribute for attribute in ATTRIBUTES}
STEPS = (STAY, *DIRECTIONS, *SAME)

KINDS: dict[str, int] = {
    "arithmetic": 0,
    "existence": 1,
    "attribute": 1,
    "count": 1,
    "relation": 2,
    "same_attribute": 2,
    "neighbor": 2,
    "comparison": 2,
    "two_hop": 3,
}
IMAGE_KINDS: tuple[str, ...] = tuple(k for k, hops in KINDS.items() if hops)
PATH_KINDS: tuple[str, ...] = ("attribute", "same_attribute", "neighbor", "two_hop")
YES, NO = "yes", "no"


@dataclass(frozen=True)
class Question:
    """A question with its one-word answer."""

    kind: str
    text: str
    answer: str


def describe(item: Object, mentioned: Sequence[str]) -> str:
    """Name an object by one or two of its attributes, in two words: "red circle", "small red", "red shape"."""
    words = [item[a] for a in ("size", "color", "shape") if a in mentioned]
    return " ".join(words if len(words) == 2 else [*words, "shape"])


def unique_names(
    scene: Scene, omitted: str, describe: Callable[[Object, Sequence[str]], str] = describe
) -> list[Named]:
    """All descriptions without the attribute ``omitted`` that fit exactly one object, each with its object."""
    allowed = [a for a in ATTRIBUTES if a != omitted]
    found = []
    for mentioned in (allowed, allowed[:1], allowed[1:]):
        names = [describe(o, mentioned) for o in scene.objects]
        found += [(o, n) for o, n in zip(scene.objects, names, strict=True) if names.count(n) == 1]
    return found


def follow(scene: Scene, start: Object, step: str) -> Object | None:
    """Where one step of a path leads, or None if it leads nowhere or is ambiguous.

    A direction leads to the object in the neighbouring cell; ``same-color`` (``-shape``, ``-size``) to the only other
    object with that attribute in common.
    """
    if step == STAY:
        return start
    if step in DIRECTIONS:
        return scene.at(start.row + DIRECTIONS[step][0], start.column + DIRECTIONS[step][1])
    attribute = SAME[step]
    others = [o for o in scene.objects if o is not start and o[attribute] == start[attribute]]
    return others[0] if len(others) == 1 else None


def moves(scene: Scene, start: Object, asked: str = "") -> list[tuple[str, Object]]:
    """Every step from an object that leads to another, with that one.

    None goes through the attribute that is asked for, which would give the answer away.
    """
    steps = [step for step in (*DIRECTIONS, *SAME) if SAME.get(step) != asked]
    return [(step, end) for step in steps if (end := follow(scene, start, step)) is not None]


def _existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    fact = draw_existence(scene, rng)
    return fact and Question("existence", f"is there a {' '.join(fact[0].values())} ?", YES if fact[1] else NO)


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    fact = draw_count(scene, rng)
    return fact and Question("count", f"how many {fact[1]} objects are there ?", str(fact[2]))


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    fact = draw_relation(unique_names(scene, draw_attribute(rng)), rng)
    if fact is None:
        return None
    words = {"left": "left of", "right": "right of"}.get(fact.asked, fact.asked)
    return Question("relation", f"is the {fact.first[1]} {words} the {fact.second[1]} ?", YES if fact.yes else NO)


def _comparison(scene: Scene, rng: np.random.Generator) -> Question | None:
    asked = draw_attribute(rng)
    fact = draw_comparison(unique_names(scene, asked), asked, rng)
    if fact is None:
        return None
    text = f"do the {fact.first[1]} and the {fact.second[1]} have the same {asked} ?"
    return Question("comparison", text, YES if fact.yes else NO)


def draw_steps(kind: str, asked: str, rng: np.random.Generator) -> tuple[str, ...]:
    """The steps of a kind of path, from none on; one through the asked attribute would give the answer away."""
    directions, same = tuple(DIRECTIONS), [name for name, attribute in SAME.items() if attribute != asked]
    if kind == "attribute":
        return ()
    if kind in ("same_attribute", "neighbor"):
        return (pick(rng, same if kind == "same_attribute" else directions),)
    # two directions would add up to one displacement, a single hop in disguise
    if kind == "two_hop":
        first = pick(rng, same)
        second = pick(rng, [s for s in (*directions, *same) if s != first])
        return (first, second) if rng.integers(2) else (second, first)
    middle = pick(rng, directions)
    if rng.integers(2):
        return pick(rng, same), middle, pick(rng, same)
    return middle, pick(rng, same), pick(rng, directions)


def _path(scene: Scene, kind: str, named: Named, asked: str, rng: np.random.Generator, tries: int) -> Question | None:
    start, name = named
    for _ in range(tries):
        steps = draw_steps(kind, asked, rng) or (STAY, STAY)
        if len(steps) == 1:
            steps = (*steps, STAY) if rng.integers(2) else (STAY, *steps)
        middle = follow(scene, start, steps[0])
        end = follow(scene, middle, steps[1]) if middle is not None else None
        if end is not None and (kind == "attribute" or end is not start):
            text = f"from the {name} go {steps[0]} then {steps[1]} : what {asked} ?"
            return Question(kind, text, end[asked])
    return None


def ask(scene: Scene, kind: str, rng: np.random.Generator, tries: int = 12) -> Question | None:
    """Ask one question of a kind about a scene, or None if the scene (or the draw) admits none."""
    if kind == "arithmetic":
        words, result = draw_arithmetic(rng)
        return Question(kind, f"what is {words} ?", str(result))
    if kind in PATH_KINDS:
        for _ in range(tries):
            asked = pick(rng, ATTRIBUTES)
            named = unique_names(scene, asked)
            if named and (question := _path(scene, kind, pick(rng, named), asked, rng, tries=1)):
                return question
        return None
    functions = {"existence": _existence, "count": _count, "relation": _relation, "comparison": _comparison}
    if kind not in functions:
        raise ValueError(f"unknown question kind {kind!r}; choose from {sorted(KINDS)}")
    # a second try at a count would favour the answers that most scenes admit
    for _ in range(1 if kind == "count" else tries):
        if question := functions[kind](scene, rng):
            return question
    return None


def ask_matched(scene: Scene, rng: np.random.Generator, tries: int = 24) -> dict[str, Question] | None:
    """One question of each path kind from the same start about the same attribute: matched in all but their hops."""
    for _ in range(tries):
        asked = pick(rng, ATTRIBUTES)
        named = unique_names(scene, asked)
        if not named:
            continue
        start = pick(rng, named)
        group = {kind: _path(scene, kind, start, asked, rng, tries) for kind in PATH_KINDS}
        if all(group.values()):
            return group  # type: ignore[return-value]
    return None


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that names every object with its place, in random order."""
    order = [scene.objects[int(i)] for i in rng.permutation(len(scene.objects))]
    return " , ".join(f"a {o.size} {o.color} {o.shape} at {o.place}" for o in order)


CAPTION_PROMPT = "describe the image ."


@dataclass(frozen=True)
class ShapesRecord:
    """One question about one scene. ``group`` is shared by questions matched in all but their hops, else empty."""

    scene: Scene
    question_id: str
    kind: str
    question: str
    answer: str
    group: str = ""

    @property
    def hops(self) -> int:
        """Look-ups in the image that the answer takes (a caption's objects are independent: 1)."""
        return KINDS.get(self.kind, 1)

    @property
    def image_id(self) -> str:
        """Name of the scene, shared by the questions about it."""
        return self.scene.image_id

    def image(self) -> Image.Image:
        """The rendered scene."""
        return Image.fromarray(render(self.scene))


def check_questions(num: int, per_scene: int, kinds: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a request for questions that cannot be asked."""
    if unknown := [k for k in kinds if k not in known]:
        raise ConfigError(f"unknown question kinds {unknown}; choose from {known}")
    if num < 0 or per_scene < 1:
        raise ConfigError(f"num must be at least 0 and per_scene at least 1, got {num} and {per_scene}")


class ShapesQuestions(list[ShapesRecord]):
    """``num`` questions of a split, kinds in turn (so that any prefix is balanced), ``per_scene`` to an image.

    With ``matched`` the four path kinds about one scene come as a matched group. The kind ``caption`` asks for a
    caption. Deterministic: record ``i`` of ``(split, seed, kinds, per_scene, matched)`` never changes.
    """

    def __init__(
        self,
        split: str,
        num: int,
        seed: int = 0,
        kinds: Sequence[str] | None = None,
        per_scene: int = 3,
        matched: bool = False,
    ) -> None:
        chosen = tuple(kinds or KINDS)
        check_questions(num, per_scene, chosen, (*KINDS, "caption"))
        stream = _matched(split, seed) if matched else _mixed(split, seed, chosen, per_scene)
        super().__init__(islice(stream, num))


def _mixed(split: str, seed: int, kinds: tuple[str, ...], per_scene: int) -> Iterator[ShapesRecord]:
    owed = dict.fromkeys(kinds, 0)  # questions asked so far: the kind that lags behind is asked next
    # Fewer kinds than questions an image: each is asked again, in other words if the first ones come up twice.
    rounds = 1 if len(kinds) >= per_scene else 3 * per_scene
    for scene, rng in scene_stream(split, seed, purpose=2):
        asked: set[str] = set()
        for _ in range(rounds):
            least = min(owed.values())
            for kind in sorted(kinds, key=lambda k: (owed[k], kinds.index(k))):
                if len(asked) == per_scene or owed[kind] > least:
                    break
                if kind == "caption":
                    question: Question | None = Question(kind, CAPTION_PROMPT, caption(scene, rng))
                else:
                    question = ask(scene, kind, rng)
                if question is None or question.text in asked:
                    continue
                owed[kind] += 1
                asked.add(question.text)
                yield ShapesRecord(scene, f"{scene.image_id}-{len(asked)}", kind, question.text, question.answer)


def _matched(split: str, seed: int) -> Iterator[ShapesRecord]:
    for scene, rng in scene_stream(split, seed, purpose=3):
        for number, (kind, question) in enumerate((ask_matched(scene, rng) or {}).items()):
            name = f"{scene.image_id}-m"
            yield ShapesRecord(scene, f"{name}{number}", kind, question.text, question.answer, group=name)
