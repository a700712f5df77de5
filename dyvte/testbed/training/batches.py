"""What the testbed is trained on, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dyvte.errors import ConfigError
from dyvte.testbed.lookups import brief, look_up
from dyvte.testbed.model import TestbedSizes
from dyvte.testbed.packing import Branch, PackedBatch, pack
from dyvte.testbed.questions import CAPTION_PROMPT, IMAGE_KINDS, KINDS, ask, caption
from dyvte.testbed.tokenizer import ASSISTANT, BOS, EOS, IMAGE, SYSTEM_PROMPT, USER, build_tokenizer
from dyvte.testbed.tours import TOUR_PROMPT, tour
from dyvte.testbed.world import MAX_OBJECTS, MIN_OBJECTS, Scene, render, sample_scene, scene_stream

STAGES = ("language", "vision", "align", "instruct")
MAX_HOPS = max(KINDS.values())
CAPTION_OFFSET = 10**7  # instruction's caption scenes are not the alignment's


def phases(cfg: DictConfig) -> list[tuple[str, DictConfig]]:
    """The phases of instruction in order: the name of each one's files, and the settings with its own put in.

    The last is named as the stage. Each phase draws scenes from a seed of its own.
    """
    chosen = list(cfg.instruct.phases)
    if unknown := [p for p in chosen if p not in cfg.phases]:
        raise ConfigError(f"instruct.phases names {unknown}; phases are {sorted(cfg.phases)}")
    if not chosen:
        return [("instruct", cfg)]
    found = []
    for number, phase in enumerate(chosen):
        settings = {"instruct": cfg.phases[phase].settings, "kind_weights": cfg.phases[phase].kind_weights}
        merged: Any = OmegaConf.merge(cfg, settings, {"seed": cfg.seed + number})
        found.append(("instruct" if number == len(chosen) - 1 else f"instruct_{phase}", merged))
    return found


class QuestionBatches:
    """What both testbeds' batches share: the chat format, and questions drawn by the weights of their kinds.

    Attributes:
        ask: a question of a kind about a scene, or None.
        before_answer, end: what stands around an answer.
        blind: no image is shown.
    """

    tokenizer: PreTrainedTokenizerFast
    ask: Callable[..., Any]
    before_answer: str
    end: str
    blind: bool

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without the start token."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def branch(self, kind: str, question: str, answer: str) -> Branch:
        """A question with its answer and end token, in the chat format."""
        return Branch(kind, self.ids(question + self.before_answer), self.ids(answer + self.end))

    def drawn_questions(
        self, scene: Scene, rng: np.random.Generator, number: int, kinds: Sequence[str], weights: Any
    ) -> list[Branch]:
        """At most ``number`` different questions about a scene, kinds by their weights."""
        found: dict[str, Branch] = {}
        for kind in rng.choice(kinds, size=2 * number, p=weights / weights.sum()):
            question = self.ask(scene, str(kind), rng, tries=4)
            if question is not None and question.text not in found:
                found[question.text] = self.branch(question.kind, question.text, question.answer)
            if len(found) == number:
                break
        return list(found.values())

    def every_question(self, scene: Scene, rng: np.random.Generator, kinds: Sequence[str]) -> list[Branch]:
        """A question of every kind that a scene admits."""
        asked = [q for kind in kinds if (q := self.ask(scene, kind, rng)) is not None]
        return [self.branch(q.kind, q.text, q.answer) for q in asked]

    def images(self, scenes: list[Scene]) -> Tensor | None:
        """Their `pixels`, for the blind control none."""
        return None if self.blind else pixels(scenes)


class Batches(QuestionBatches):
    """The training batches of every stage, each a pure function of (seed, stage, step)."""

    ask, before_answer, end = staticmethod(ask), f" {ASSISTANT}", f" {EOS}"

    def __init__(self, cfg: DictConfig, sizes: TestbedSizes) -> None:
        self.cfg, self.sizes, self.blind = cfg, sizes, cfg.instruct.blind
        self.tokenizer = build_tokenizer()
        self.pad_id: int = self.tokenizer.pad_token_id
        self.head = self.ids(f"{BOS} {SYSTEM_PROMPT} {USER}")
        self.image = self.ids(IMAGE) * sizes.visual_tokens
        names, shares = zip(*cfg.kind_weights.items(), strict=True)
        self.kinds: tuple[str, ...] = names
        self.shares = np.array(shares, dtype=float) / sum(shares)

    def tour(self, scene: Scene, rng: np.random.Generator) -> Branch:
        """A tour of the scene; only what the image decides carries the full loss."""
        words = tour(scene, rng, self.cfg.tour_stops)
        answer = [*self.ids(" ".join(w.text for w in words)), *self.ids(EOS)]
        return Branch("tour", self.ids(f"{TOUR_PROMPT} {ASSISTANT}"), answer, [*(w.decided for w in words), False])

    def look_ups(self, scene: Scene, rng: np.random.Generator, number: int, hops: int) -> list[Branch]:
        """At most ``number`` different look-ups of at most ``hops`` hops."""
        found: dict[str, tuple[str, str]] = {}
        shares = np.array(self.cfg.instruct.look_up_steps[:hops], dtype=float)
        for steps in rng.choice(len(shares), size=2 * number, p=shares / shares.sum()):
            if len(found) == number:
                break
            a_brief = rng.random() < self.cfg.instruct.brief_share
            one = brief(scene, rng, hops) if a_brief else look_up(scene, rng, int(steps))
            if one is not None:
                found[one[0]] = ("brief" if a_brief else "look_up", one[1])
        return [Branch(kind, self.ids(prompt), self.ids(answer)) for prompt, (kind, answer) in found.items()]

    def rng(self, stage: str, step: int) -> np.random.Generator:
        """The random generator of one step of a stage."""
        return np.random.default_rng([self.cfg.seed, STAGES.index(stage), step])

    def max_objects(self, stage: str, progress: float) -> int:
        """Scenes grow from three objects to all of them over the first ``curriculum`` of a stage."""
        curriculum = self.cfg[stage].curriculum
        grown = min(progress / curriculum, 1.0) if curriculum else 1.0
        return 3 + round(grown * (MAX_OBJECTS - 3))

    def questions(self, scene: Scene, rng: np.random.Generator, number: int, max_hops: int = MAX_HOPS) -> list[Branch]:
        """At most ``number`` different questions of at most ``max_hops`` each about a scene, kinds by their weights."""
        short = np.array([KINDS[k] <= max_hops for k in self.kinds])
        return self.drawn_questions(scene, rng, number, self.kinds, self.shares * short)

    def descriptions(self, scene: Scene, rng: np.random.Generator, number: int) -> list[Branch]:
        """Tours of a scene, a ``caption_share`` of them replaced by captions."""
        return [
            self.branch("caption", CAPTION_PROMPT, caption(scene, rng))
            if rng.random() < self.cfg.caption_share
            else self.tour(scene, rng)
            for _ in range(number)
        ]

    def language(self, step: int, progress: float, size: int, stage: str = "language") -> PackedBatch:
        """Scenes in words, each with a tour (or the scene again in another order) and questions."""
        rng, rows = self.rng(stage, step), []
        for i in range(size):
            scene = sample_scene("text", self.cfg.seed, step * size + i, MIN_OBJECTS, self.max_objects(stage, progress))
            branches = self.descriptions(scene, rng, 1) + self.questions(scene, rng, self.cfg.language.questions)
            rows.append(([*self.head, *self.ids(f"the image shows {caption(scene, rng)} .")], branches))
        weight = self.cfg.language.prompt_weight
        return pack(rows, self.cfg.language.length, self.pad_id, weight, prefix_weight=weight)

    def align(self, step: int, size: int) -> tuple[PackedBatch, Tensor]:
        """Images of caption scenes (which no question is ever asked about) with tours and captions."""
        rng = self.rng("align", step)
        scenes = [sample_scene("caption", self.cfg.seed, step * size + i) for i in range(size)]
        rows = [([*self.head, *self.image], self.descriptions(s, rng, self.cfg.align.descriptions)) for s in scenes]
        return pack(rows, self.cfg.align.length, self.pad_id, self.cfg.align.prompt_weight), pixels(scenes)

    @property
    def prefix(self) -> list[int]:
        """What stands before a question: the system prompt and the image, for the blind control no image."""
        return self.head if self.blind else [*self.head, *self.image]

    def instruct(self, step: int, progress: float, size: int) -> tuple[PackedBatch, Tensor | None]:
        """Images of question scenes with a random mix of questions, and of caption scenes with look-ups."""
        rng = self.rng("instruct", step)
        settings = self.cfg.instruct
        early, late = settings.look_up_share
        share = 0.0 if self.blind else late + (early - late) * max(1 - progress / settings.curriculum, 0.0)
        hops = 1 + sum(progress >= start for start in settings.more_hops_from)
        rows, scenes = [], []
        for i in range(size):
            index = step * size + i
            if rng.random() < share:
                scene = sample_scene("caption", self.cfg.seed, CAPTION_OFFSET + index)
                branches = self.look_ups(scene, rng, settings.look_ups, hops)
                if rng.random() < self.cfg.caption_share:
                    branches.insert(0, self.branch("caption", CAPTION_PROMPT, caption(scene, rng)))
            else:
                scene = sample_scene("train", self.cfg.seed, index)
                branches = self.questions(scene, rng, settings.questions, hops)
            rows.append((self.prefix, branches))
            scenes.append(scene)
        return pack(rows, settings.length, self.pad_id, settings.prompt_weight), self.images(scenes)

    def instruct_or_text(self, step: int, progress: float) -> tuple[PackedBatch, Tensor | None]:
        """A batch of images, or with probability ``text_share`` one of scenes in words."""
        size = self.cfg.instruct.batch_size
        # the draw that picks a batch of text must not be the first of the batch itself
        if self.rng("instruct", 10**8 + step).random() < self.cfg.instruct.text_share and not self.blind:
            return self.language(10**6 + step, progress, size, stage="instruct"), None
        return self.instruct(step, progress, size)

    def validation(self, number: int) -> tuple[PackedBatch, Tensor | None]:
        """Images of validation scenes with look-ups and one question of every image kind that each admits."""
        rows, scenes = [], []
        for scene, rng in islice(scene_stream("validation", 0, purpose=2), number):
            branches = self.every_question(scene, rng, IMAGE_KINDS)
            if not self.blind:
                branches += self.look_ups(scene, rng, 6, 1)
            rows.append((self.prefix, branches))
            scenes.append(scene)
        return pack(rows, self.cfg.instruct.length, self.pad_id), self.images(scenes)


def pixels(scenes: list[Scene]) -> Tensor:
    """Images as the processor prepares them: float32 [B, 3, H, W] in [-1, 1]."""
    images = torch.from_numpy(np.stack([render(s) for s in scenes]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
