"""Tours and look-ups, which only training sees: what they say is true, and what they call decided is decided."""

from __future__ import annotations

import numpy as np
import pytest

from dyvte.testbed.lookups import brief, look_up
from dyvte.testbed.questions import follow
from dyvte.testbed.tokenizer import build_tokenizer
from dyvte.testbed.tours import PLACE, tour
from dyvte.testbed.world import ATTRIBUTES, COLUMNS, ROWS, VALUES, Object, Scene, sample_scene


def facts(item: Object) -> dict[str, str]:
    return {a: item[a] for a in ATTRIBUTES} | {"row": ROWS[item.row], "column": COLUMNS[item.column]}


def fits(item: Object, words: list[str]) -> bool:
    """Whether a key of attribute words, or of "at" and a place, is true of an object."""
    if words[0] == PLACE:
        return [facts(item)["row"], facts(item)["column"]] == words[1:]
    return all(word == "shape" or word in (item[a] for a in ATTRIBUTES) for word in words)


def solve(scene: Scene, text: str) -> list[str]:
    """Every answer that a look-up allows, read from its words alone."""
    *path, asked = text.split()
    key, steps = path, []
    while "go" in key:
        at = len(key) - 1 - key[::-1].index("go")
        steps.insert(0, key[at + 1])
        key = key[:at]
    answers = []
    for start in scene.objects:
        here: Object | None = start if fits(start, key) else None
        for step in steps:
            here = follow(scene, here, step) if here is not None else None
        if here is not None:
            known = facts(here)
            answers.append(f"{known['row']} {known['column']}" if asked == PLACE else known[asked])
    return answers


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_look_up_has_one_answer_and_says_it(steps: int) -> None:
    found = 0
    for index in range(300):
        scene = sample_scene("caption", 5, index)
        one = look_up(scene, np.random.default_rng(index), steps)
        if one is None:
            continue
        found += 1
        text, answer = one
        assert text.split().count("go") == steps
        assert solve(scene, text) == [answer]
        assert f"same-{text.split()[-1]}" not in text.split()
    assert found > 150


def answer_brief(scene: Scene, text: str) -> str:
    """The answer to a brief question, read from its words alone."""
    words = text.split()
    assert words.pop() == "?"
    if words[:2] == ["how", "many"]:
        return str(sum(fits(o, words[2:]) for o in scene.objects))
    if len(words) == 2:
        return "yes" if any(fits(o, words) for o in scene.objects) else "no"
    if words[-2] == "same":
        pair = [next(o for o in scene.objects if fits(o, key)) for key in (words[:2], words[2:4])]
        return "yes" if pair[0][words[-1]] == pair[1][words[-1]] else "no"
    first, second = (next(o for o in scene.objects if fits(o, key)) for key in (words[:2], words[3:]))
    step = {"left": second.column - first.column, "above": second.row - first.row}
    step |= {"right": -step["left"], "below": -step["above"]}
    return "yes" if step[words[2]] > 0 else "no"


@pytest.mark.parametrize("max_hops", [1, 2])
def test_a_brief_question_says_the_truth_and_all_its_kinds_come(max_hops: int) -> None:
    told: dict[int, list[str]] = {}
    for index in range(300):
        scene = sample_scene("caption", 5, index)
        if one := brief(scene, np.random.default_rng(index), max_hops):
            text, answer = one
            assert answer == answer_brief(scene, text)
            told.setdefault(len(text.split()), []).append(answer)
    assert set(told) == ({3, 4} if max_hops == 1 else {3, 4, 6, 7}), "existence, count; relation, comparison"
    assert 0.35 < np.mean([a == "yes" for a in told[3]]) < 0.65


def test_every_word_of_practice_is_in_the_vocabulary() -> None:
    tokenizer = build_tokenizer()
    known = set(tokenizer.get_vocab())
    for index in range(50):
        scene, rng = sample_scene("caption", 5, index), np.random.default_rng(index)
        assert {w.text for w in tour(scene, rng, 8)} <= known
        for one in (look_up(scene, rng, 1), brief(scene, rng, 2)):
            assert one is None or set(" ".join(one).split()) <= known


def _tours_that_may_be(scene: Scene, words: list[str]) -> set[str]:
    """Next words that are true for some object the words so far allow (a naive walk over all objects)."""
    allowed, kind, place = list(scene.objects), "", 0
    position = 0
    while position < len(words):
        word = words[position]
        if word == ",":
            allowed = list(scene.objects)
        elif word == "go":
            position += 1
            ends = [follow(scene, o, words[position]) for o in allowed]
            allowed = [o for o in scene.objects if any(o is e for e in ends)]
        elif word in (*ATTRIBUTES, PLACE):
            kind, place = word, 0
        else:
            name = ("row", "column")[place] if kind == PLACE else kind
            allowed = [o for o in allowed if facts(o)[name] == word]
            place += 1
        position += 1
    name = ("row", "column")[place] if kind == PLACE else kind
    return {facts(o)[name] for o in allowed}


def test_a_tour_is_true_and_its_decided_words_are_those_with_one_choice() -> None:
    values = {v for vs in VALUES.values() for v in vs} | set(ROWS) | set(COLUMNS)
    decided = 0
    for index in range(60):
        scene = sample_scene("caption", 5, index)
        words = tour(scene, np.random.default_rng(index), 8)
        texts = [w.text for w in words]
        for position, word in enumerate(words):
            if word.text not in values or texts[position - 1] == "go":
                assert not word.decided
                continue
            possible = _tours_that_may_be(scene, texts[:position])
            assert word.text in possible
            assert word.decided == (len(possible) == 1)
            decided += word.decided
    assert decided > 500
