"""Data sets of questions in plain English: deterministic, kinds in turn, matched groups on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from dyvte.errors import ConfigError
from dyvte.testbed.questions import check_questions
from dyvte.testbed.smol.questions import KINDS, EnglishQuestion, Paraphrases, ask, ask_matched
from dyvte.testbed.world import Scene, scene_stream

LAG = 2  # questions by which a rare kind may fall behind the others


@dataclass(frozen=True)
class EnglishRecord:
    """One question about one scene. `group` is shared by questions matched in all but their hops, else empty."""

    scene: Scene
    question_id: str
    question: EnglishQuestion
    group: str = ""


class EnglishQuestions(list[EnglishRecord]):
    """`num` questions of a split, kinds in turn (so that any prefix is balanced), `per_scene` to an image.

    With `matched`, walked questions of one to four hops about one scene come as a group. Deterministic: record i of
    the same arguments never changes.
    """

    def __init__(
        self,
        split: str,
        num: int,
        seed: int = 0,
        kinds: Sequence[str] | None = None,
        per_scene: int = 3,
        matched: bool = False,
        paraphrases: Paraphrases = "all",
    ) -> None:
        if paraphrases not in ("known", "held_out", "all"):
            raise ConfigError(f"paraphrases must be known, held_out or all, got {paraphrases!r}")
        chosen = tuple(kinds or KINDS)
        check_questions(num, per_scene, chosen, tuple(KINDS))
        stream = _matched(split, seed, paraphrases) if matched else _mixed(split, seed, chosen, per_scene, paraphrases)
        super().__init__(islice(stream, num))


def _mixed(
    split: str, seed: int, kinds: tuple[str, ...], per_scene: int, paraphrases: Paraphrases
) -> Iterator[EnglishRecord]:
    asked_so_far = dict.fromkeys(kinds, 0)
    for scene, rng in scene_stream(split, seed, purpose=4):
        texts: set[str] = set()
        for kind in sorted(kinds, key=lambda k: (asked_so_far[k], kinds.index(k))):
            if len(texts) == per_scene or asked_so_far[kind] > min(asked_so_far.values()) + LAG:
                break
            question = ask(scene, kind, rng, paraphrases)
            if question is None or question.text in texts:
                continue
            asked_so_far[kind] += 1
            texts.add(question.text)
            yield EnglishRecord(scene, f"{scene.image_id}-e{len(texts)}", question)


def _matched(split: str, seed: int, paraphrases: Paraphrases) -> Iterator[EnglishRecord]:
    for scene, rng in scene_stream(split, seed, purpose=5):
        name = f"{scene.image_id}-w"
        for number, question in enumerate((ask_matched(scene, rng, paraphrases) or {}).values()):
            yield EnglishRecord(scene, f"{name}{number}", question, group=name)
