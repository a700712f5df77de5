"""The page's small brother in a notebook: one question looked at, as figures and tables, or with widgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image

from dyvte.data import build_dataset
from dyvte.errors import ConfigError
from dyvte.policies.method import Calibration
from dyvte.runs.config import load_model

from .altered import exit_answer
from .explorer import Explorer
from .picture import draw_view, png_of_view
from .reading import Reading
from .state import ViewState


@dataclass
class NotebookView:
    """One question about one image, asked once; what it shows after that runs no model."""

    explorer: Explorer
    reading: Reading

    @classmethod
    def ask(cls, explorer: Explorer, question: str | None = None, image: Image.Image | int = 0) -> NotebookView:
        """Ask about an image, or about one of the explorer's examples by its number, its own question by default.

        Raises:
            ConfigError: no such example, or no question about an image of one's own.

        Example:
            >>> explorer = Explorer.of(mllm, dataset, compose("explore"))
            >>> NotebookView.ask(explorer, image=1).answer
            'yes'
        """
        if isinstance(image, int):
            if not 0 <= image < len(explorer.examples):
                raise ConfigError(f"image={image}: there are examples 0 to {len(explorer.examples) - 1}")
            example = explorer.examples[image]
            image, question = example.image, question or example.question
        *_, (_, reading) = explorer.ask(image, question or "")
        assert reading is not None  # the last one is whole
        return cls(explorer, reading)

    @property
    def answer(self) -> str:
        """The full model's."""
        return self._text(self.reading.answer_ids[0].tolist())

    def draw(self, layer: int, token: int = 0, head: int | None = None) -> Figure:
        """Where the query that predicts a token of the answer looks, in a layer: on the image, by layer and by head."""
        return draw_view(self.reading, self.state(layer, token, head))

    def exits(self) -> pd.DataFrame:
        """One row an exit layer k: the answer if the image leaves there, as far as the sweep knows it, and its cost."""
        costs = Calibration(self.explorer.mllm, [self.reading.batch]).exit_costs([1.0] * self.reading.num_layers)[0]
        found = [exit_answer(self.reading.sweep, k, self.reading.end_ids) for k in range(self.reading.num_layers + 1)]
        return pd.DataFrame(
            {
                "exit_layer": range(len(found)),
                "answer": [self._text(each.ids) + ("" if each.complete else " …") for each in found],
                "same": [each.changed is None for each in found],
                "decoder_flops": costs.tolist(),
            }
        )

    def state(self, layer: int, token: int, head: int | None) -> ViewState:
        """The view of a token in a layer, within what there is."""
        state = ViewState(model=self.explorer.name, question=self.reading.question, layer=layer, token=token, head=head)
        return self.explorer.fitted(self.reading, state)

    def _text(self, ids: list[int]) -> str:
        return self.explorer.mllm.decode([[each for each in ids if each not in self.reading.end_ids]])[0]


def notebook_explorer(cfg: DictConfig) -> Explorer:
    """The explorer that `conf/explore.yaml` describes, with its model loaded."""
    return Explorer.of(load_model(cfg), build_dataset(cfg.data), cfg)


def explore_widget(explorer: Explorer) -> Any:
    """Image, question, and sliders for token, layer, head and exit layer, as one widget of ipywidgets."""
    try:
        import ipywidgets as widgets
    except ModuleNotFoundError as error:
        raise ConfigError("the widget needs ipywidgets: pip install 'dyvte[notebooks]'") from error
    layers = explorer.mllm.num_layers
    image = widgets.Dropdown(options=[(f"image {n}", n) for n in range(len(explorer.examples))], description="image")
    question = widgets.Text(explorer.examples[0].question, description="question", continuous_update=False)
    ask = widgets.Button(description="Ask", button_style="primary")
    token = widgets.Dropdown(options=[("", 0)], description="token")
    layer = widgets.IntSlider(0, 0, layers - 1, description="layer", continuous_update=False)
    head = widgets.Dropdown(options=[("mean over heads", None)], description="head")
    exit_layer = widgets.IntSlider(layers, 0, layers, description="exit layer", continuous_update=False)
    answer, left, picture = widgets.HTML(), widgets.HTML(), widgets.Image(format="png", layout={"max_width": "100%"})
    asked: dict[str, Any] = {}

    def look(*_: Any) -> None:
        if view := asked.get("view"):
            picture.value = png_of_view(view.reading, view.state(layer.value, token.value, head.value))

    def leave(*_: Any) -> None:
        if "view" in asked:
            row = asked["exits"].iloc[exit_layer.value]
            same = "the same answer as with" if row["same"] else "another answer than with"
            left.value = (
                f"Image gone after {exit_layer.value} of {layers} layers, at {row['decoder_flops']:.0%} of the "
                f"decoder's FLOPs: <b>{escape(row['answer'])}</b>, {same} it."
            )

    def run(*_: Any) -> None:
        view = asked["view"] = NotebookView.ask(explorer, question.value, image.value)
        asked["exits"] = view.exits()
        words = [(word.strip(), number) for number, word in enumerate(view.reading.words)]
        token.options, token.value = words, 0
        heads = [(f"head {each}", each) for each in range(view.reading.num_heads)]
        head.options, head.value = [("mean over heads", None), *heads], None
        answer.value = f"<b>{escape(view.answer)}</b>"
        look()
        leave()

    def choose(change: dict[str, Any]) -> None:
        question.value = explorer.examples[change["new"]].question

    handlers: dict[Any, Callable[..., None]] = {image: choose, token: look, layer: look, head: look, exit_layer: leave}
    for control, handler in handlers.items():
        control.observe(handler, names="value")
    ask.on_click(run)
    run()
    controls = widgets.VBox([widgets.HBox([image, question, ask]), answer, widgets.HBox([token, layer, head])])
    return widgets.VBox([controls, picture, exit_layer, left])
