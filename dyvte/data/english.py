"""The task of `llava_smol`: plain English questions about drawn scenes (see `dyvte.testbed.smol.questions`)."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from dyvte.data.base import Dataset, Sample, check_limit, text_fingerprint
from dyvte.testbed.smol.questions import Paraphrases
from dyvte.testbed.smol.records import EnglishQuestions
from dyvte.testbed.world import render


class EnglishDataset(Dataset):
    """Plain English questions drawn from a seed, with the arguments of `dyvte.data.shapes.ShapesDataset`.

    Args:
        matched: Walked questions of one to four hops, asked of each scene in groups that differ in the hops alone.
        paraphrases: `known` (those of training), `held_out` or `all`.

    Example:
        >>> dataset = EnglishDataset(limit=2, kinds=["attribute"])
        >>> dataset[0].kind, dataset[0].metadata["hops"]
        ('attribute', 1)
    """

    def __init__(
        self,
        split: str = "test",
        limit: int = 512,
        seed: int = 0,
        kinds: Sequence[str] | None = None,
        per_scene: int = 4,
        matched: bool = False,
        paraphrases: Paraphrases = "all",
    ) -> None:
        check_limit(limit)
        self.records = EnglishQuestions(split, limit, seed, kinds, per_scene, matched, paraphrases)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        question = record.question
        return Sample(
            id=record.question_id,
            image=Image.fromarray(render(record.scene)),
            question=question.text,
            answer=question.answer,
            kind=question.kind,
            image_id=record.scene.image_id,
            metadata={
                "hops": question.hops,
                "group": record.group,
                "form": question.form,
                "paraphrase": question.paraphrase,
                "target": [list(place) for place in question.target],
            },
        )

    @property
    def fingerprint(self) -> str:
        """Of the questions and answers."""
        asked = ((r.question_id, r.question.text, r.question.answer) for r in self.records)
        return text_fingerprint("\t".join(line) for line in asked)
