"""What keeps the language model one while it learns to see: texts of its own, and how it would have gone on in them.

Before training the language model writes plain prose and chats. While they are rehearsed, the adapted model is held to
the whole distribution of the next word that the language model had there (distillation: Hinton et al. 2015,
arXiv 1503.02531), of which the likeliest words are kept and the rest is one more outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dyvte.testbed.smol.base import ASSISTANT, BOS, EOS


@dataclass(frozen=True)
class Teacher:
    """The language model's next word at T positions: its K likeliest words [T, K] and their log-probabilities."""

    words: Tensor
    log_probabilities: Tensor

    def to(self, device: torch.device) -> Teacher:
        """The same on another device."""
        return Teacher(self.words.to(device), self.log_probabilities.to(device))

    @classmethod
    def concatenate(cls, parts: Sequence[Teacher]) -> Teacher:
        """The positions of several texts, one after the other."""
        return cls(torch.cat([p.words for p in parts]), torch.cat([p.log_probabilities for p in parts]))


@dataclass(frozen=True)
class Rehearsed:
    """A text of N tokens, with the teacher's N - 1 distributions of the word after each but the last."""

    ids: list[int]
    teacher: Teacher

    def first(self, length: int) -> Rehearsed:
        """Its first tokens."""
        kept = max(min(length, len(self.ids)) - 1, 0)
        teacher = Teacher(self.teacher.words[:kept], self.teacher.log_probabilities[:kept])
        return Rehearsed(self.ids[:length], teacher)


def teacher_divergence(logits: Tensor, teacher: Teacher) -> Tensor:
    """[T] KL divergence (nats) of the teacher's next word from the model's, whose logits are [T, vocabulary].

    The words that the teacher's list leaves out are one outcome, so the value is a lower bound of the full divergence.
    """
    model = logits.float().log_softmax(-1).gather(-1, teacher.words.long())
    taught = teacher.log_probabilities.float()
    tiny = torch.finfo(torch.float32).eps
    rest = [(1 - side.exp().sum(-1)).clamp_min(tiny) for side in (taught, model)]
    return (taught.exp() * (taught - model)).sum(-1) + rest[0] * (rest[0].log() - rest[1].log())


@torch.no_grad()
def ask_teacher(model: Any, texts: Sequence[Sequence[int]], likeliest: int) -> list[Rehearsed]:
    """What the untouched language model expects after every word of its texts: the `likeliest` words a position."""
    found = []
    for text in texts:
        states = model.model.language_model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state
        top = model.lm_head(states[0, :-1]).float().log_softmax(-1).topk(likeliest, dim=-1)
        found.append(Rehearsed(list(text), Teacher(top.indices.int(), top.values.half())))
    return found


# fmt: off
TOPICS = [
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

REQUESTS = (
    "Write a short story about {}.",
    "Explain {} to a child.",
    "What should I know about {}?",
    "Write a poem about {}.",
    "Give me three facts about {}.",
    "Write an email that mentions {}.",
)
OPENINGS = (
    "The history of {} begins",
    "It was late in the evening, and {} was all that anyone could talk about.",
    "In this chapter we look at {}.",
    "Not many people know that {}",
    "When I was young, {} meant very little to me.",
    "A new report about {} was published on Monday.",
)


@torch.no_grad()
def write_texts(
    model: Any, tokenizer: PreTrainedTokenizerFast, number: int, length: int, seed: int, batch_size: int = 70
) -> list[list[int]]:
    """Texts that the language model writes, half of them chats and half plain prose: `number` lists of ids."""
    rng = np.random.default_rng(seed)
    head = f"{BOS}system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face{EOS}\n{BOS}user\n"
    chats = [f"{head}{r.format(t)}{ASSISTANT}" for r in REQUESTS for t in TOPICS]
    prose = [o.format(t) for o in OPENINGS for t in TOPICS]
    order = rng.permutation(len(chats))
    chosen = [side[int(i)] for i in order for side in (chats, prose)][:number]
    texts: list[list[int]] = []
    torch.manual_seed(seed)
    end = int(tokenizer.convert_tokens_to_ids(EOS))
    for start in range(0, len(chosen), batch_size):
        inputs = tokenizer(
            chosen[start : start + batch_size], return_tensors="pt", padding=True, add_special_tokens=False
        )
        written = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=length,
            do_sample=True,
        )
        for ids, kept in zip(written.tolist(), inputs["attention_mask"].sum(1).tolist(), strict=True):
            ids = ids[inputs["input_ids"].shape[1] - kept :]
            ends = [i for i, token in enumerate(ids) if token == end and i >= kept]
            texts.append(ids[: ends[0] + 1] if ends else ids)
    return texts
