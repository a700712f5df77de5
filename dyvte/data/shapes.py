"""The built-in task: questions of known depth about drawn scenes (see `dyvte.testbed.questions`)."""

from __future__ import annotations

from collections.abc import Sequence

from dyvte.data.base import Dataset, Sample, check_limit, text_fingerprint
from dyvte.testbed.questions import IMAGE_KINDS, ShapesQuestions, ShapesRecord


class ShapesDataset(Dataset):
    """Questions drawn from a seed: the same arguments give the same samples on every machine.

    Args:
        split: Scenes of different splits are disjoint.
        limit: Number of questions; a smaller number gives the first of a larger one.
        seed: Draws other scenes and questions of the same split.
        kinds: Question kinds in equal shares; None for all.
        per_scene: Questions about one image.
        matched: Only the path kinds, asked of each scene in groups that differ in the number of hops alone.
    """

    def __init__(
        self,
        split: str = "test",
        limit: int = 512,
        seed: int = 0,
        kinds: Sequence[str] | None = None,
        per_scene: int = 3,
        matched: bool = False,
    ) -> None:
        check_limit(limit)
        self.records: Sequence[ShapesRecord] = ShapesQuestions(split, limit, seed, kinds, per_scene, matched)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        return Sample(
            id=record.question_id,
            image=record.image(),
            question=record.question,
            answer=record.answer,
            kind=record.kind,
            image_id=record.image_id,
            metadata={"hops": record.hops, "group": record.group},
        )

    @property
    def fingerprint(self) -> str:
        """Of the questions and answers."""
        return text_fingerprint(f"{r.question_id}\t{r.question}\t{r.answer}" for r in self.records)


class RecurringShapesDataset(ShapesDataset):
    """Questions whose text recurs: the same words about many images, for what may depend on the image alone.

    Of `pool` drawn questions (see `ShapesDataset`) those of the kinds that need the image, in equal numbers a kind,
    from the texts that were asked of the most images, at most `per_text` of each: `limit` in all, or as many as there
    are. Texts are chosen by how often they recur, whatever a model answers.
    """

    def __init__(
        self,
        split: str = "test",
        limit: int = 2000,
        seed: int = 0,
        pool: int = 20_000,
        per_text: int = 25,
        per_scene: int = 3,
    ) -> None:
        super().__init__(split, pool, seed, per_scene=per_scene)
        check_limit(limit)
        asked: dict[str, dict[str, list[int]]] = {kind: {} for kind in IMAGE_KINDS}
        for index, record in enumerate(self.records):
            if record.kind in asked:
                asked[record.kind].setdefault(record.question, []).append(index)
        chosen: list[int] = []
        for number, texts in enumerate(asked.values()):
            wanted = limit // len(asked) + (number < limit % len(asked))
            often = sorted(texts, key=lambda text: (-len(texts[text]), text))
            chosen += [index for text in often for index in texts[text][:per_text]][:wanted]
        self.records = [self.records[index] for index in sorted(chosen)]
