"""Data sets of questions in plain English: deterministic, kinds in turn, matched groups on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dyvte.testbed.smol.questions import KINDS, EnglishQuestion, Paraphrases, ask, ask_matched
from dyvte.testbed.world import Scene, sample_scene, scene_generator

LAG = 2  # questions by which a rare kind may fall behind the others


@dataclass(frozen=True)
class EnglishRecord:
    """One question about one scene. `group` is shared by questions matched in all but their hops, else empty."""

    scene: Scene
    question_id: str
    question: EnglishQuestion
    group: str = ""


class EnglishQuestions(Sequence[EnglishRecord]):
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
        chosen = tuple(kinds) if kinds else tuple(KINDS)
        if unknown := [k for k in chosen if k not in KINDS]:
            raise ValueError(f"unknown question kinds {unknown}; choose from {tuple(KINDS)}")
        if paraphrases not in ("known", "held_out", "all"):
            raise ValueError(f"paraphrases must be known, held_out or all, got {paraphrases!r}")
        if num < 0 or per_scene < 1:
            raise ValueError(f"num must be at least 0 and per_scene at least 1, got {num} and {per_scene}")
        self.split, self.seed, self.kinds, self.paraphrases = split, seed, chosen, paraphrases
        stream = self._matched() if matched else self._mixed(per_scene)
        self._records = [record for record, _ in zip(stream, range(num), strict=False)]

    def _mixed(self, per_scene: int) -> Iterator[EnglishRecord]:
        asked_so_far = dict.fromkeys(self.kinds, 0)
        index = 0
        while True:
            scene = sample_scene(self.split, self.seed, index)
            rng = scene_generator(self.split, self.seed, index, purpose=4)
            texts: set[str] = set()
            for kind in sorted(self.kinds, key=lambda k: (asked_so_far[k], self.kinds.index(k))):
                if len(texts) == per_scene or asked_so_far[kind] > min(asked_so_far.values()) + LAG:
                    break
                question = ask(scene, kind, rng, self.paraphrases)
                if question is None or question.text in texts:
                    continue
                asked_so_far[kind] += 1
                texts.add(question.text)
                yield EnglishRecord(scene, f"{scene.image_id}-e{len(texts)}", question)
            index += 1

    def _matched(self) -> Iterator[EnglishRecord]:
        index = 0
        while True:
            scene = sample_scene(self.split, self.seed, index)
            rng = scene_generator(self.split, self.seed, index, purpose=5)
            name = f"{scene.image_id}-w"
            for number, question in enumerate((ask_matched(scene, rng, self.paraphrases) or {}).values()):
                yield EnglishRecord(scene, f"{name}{number}", question, group=name)
            index += 1

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._records[index]
