"""The training batches of `llava_smol`: many questions behind one image in one packed sequence, and some plain text.

Every batch is a pure function of (seed, phase, step), so a killed and resumed run equals an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

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
from dyvte.testbed.training.batches import QuestionBatches
from dyvte.testbed.world import Scene, sample_scene, scene_stream


class EnglishBatches(QuestionBatches):
    """Batches of one phase.

    The phase says what each scene is asked: `captions`, `look_ups` and `questions` a scene, `max_hops`, `kind_weights`;
    and how much there is: `scenes` images and `texts` rows of rehearsed text a step, `length` in tokens.
    """

    ask, before_answer, end = staticmethod(ask), ASSISTANT, EOS

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
        self.weights = np.array([weights[kind] for kind in self.kinds])

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
            branches += self.drawn_questions(scene, rng, phase.questions, self.kinds, self.weights)
            rows.append((self.prefix, branches))
            scenes.append(scene)
        teachers: list[Teacher] = []
        for _ in range(phase.texts if self.rehearsed else 0):
            texts = self._text_row(rng)
            rows.append(([], [Branch("text", text.ids[:1], text.ids[1:]) for text in texts]))
            teachers += [text.teacher for text in texts]
        packed = pack(rows, phase.length, self.pad_id)
        packed.weights[phase.scenes :] *= phase.text_weight
        return packed, self.images(scenes), Teacher.concatenate(teachers) if teachers else None

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
        for scene, rng in islice(scene_stream("validation", 0, purpose=4), number):
            rows.append((self.prefix, self.every_question(scene, rng, IMAGE_KINDS)))
            scenes.append(scene)
        return pack(rows, int(self.phase.length) + 64, self.pad_id), self.images(scenes)
