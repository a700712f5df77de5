"""What the page can do, without the page: one object for the model, everything of a session in its arguments.

What cannot be done is a `ConfigError`, whose sentence the page shows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from omegaconf import DictConfig
from PIL import Image

from dyvte.data.base import Dataset
from dyvte.data.reading import read_question
from dyvte.errors import BrokenSample, ConfigError
from dyvte.mllm import MLLM
from dyvte.policies.method import Calibration
from dyvte.policies.registry import labels

from .altered import (
    KEY_GROUPS,
    QUERY_GROUPS,
    REGION,
    AlteredAnswer,
    cut_answer,
    exit_answer,
    known_methods,
    method_answer,
    write_out_exit,
)
from .markup import cut_panel, exit_panel, layers_text, method_panel
from .picture import png_of_view
from .reading import Reading, stream_answer, token_words
from .reading import read_question as look
from .state import ANY_LAYER, LONGEST_QUESTION, ViewState


@dataclass(frozen=True)
class Example:
    """An image to begin with, and a question about it."""

    image: Image.Image
    question: str


def first_examples(dataset: Dataset, count: int) -> list[Example]:
    """The first images of a data set, each with its first question that needs the image."""
    found: dict[str, Example] = {}
    for sample in dataset.readable():
        # of the built-in tasks not the questions that are answered without looking
        if sample.picture is None or sample.image_id in found or not sample.metadata.get("hops", 1):
            continue
        if len(found) == count:
            break
        found[sample.image_id] = Example(sample.picture, sample.question)
    if not found:
        raise ConfigError("the data show no image: give other data=..., which the explorer begins with")
    return list(found.values())


@dataclass
class Explorer:
    """Answers what the page asks. It keeps nothing of a session; the model runs for one of them at a time."""

    mllm: MLLM
    name: str
    examples: Sequence[Example]
    max_new_tokens: int
    _running: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of(cls, mllm: MLLM, dataset: Dataset, cfg: DictConfig) -> Explorer:
        """The explorer that `conf/explore.yaml` describes."""
        return cls(mllm, cfg.model.name, first_examples(dataset, cfg.examples), cfg.max_new_tokens)

    @property
    def methods(self) -> dict[str, str]:
        """Methods to choose from, with what they are called."""
        return {name: labels()[name] for name in known_methods()}

    def start(self) -> ViewState:
        """The view that the page opens with."""
        return ViewState(model=self.name, example=0, question=self.examples[0].question, layer=ANY_LAYER)

    def check(self, state: ViewState) -> ViewState:
        """A view from outside, if it can be one of this model."""
        if state.model not in ("", self.name):
            raise ConfigError(f"the view is of model {state.model!r}; this page shows {self.name!r}")
        if state.example is not None and state.example >= len(self.examples):
            raise ConfigError(f"the view is of example {state.example}; there are 0 to {len(self.examples) - 1}")
        choices = (self.methods, QUERY_GROUPS, KEY_GROUPS)
        for value, known in zip((state.method, state.queries, state.keys), choices, strict=True):
            if value not in known:
                raise ConfigError(f"the view names {value!r}; choose from {', '.join(known)}")
        return replace(state, model=self.name)

    # ------------------------------------------------------------------- a question

    def ask(self, image: Image.Image | None, question: str) -> Iterator[tuple[list[str], Reading | None]]:
        """The answer so far as words, token by token; at the end with everything about it.

        Raises:
            ConfigError: no image or no question.
            UnsupportedError: the model cannot be followed exactly.
        """
        if image is None:
            raise ConfigError("choose an image first")
        try:
            question = read_question(question[: LONGEST_QUESTION + 1], "question")
        except BrokenSample as error:
            raise ConfigError(error.why) from error
        if len(question) > LONGEST_QUESTION:
            raise ConfigError(f"the question has more than {LONGEST_QUESTION} characters")
        with self._running:
            batch = self.mllm.encode([image], [question])
            ids: list[int] = []
            for ids in stream_answer(self.mllm, batch, self.max_new_tokens):
                yield self.words(ids), None
            reading = look(self.mllm, image, question, batch, ids)
        yield reading.words, reading

    def words(self, ids: Sequence[int], end_ids: Sequence[int] = ()) -> list[str]:
        """Tokens as text."""
        return token_words(self.mllm, ids, end_ids)

    def fitted(self, reading: Reading, state: ViewState) -> ViewState:
        """A view that fits an answer, of the layer that looks at the image most where none is chosen."""
        tokens = len(reading.words)
        if state.layer == ANY_LAYER:
            state = replace(state, layer=reading.layer_that_looks(min(state.token, tokens - 1)))
        return state.clipped(reading.num_layers, reading.num_heads, tokens, *reading.grid.shape)

    # -------------------------------------------------------------- the altered model

    def leave(self, reading: Reading, exit_layer: int, write_out: bool = False) -> tuple[str, bool]:
        """The answer if the image leaves at exit layer k, off the sweep or written out, and whether it is complete."""
        found = exit_answer(reading.sweep, exit_layer, reading.end_ids)
        if write_out and not found.complete:
            with self._running:
                ids = write_out_exit(self.mllm, reading.batch, exit_layer, self.max_new_tokens)
            found = AlteredAnswer(ids, True, found.changed)
        cost = float(Calibration(self.mllm, [reading.batch]).exit_costs([1.0] * reading.num_layers)[0, exit_layer])
        return exit_panel(reading, exit_layer, found, self.words(found.ids, reading.end_ids), cost), found.complete

    def thin_out(self, reading: Reading, state: ViewState) -> str:
        """Which patches a method keeps at a budget, and the answer."""
        with self._running:
            found = method_answer(self.mllm, reading.batch, state.method, state.budget, self.max_new_tokens)
        name = self.methods[state.method]
        if found is None:
            raise ConfigError(f"{name} cannot meet a budget of {state.budget:.0%} on this prompt; give a larger one")
        return method_panel(reading, found, name, self.words(found.ids, reading.end_ids))

    def cut(self, reading: Reading, state: ViewState) -> str:
        """What becomes of the answer when the state's path is cut in its window."""
        start, stop = state.window or (0, reading.num_layers)
        if start == stop:
            raise ConfigError("the window holds no layer: its end has to lie behind its start")
        patches = []
        if state.keys == REGION:
            if state.region is None:
                raise ConfigError("no region: drag over some patches of the image first")
            patches = reading.grid.patches_in(state.region)
        asked = (reading.answer_ids, (state.queries, state.keys), (start, stop), patches, reading.end_ids)
        with self._running:
            found = cut_answer(self.mllm, reading.batch, *asked, self.max_new_tokens)
        keys = f"{len(patches)} patches" if state.keys == REGION else state.keys
        what = f"{state.queries} \N{RIGHTWARDS ARROW} {keys} cut in {layers_text(start, stop - 1)}"
        return cut_panel(found, self.words(found.answer.ids, reading.end_ids), what)

    def picture(self, reading: Reading, state: ViewState) -> bytes:
        """The view as PNG."""
        with self._running:  # matplotlib's figures are no threads' own
            return png_of_view(reading, state)
