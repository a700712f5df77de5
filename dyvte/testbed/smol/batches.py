"""The training batches of `llava_smol`: many questions behind one image in one packed sequence, and some plain text.

Every batch is a pure function of (seed, phase, step), so a killed and resumed run equals an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dyvte.testbed.packing import Branch, PackedBatch, pack
from dyvte.testbed.smol import phrases
from dyvte.testbed.smol.base import ASSISTANT, EOS, HEAD, IMAGE
from dyvte.testbed.smol.practice import caption, look_up
from dyvte.testbed.smol.questions import IMAGE_KINDS, KINDS, ask, choose_frame
from dyvte.testbed.training.batches import pixels
from dyvte.testbed.world import Scene, sample_scene, scene_generator

CAPTION_SCENES = 2 * 10**7  # look-ups and captions are about scenes that no question is ever asked about


class EnglishBatches:
    """Batches of one phase.

    Args:
        phase: What each scene is asked: `captions`, `look_ups` and `questions` a scene, `max_hops`, `kind_weights`;
            `scenes` images and `texts` rows of plain text a step; `length` in tokens.
        replay: Token ids of texts that keep the language model what it is.
    """

    def __init__(
        self,
        phase: DictConfig,
        tokenizer: PreTrainedTokenizerFast,
        visual_tokens: int,
        seed: int,
        replay: Sequence[Sequence[int]] = (),
        blind: bool = False,
    ) -> None:
        self.phase, self.tokenizer, self.seed, self.replay, self.blind = phase, tokenizer, seed, replay, blind
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
        found: dict[str, str] = {}
        for _ in range(2 * number):
            if len(found) < number and (one := look_up(scene, rng, self.phase.step_share)) is not None:
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

    def train(self, step: int, progress: float = 0.0) -> tuple[PackedBatch, Tensor | None]:
        """Images with what the phase asks of each, and rows of text whose words weigh `text_weight`."""
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
        rows += [self._text_row(rng) for _ in range(phase.texts if self.replay else 0)]
        packed = pack(rows, phase.length, self.pad_id)
        packed.weights[phase.scenes :] *= phase.text_weight
        return packed, None if self.blind else pixels(scenes)

    def _text_row(self, rng: np.random.Generator) -> tuple[list[int], list[Branch]]:
        row: list[Branch] = []
        room = int(self.phase.length)
        while room > 64:
            text = list(self.replay[int(rng.integers(len(self.replay)))])[:room]
            row.append(Branch("text", text[:1], text[1:]))
            room -= len(text)
        return [], row

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


# fmt: off
REPLAY_TOPICS = [
    "a river", "a bicycle", "bread", "the moon", "a lighthouse", "chess", "a thunderstorm", "the heart", "a library",
    "volcanoes", "a train", "honey bees", "a violin", "winter", "the ocean", "a garden", "money", "sleep", "a bridge",
    "photosynthesis", "a mountain", "friendship", "a market", "electricity", "the desert", "a letter", "a clock",
    "rice", "music", "a window", "an island", "birds", "a school", "gravity", "a dream", "trees", "a hospital",
    "languages", "salt", "a festival", "maps", "a dog", "running", "a painter", "the wind", "history", "a kitchen",
    "computers", "a secret", "tea", "robots", "a farmer", "glass", "the stars", "a promise", "football", "paper",
    "a doctor", "rain", "a castle", "mathematics", "a fisherman", "cities", "a birthday", "medicine", "snow",
    "an old house", "a spider", "cotton", "soup",
]
# fmt: on
REPLAY_REQUESTS = (
    "Write a short story about {}.",
    "Explain {} to a child.",
    "What should I know about {}?",
    "Write a poem about {}.",
    "Give me three facts about {}.",
    "Write an email that mentions {}.",
)


@torch.no_grad()
def write_replay(
    model: Any, tokenizer: PreTrainedTokenizerFast, number: int, length: int, seed: int, batch_size: int = 35
) -> list[list[int]]:
    """Texts that the language model itself writes, to be rehearsed while it learns to see: `number` lists of ids."""
    requests = [r.format(t) for r in REPLAY_REQUESTS for t in REPLAY_TOPICS]
    rng = np.random.default_rng(seed)
    chosen = [requests[int(i)] for i in rng.permutation(len(requests))[:number]]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    texts: list[list[int]] = []
    torch.manual_seed(seed)
    for start in range(0, len(chosen), batch_size):
        prompts = [
            f"<|im_start|>system\n{system}{EOS}\n<|im_start|>user\n{request}{ASSISTANT}"
            for request in chosen[start : start + batch_size]
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        written = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=length,
            do_sample=True,
        )
        for ids, kept in zip(written.tolist(), inputs["attention_mask"].sum(1).tolist(), strict=True):
            ids = ids[inputs["input_ids"].shape[1] - kept :]
            end = int(tokenizer.convert_tokens_to_ids(EOS))
            ends = [i for i, token in enumerate(ids) if token == end and i >= kept]
            texts.append(ids[: ends[0] + 1] if ends else ids)
    return texts
