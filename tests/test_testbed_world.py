"""The testbed's world and questions: deterministic, unambiguous, and free of shortcuts."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from dyvte.testbed.questions import (
    DIRECTIONS,
    IMAGE_KINDS,
    KINDS,
    PATH_KINDS,
    SAME,
    ShapesQuestions,
    ask,
    caption,
    follow,
)
from dyvte.testbed.tokenizer import SYSTEM_PROMPT, vocabulary
from dyvte.testbed.world import (
    ATTRIBUTES,
    IMAGE_SIZE,
    VALUES,
    Object,
    Scene,
    patch_labels,
    render,
    sample_scene,
    scene_generator,
)


def test_a_scene_is_a_function_of_its_seed_and_splits_differ() -> None:
    assert sample_scene("train", 0, 5) == sample_scene("train", 0, 5)
    assert (render(sample_scene("test", 0, 5)) == render(sample_scene("test", 0, 5))).all()
    scenes = {
        (s, i): sample_scene(s, 0, i).objects for s in ("train", "validation", "test", "caption") for i in range(50)
    }
    assert len(set(scenes.values())) == len(scenes)


def test_objects_stay_inside_their_cells_and_cells_hold_one_object() -> None:
    for index in range(200):
        scene = sample_scene("train", 0, index)
        assert len({(o.row, o.column) for o in scene.objects}) == len(scene.objects)
        for o in scene.objects:
            assert (int(o.y // 32), int(o.x // 32)) == (o.row, o.column)
            assert o.radius <= o.x <= IMAGE_SIZE - o.radius


def test_rendered_colors_are_where_the_labels_say() -> None:
    scene = sample_scene("train", 0, 3)
    image = render(scene) / 255.0
    for o in scene.objects:
        assert np.abs(image[int(o.y), int(o.x)] - np.array(o.rgb)).max() < 0.15
    labels = patch_labels(scene, 8)["color"].reshape(12, 12)
    for o in scene.objects:
        assert labels[int(o.y) // 8, int(o.x) // 8] == 1 + VALUES["color"].index(o.color)


def _solve(scene: Scene, text: str) -> str:
    """Answer a question from its words alone, by a second implementation that shares no code with the generator."""
    words = text.split()

    def find(name: list[str]) -> Object:
        words = [w for w in name if w != "shape"]  # "red shape" names by color alone
        found = [o for o in scene.objects if all(w in (o.color, o.shape, o.size) for w in words)]
        assert len(found) == 1, f"{name} names {len(found)} objects"
        return found[0]

    if words[:2] == ["what", "is"]:
        return str(int(words[2]) + int(words[4]) if words[3] == "plus" else int(words[2]) - int(words[4]))
    if words[:2] == ["is", "there"]:
        return "yes" if any(all(w in (o.color, o.shape, o.size) for w in words[3:5]) for o in scene.objects) else "no"
    if words[:2] == ["how", "many"]:
        return str(sum(words[2] in (o.color, o.shape) for o in scene.objects))
    if words[0] == "is":
        a, b = find(words[2:4]), find(words[-3:-1])
        truth = {
            "left": a.column < b.column,
            "right": a.column > b.column,
            "above": a.row < b.row,
            "below": a.row > b.row,
        }
        return "yes" if truth[words[4]] else "no"
    if words[0] == "do":
        a, b = find(words[2:4]), find(words[6:8])
        return "yes" if getattr(a, words[-2]) == getattr(b, words[-2]) else "no"
    here = find(words[2:4])
    for step in (words[5], words[7]):
        if step in DIRECTIONS:
            dr, dc = DIRECTIONS[step]
            (here,) = [o for o in scene.objects if (o.row, o.column) == (here.row + dr, here.column + dc)]
        elif step in SAME:
            same = [o for o in scene.objects if o is not here and getattr(o, SAME[step]) == getattr(here, SAME[step])]
            (here,) = same
    return getattr(here, words[-2])


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_what_an_independent_solver_finds(kind: str) -> None:
    records = ShapesQuestions("train", 150, kinds=[kind])
    assert len(records) == 150
    for record in records:
        assert _solve(record.scene, record.question) == record.answer, record


def test_kinds_come_equally_often_in_any_prefix() -> None:
    for number in (90, 900):
        counts = Counter(r.kind for r in ShapesQuestions("test", number))
        assert set(counts) == set(KINDS)
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("kinds", [["attribute"], ["relation"], ["comparison", "existence"]])
def test_fewer_kinds_than_questions_an_image_are_asked_again(kinds: list[str]) -> None:
    records = ShapesQuestions("test", 60, kinds=kinds, per_scene=3)
    counts = Counter(record.image_id for record in records)
    assert max(counts.values()) == 3
    assert sum(counts.values()) / len(counts) > 2  # some scenes have no question of a kind
    assert len({(record.image_id, record.question) for record in records}) == 60
    assert len({record.question_id for record in records}) == 60


def test_questions_are_deterministic_and_a_prefix_of_a_longer_list() -> None:
    short, long = ShapesQuestions("test", 60), ShapesQuestions("test", 120)
    assert [r.question_id for r in short] == [r.question_id for r in long[:60]]
    assert len({r.question_id for r in long}) == 120


def _features(kind: str, text: str) -> tuple[str, ...]:
    """What a question-only guesser may look at: the words that vary within a kind, in pairs."""
    words = [w for w in text.split() if w in {v for vs in VALUES.values() for v in vs} | set(DIRECTIONS) | set(SAME)]
    words.append(text.split()[-2])
    return tuple(words)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_a_question_only_guesser_is_left_with_chance(kind: str) -> None:
    """A naive-Bayes guesser trained on 2,300 questions of a kind gains at most six points on the chance rate."""
    records = ShapesQuestions("probe", 3000, kinds=[kind])
    train, test = records[:2300], records[2300:]
    prior: dict[str, Counter[str]] = defaultdict(Counter)
    likelihood: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for r in train:
        asked = r.question.split()[-2] if kind in PATH_KINDS else ""
        prior[asked][r.answer] += 1
        for feature in _features(kind, r.question):
            likelihood[asked, r.answer][feature] += 1
    right, chance = 0, 0.0
    for r in test:
        asked = r.question.split()[-2] if kind in PATH_KINDS else ""
        answers = prior[asked]
        chance += 1 / len(answers)
        scores = {}
        for answer, total in answers.items():
            logs = [np.log((likelihood[asked, answer][f] + 1) / (total + 2)) for f in _features(kind, r.question)]
            scores[answer] = np.log(total) + sum(logs)
        right += max(sorted(scores), key=scores.__getitem__) == r.answer
    print(f"{kind}: question-only {right / len(test):.3f}, chance {chance / len(test):.3f}")
    assert right / len(test) < chance / len(test) + 0.06


@pytest.mark.parametrize("kind", PATH_KINDS)
def test_answers_do_not_depend_on_where_the_answer_lies(kind: str) -> None:
    by_cell: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for r in ShapesQuestions("probe", 2400, kinds=[kind]):
        if r.question.split()[-2] != "size":
            continue
        name = [w for w in r.question.split()[2:4] if w != "shape"]
        found = [o for o in r.scene.objects if all(w in (o.color, o.shape) for w in name)]
        by_cell[found[0].row, found[0].column][r.answer] += 1
    for counts in by_cell.values():
        total = sum(counts.values())
        assert abs(counts["large"] / total - 0.5) < 4 * 0.5 / np.sqrt(total)


def test_matched_questions_differ_in_their_steps_only() -> None:
    records = ShapesQuestions("test", 80, matched=True)
    groups: dict[str, list] = defaultdict(list)
    for r in records:
        groups[r.group].append(r)
    for group in groups.values():
        assert [r.kind for r in group] == list(PATH_KINDS)
        assert len({r.image_id for r in group}) == 1
        assert len({len(r.question.split()) for r in group}) == 1
        words = np.array([r.question.split() for r in group])
        assert set(np.flatnonzero((words != words[0]).any(axis=0))) <= {5, 7}
        assert all(r.answer in VALUES[r.question.split()[-2]] for r in group)


def test_captions_name_every_object_in_random_order() -> None:
    scene = next(s for s in (sample_scene("caption", 0, i) for i in range(50)) if len(s.objects) == 4)
    orders = set()
    for seed in range(30):
        parts = caption(scene, np.random.default_rng(seed)).split(" , ")
        assert len(parts) == 4
        orders.add(tuple(parts))
    assert len(orders) > 10
    assert len({frozenset(o) for o in orders}) == 1


def test_every_word_is_in_the_vocabulary() -> None:
    words = set(vocabulary())
    text = [SYSTEM_PROMPT, *(r.question for r in ShapesQuestions("train", 600, kinds=[*KINDS, "caption"]))]
    text += [r.answer for r in ShapesQuestions("train", 600, kinds=[*KINDS, "caption"])]
    assert {w for t in text for w in t.split()} <= words


def test_paths_are_refused_where_they_are_ambiguous_or_leave_the_image() -> None:
    scene = sample_scene("train", 0, 0)
    for o in scene.objects:
        for step, attribute in SAME.items():
            others = [p for p in scene.objects if p is not o and p[attribute] == o[attribute]]
            assert (follow(scene, o, step) is None) == (len(others) != 1)
        if o.row == 0:
            assert follow(scene, o, "above") is None


def test_errors_name_the_choices() -> None:
    scene = sample_scene("train", 0, 0)
    with pytest.raises(ValueError, match="unknown question kind 'riddle'"):
        ask(scene, "riddle", scene_generator("train", 0, 0))
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        sample_scene("dev", 0, 0)
    with pytest.raises(ValueError, match="2 to 6 objects"):
        sample_scene("train", 0, 0, 1, 9)
    with pytest.raises(KeyError, match="no attribute 'weight'"):
        scene.objects[0]["weight"]
    assert tuple(VALUES) == ATTRIBUTES
