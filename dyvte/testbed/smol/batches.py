"""The training batches of `llava_smol`: many questions behind one image in one packed sequence, and some plain text.

Every batch is a pure function of (seed, phase, step), so a killed and resumed run equals an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dyvte.testbed.packing import Branch, PackedBatch, pack
from dyvte.testbed.smol import phrases
from dyvte.testbed.smol.base import ASSISTANT, EOS, HEAD, IMAGE
from dyvte.testbed.smol.practice import caption, look_up
from dyvte.testbed.smol.questions import IMAGE_KINDS, KINDS, ask, choose_frame
from dyvte.testbed.smol.rehearsal import Rehearsed, Teacher
from dyvte.testbed.training.batches import pixels
from dyvte.testbed.world import Scene, sample_scene, scene_generator

CAPTION_SCENES = 2 * 10**7  # look-ups and captions are about scenes that no question is ever asked about


class EnglishBatches:
    """Batches of one phase.

    Args:
        phase: What each scene is asked: `captions`, `look_ups` and `questions` a scene, `max_hops`, `kind_weights`;
            `scenes` images and `texts` rows of plain text a step; `length` in tokens.
        rehearsed: Texts that keep the language model what it is.
    """

    def __init__(
        self,
        phase: DictConfig,
        tokenizer: PreTrainedTokenizerFast,
        visual_tokens: int,
        seed: int,
        rehearsed: Sequence[Rehearsed] = (),
        blind: bool = False,
    ) -> None:
        self.phase, self.tokenizer, self.seed, self.rehearsed, self.blind = phase, tokenizer, seed, rehearsed, blind
        self.pad_id = int(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        image = [] if blind else self.ids(IMAGE) * visual_tokens
        self.prefix = [*self.ids(HEAD), *image]
        weights = dict.fromkeys(KINDS, 1.0) | {str(k): float(v) for k, v in phase.kind_weights.items()}
        self.kinds = [kind for kind in KINDS if KINDS[kind] <= phase.max_hops and weights[kind] > 0]
        shares = np.array([weights[kind] for kind in self.kinds])
        self.shares = shares / shares.sum()

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def branch(self, kind: str, question: str, answer: str) -> Branch:
        """A question with its answer and end token, in the chat format."""
        return Branch(kind, self.ids(question + ASSISTANT), self.ids(answer + EOS))

    def _caption(self, scene: Scene, rng: np.random.Generator) -> Branch:
        _, frame = choose_frame(phrases.CAPTION, rng, "known")
        return self.branch("caption", frame, caption(scene, rng))

    def _look_ups(self, scene: Scene, rng: np.random.Generator, number: int) -> list[Branch]:
        phase, found = self.phase, dict[str, str]()
        shares = phase.step_share, phase.pair_share, phase.tally_share
        for _ in range(2 * number):
            if len(found) < number and (one := look_up(scene, rng, *shares)) is not None:
                found[one[0]] = one[1]
        return [self.branch("look_up", question, answer) for question, answer in found.items()]

    def _questions(self, scene: Scene, rng: np.random.Generator, number: int) -> list[Branch]:
        branches, seen = [], set()
        for kind in rng.choice(self.kinds, size=2 * number, p=self.shares):
            question = ask(scene, str(kind), rng, "known", tries=4)
            if question is not None and question.text not in seen:
                seen.add(question.text)
                branches.append(self.branch(question.kind, question.text, question.answer))
            if len(branches) == number:
                break
        return branches

    def train(self, step: int, progress: float = 0.0) -> tuple[PackedBatch, Tensor | None, Teacher | None]:
        """Images with what the phase asks of each, and rows of text whose words weigh `text_weight`.

        The teacher's distributions are those of the labelled words of the text rows, in their order.
        """
        phase = self.phase
        rng = np.random.default_rng([self.seed, int(phase.number), step])
        rows: list[tuple[list[int], list[Branch]]] = []
        scenes = []
        for i in range(phase.scenes):
            index = step * phase.scenes + i
            practice = rng.random() < phase.practice_share
            scene = sample_scene("caption" if practice else "train", self.seed + 100 * int(phase.number), index)
            branches: list[Branch] = []
            if practice:
                branches += [self._caption(scene, rng) for _ in range(phase.captions)]
                branches += self._look_ups(scene, rng, phase.look_ups)
            branches += self._questions(scene, rng, phase.questions)
            rows.append((self.prefix, branches))
            scenes.append(scene)
        teachers: list[Teacher] = []
        for _ in range(phase.texts if self.rehearsed else 0):
            texts = self._text_row(rng)
            rows.append(([], [Branch("text", text.ids[:1], text.ids[1:]) for text in texts]))
            teachers += [text.teacher for text in texts]
        packed = pack(rows, phase.length, self.pad_id)
        packed.weights[phase.scenes :] *= phase.text_weight
        return packed, None if self.blind else pixels(scenes), Teacher.concatenate(teachers) if teachers else None

    def _text_row(self, rng: np.random.Generator) -> list[Rehearsed]:
        row: list[Rehearsed] = []
        room = int(self.phase.length)
        while room > 64:
            text = self.rehearsed[int(rng.integers(len(self.rehearsed)))].first(room)
            row.append(text)
            room -= len(text.ids)
        return row

    def validation(self, number: int) -> tuple[PackedBatch, Tensor | None]:
        """Scenes of the validation split with a question of every image kind that each admits, in known paraphrases."""
        rows, scenes = [], []
        for index in range(number):
            scene = sample_scene("validation", 0, index)
            rng = scene_generator("validation", 0, index, purpose=4)
            asked = [q for kind in IMAGE_KINDS if (q := ask(scene, kind, rng)) is not None]
            rows.append((self.prefix, [self.branch(q.kind, q.text, q.answer) for q in asked]))
            scenes.append(scene)
        return pack(rows, int(self.phase.length) + 64, self.pad_id), None if self.blind else pixels(scenes)
