"""The page: Gradio components and what happens when they are used. What is shown comes from `explorer` and `markup`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import resources
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr
from omegaconf import DictConfig
from PIL import Image

from dyvte.errors import ConfigError, DyvteError
from dyvte.loading import SHIPPED_MODELS

from . import markup
from .altered import KEY_GROUPS, QUERY_GROUPS
from .explorer import Explorer
from .reading import Reading
from .state import QUERY_KEY, ViewState, read_region, read_upload, read_view_file, read_window, view_file

ONE_AT_A_TIME = "model"
"""Name of the queue of everything that runs the model."""

ASK_FIRST = markup.notice("Ask first.")


def asset(name: str) -> str:
    """The text of a file of `assets/`."""
    return (resources.files(__package__) / "assets" / name).read_text()


def _part(value: str = "", **settings: Any) -> gr.HTML:
    """A part of the page that `markup` fills, with the events of `assets/parts.js`."""
    return gr.HTML(
        value,
        html_template="${value}",
        css_template=asset("parts.css"),
        js_on_load=asset("parts.js"),
        apply_default_css=False,
        **settings,
    )


def lead(name: str) -> str:
    """What the page is about, in two sentences."""
    text = (
        "Ask about an image, then look inside: where each token of the answer looks, what every patch says, and what "
        "becomes of the answer when the image leaves early, patches go, or a path is cut."
    )
    if name in SHIPPED_MODELS:
        text += f" `{name}` is the small model that ships with the toolkit: no evidence about larger ones."
    return f"## Explore {name}\n{text}"


class Page:
    """The components, and what each of them does."""

    def __init__(self, explorer: Explorer, cfg: DictConfig) -> None:
        self.explorer, self.cfg = explorer, cfg
        self.upload_limits = {"max_bytes": int(cfg.upload.max_mib * 2**20), "max_pixels": cfg.upload.max_pixels}
        with gr.Blocks(title=f"dyvte: {explorer.name}", analytics_enabled=False, fill_width=True) as self.blocks:
            self._build()
            self._connect()

    # ------------------------------------------------------------------------- parts

    def _build(self) -> None:
        start, layers = self.explorer.start(), self.explorer.mllm.num_layers
        images = [each.image for each in self.explorer.examples]
        keep = 60 * self.cfg.keep_minutes
        self.state = gr.State(start, time_to_live=keep)
        self.reading = gr.State(None, time_to_live=keep)
        self.image = gr.State(images[0], time_to_live=keep)
        gr.Markdown(lead(self.explorer.name))
        with gr.Row():
            with gr.Column(min_width=300):
                self.examples = _part(markup.example_row(images, start.example), elem_id="examples")
            with gr.Column(min_width=300), gr.Row(equal_height=True):
                self.question = gr.Textbox(
                    start.question, label="Question", lines=1, scale=4, min_width=200, elem_id="question"
                )
                self.ask = gr.Button("Ask", variant="primary", scale=1, min_width=60, elem_id="ask")
        self.notice = gr.HTML("", visible=False, css_template=asset("parts.css"), elem_id="notice")
        with gr.Column(elem_id="shown"):
            self._build_panels(start, images[0], layers)

    def _build_panels(self, start: ViewState, image: Image.Image, layers: int) -> None:
        self.answer = _part(elem_id="answer")
        with gr.Row():
            with gr.Column(min_width=300):
                self.view = _part(markup.plain_image(image), elem_id="view")
                self.layer = gr.Slider(0, layers - 1, 0, step=1, label="Decoder layer", elem_id="layer")
                self.bars = _part(elem_id="bars")
            with gr.Column(min_width=300), gr.Tabs():
                with gr.Tab("Heads"):
                    self.heads = _part(ASK_FIRST, elem_id="heads")
                with gr.Tab("Exits"):
                    self._build_leave(layers)
                with gr.Tab("Methods"):
                    self._build_methods(start)
                with gr.Tab("Cut"):
                    self._build_cut(start, layers)
                with gr.Tab("Save"):
                    self._build_save()

    def _build_leave(self, layers: int) -> None:
        gr.Markdown("All exits come from one pass over the answer: the slider runs no model.")
        self.exit_layer = gr.Slider(0, layers, layers, step=1, label="The image leaves at exit layer", elem_id="exit")
        self.left = gr.HTML("", css_template=asset("parts.css"), elem_id="left")
        self.write_out = gr.Button("Write it out", size="sm", visible=False, elem_id="write-out")

    def _build_methods(self, start: ViewState) -> None:
        choices = [(label, name) for name, label in self.explorer.methods.items()]
        with gr.Row():
            self.method = gr.Dropdown(choices, value=start.method, label="Method", min_width=140, elem_id="method")
            self.budget = gr.Slider(0.05, 1.0, start.budget, step=0.05, label="Cost (full model = 1)", elem_id="budget")
        self.thin = gr.Button("Which patches stay?", elem_id="thin")
        self.thinned = gr.HTML("", css_template=asset("parts.css"), elem_id="thinned")

    def _build_cut(self, start: ViewState, layers: int) -> None:
        with gr.Row():
            self.queries = gr.Dropdown(
                list(QUERY_GROUPS), value=start.queries, label="Who no longer looks", min_width=140, elem_id="queries"
            )
            self.keys = gr.Dropdown(list(KEY_GROUPS), value=start.keys, label="at what", min_width=140, elem_id="keys")
        with gr.Row():
            self.first = gr.Slider(0, layers - 1, 0, step=1, label="from layer", min_width=140, elem_id="first")
            self.last = gr.Slider(0, layers - 1, layers - 1, step=1, label="to layer", min_width=140, elem_id="last")
        self.region = gr.Textbox(
            "", label="Region: top, left, bottom, right (or drag over the image)", elem_id="region", max_lines=1
        )
        self.do_cut = gr.Button("Cut", elem_id="do-cut")
        self.was_cut = gr.HTML("", css_template=asset("parts.css"), elem_id="was-cut")

    def _build_save(self) -> None:
        self.save = gr.Button("Make picture and link", elem_id="do-save")
        self.saved = gr.HTML("", css_template=asset("parts.css"), elem_id="saved")
        self.link = gr.Textbox("", label="Link to this view", interactive=False, buttons=["copy"], elem_id="link")
        self.json = gr.Textbox("", label="View as JSON (paste one to go there)", lines=3, max_lines=8, elem_id="json")
        self.open = gr.Button("Go to this view", size="sm", elem_id="open")

    # ------------------------------------------------------------------------ events

    def _connect(self) -> None:
        model = {"concurrency_limit": 1, "concurrency_id": ONE_AT_A_TIME}
        light = {"show_progress": "hidden", "trigger_mode": "always_last"}
        self.shown = [self.state, self.view, self.answer, self.bars, self.heads, self.layer]
        self.asked = [
            self.reading,
            *(self.notice, self.examples, self.image, self.question),
            *(self.exit_layer, self.left, self.write_out, self.thinned, self.was_cut),
            *(self.saved, self.link, self.json),
            *(self.method, self.budget, self.queries, self.keys, self.first, self.last, self.region),
            *self.shown,
        ]
        asked, both = self.asked, [self.reading, self.state]
        ask = {"inputs": [self.image, self.question, self.state], "outputs": asked, "show_progress": "minimal", **model}
        for event in (self.ask.click, self.question.submit):
            self._on(event, self._ask, **ask)
        self._on(self.blocks.load, self._from_link, [], asked, show_progress="hidden", **model)
        self._on(self.open.click, self._from_json, [self.json], asked, show_progress="minimal", **model)
        self._on(self.examples.pick_example, self._choose, [self.state], asked, **light)
        self._on(self.examples.own_image, self._upload, [self.state, self.question], asked, **light)
        self._on(self.question.change, self._type_question, [self.question, self.reading], [self.notice], **light)

        moved = [self.region, self.keys, self.was_cut, *self.shown]
        self._on(self.answer.pick_token, self._picker("token"), both, self.shown, **light)
        self._on(self.heads.pick_head, self._picker("head"), both, self.shown, **light)
        self._on(self.bars.pick_layer, self._picker("layer"), both, self.shown, **light)
        self._on(self.view.pick_region, self._pick_region, both, moved, **light)
        self._on(self.region.submit, self._type_region, [self.region, *both], [self.notice, *self.shown], **light)
        self._on(self.layer.input, self._move_layer, [self.layer, *both], self.shown, **light)

        left = [self.left, self.write_out]
        self._on(self.exit_layer.input, self._leave, [self.exit_layer, *both], [self.state, *left], **light)
        self._on(self.write_out.click, self._write_out, both, left, **model)
        method, path = [self.method, self.budget], [self.queries, self.keys, self.first, self.last]
        self._on(self.thin.click, self._thin, [*method, *both], [self.state, self.thinned], **model)
        self._on(self.do_cut.click, self._cut, [*path, self.region, *both], [self.was_cut, *self.shown], **model)
        self._on(self.save.click, self._save, [*both, self.image], [self.saved, self.link, self.json], **model)

        # what was made with other settings leaves the page when a setting moves
        for each in method:
            self._on(each.input, self._set_method, [*method, self.state], [self.state, self.thinned], **light)
        for each in path:
            self._on(each.input, self._set_path, [*path, self.state], [self.state, self.was_cut], **light)
        self._on(self.region.change, lambda: "", [], [self.was_cut], **light)
        self._on(self.state.change, lambda: ["", "", ""], [], [self.saved, self.link, self.json], **light)

    @staticmethod
    def _on(event: Callable[..., Any], function: Callable[..., Any], inputs: Any, outputs: Any, **how: Any) -> None:
        """Connect an event; none is offered to programs."""
        event(function, inputs, outputs, api_visibility="private", **how)

    # ----------------------------------------------------------------------- showing

    def _show(self, reading: Reading | None, state: ViewState) -> list[Any]:
        """What `self.shown` holds for a view."""
        if reading is None:
            return [state, *[gr.skip()] * 4, max(state.layer, 0)]
        return [
            state,
            markup.patch_view(reading, state),
            markup.token_row(reading.words, state.token),
            markup.layer_bars(reading, state),
            markup.head_row(reading, state),
            state.layer,
        ]

    def _fill(self, reading: Reading, state: ViewState, image: Image.Image) -> list[Any]:
        """What `self.asked` holds for an answered question."""
        last = reading.num_layers - 1
        start, stop = state.window or (0, reading.num_layers)
        exit_layer = reading.num_layers if state.exit_layer is None else state.exit_layer
        return [
            reading,
            *(_told(""), self._examples(state), image, state.question),
            *(exit_layer, *self._exit(reading, exit_layer), "", ""),
            *("", "", ""),
            *(state.method, state.budget, state.queries, state.keys),
            *(min(start, last), max(stop - 1, 0), _region_text(state)),
            *self._show(reading, state),
        ]

    def _examples(self, state: ViewState) -> str:
        return markup.example_row([each.image for each in self.explorer.examples], state.example)

    def _emptied(self, image: Image.Image, notice: str = "") -> dict[Any, Any]:
        """Every panel without an answer: what an earlier one left must not stand beside another question or image."""
        nothing = (self.answer, self.bars, self.left, self.thinned, self.was_cut, self.saved, self.link, self.json)
        return {
            **dict.fromkeys(nothing, ""),
            self.reading: None,
            self.notice: _told(notice),
            self.view: markup.plain_image(image),
            self.heads: ASK_FIRST,
            self.exit_layer: self.explorer.mllm.num_layers,
            self.write_out: gr.update(visible=False),
        }

    # ----------------------------------------------------------------------- a question

    def _ask(self, image: Image.Image, question: str, state: ViewState) -> Iterator[dict[Any, Any]]:
        # what belonged to the last answer does not belong to this one
        state = replace(state, question=question, token=0, exit_layer=None)
        yield from self._answered(image, question, state)

    def _answered(self, image: Image.Image | None, question: str, state: ViewState) -> Iterator[dict[Any, Any]]:
        begun = False
        try:
            for words, reading in self.explorer.ask(image, question):
                assert image is not None
                if reading is None:
                    yield ({} if begun else self._emptied(image)) | {self.answer: markup.token_row(words, None)}
                    begun = True
                else:
                    state = self.explorer.fitted(reading, replace(state, question=reading.question))
                    yield dict(zip(self.asked, self._fill(reading, state, image), strict=True))
        except DyvteError as error:
            if begun and image is not None:
                yield self._emptied(image, str(error))
            else:
                yield {self.notice: _told(str(error))}

    def _from_link(self, request: gr.Request) -> Iterator[dict[Any, Any]]:
        link = request.query_params.get(QUERY_KEY)
        if link:
            yield from self._go(lambda: (ViewState.from_link(link), None))
        else:
            yield {self.notice: _told("")}

    def _from_json(self, text: str) -> Iterator[dict[Any, Any]]:
        yield from self._go(lambda: read_view_file(text, **self.upload_limits))

    def _go(self, read: Callable[[], tuple[ViewState, Image.Image | None]]) -> Iterator[dict[Any, Any]]:
        try:
            state, image = read()
            state = self.explorer.check(state)
            if state.example is not None:
                image = self.explorer.examples[state.example].image
            if image is None:
                raise ConfigError("this view is of an uploaded image, which a link does not carry: use its JSON")
        except DyvteError as error:
            yield {self.notice: _told(str(error))}
            return
        yield from self._answered(image, state.question, state)

    def _choose(self, state: ViewState, event: gr.EventData) -> dict[Any, Any]:
        number = int(event.value)
        example = self.explorer.examples[number]
        return self._chosen(example.image, replace(state, example=number, question=example.question))

    def _upload(self, state: ViewState, question: str, event: gr.EventData) -> dict[Any, Any]:
        try:
            image = read_upload(str(event.value), **self.upload_limits)
        except DyvteError as error:
            return {self.notice: _told(str(error))}
        return self._chosen(image, replace(state, example=None, question=question))

    def _chosen(self, image: Image.Image, state: ViewState) -> dict[Any, Any]:
        state = replace(state, token=0, head=None, exit_layer=None, region=None)
        shown = {self.state: state, self.image: image, self.question: state.question, self.region: ""}
        return self._emptied(image) | shown | {self.examples: self._examples(state)}

    def _type_question(self, question: str, reading: Reading | None) -> Any:
        if reading is None or question.strip() == reading.question:
            return _told("")
        return _told(f"What is shown answers “{reading.question}”. Ask to see the new question.", stale=True)

    # --------------------------------------------------------------------------- a view

    def _picker(self, name: str) -> Callable[..., list[Any]]:
        """A handler that changes one thing about the view to what was picked."""

        # Gradio tells from the signature that a handler wants the event
        def pick(reading: Reading | None, state: ViewState, event: gr.EventData) -> list[Any]:
            return self._moved(reading, replace(state, **{name: event.value}))

        return pick

    def _move_layer(self, layer: int, reading: Reading | None, state: ViewState) -> list[Any]:
        return self._moved(reading, replace(state, layer=layer))

    def _moved(self, reading: Reading | None, state: ViewState) -> list[Any]:
        return self._show(reading, state if reading is None else self.explorer.fitted(reading, state))

    def _pick_region(self, reading: Reading | None, state: ViewState, event: gr.EventData) -> list[Any]:
        top, left, bottom, right = (int(each) for each in event.value)
        state = replace(state, region=(top, left, bottom, right), keys="region")
        return [_region_text(state), state.keys, "", *self._show(reading, state)]

    def _type_region(self, text: str, reading: Reading | None, state: ViewState) -> list[Any]:
        try:
            state = replace(state, region=read_region(text))
            if reading is not None and state.region is not None:
                reading.grid.patches_in(state.region)
        except ConfigError as error:
            return [_told(str(error)), *[gr.skip()] * len(self.shown)]
        return [_told(""), *self._show(reading, state)]

    # -------------------------------------------------------------------- altered models

    def _exit(self, reading: Reading | None, exit_layer: int, write_out: bool = False) -> list[Any]:
        """The answer if the image leaves, and the button that writes it to its end where something is left to write."""
        try:
            panel, complete = self.explorer.leave(_asked(reading), exit_layer, write_out)
        except DyvteError as error:
            panel, complete = markup.notice(str(error)), True
        return [panel, gr.update(visible=not complete)]

    def _leave(self, exit_layer: int, reading: Reading | None, state: ViewState) -> list[Any]:
        return [replace(state, exit_layer=exit_layer), *self._exit(reading, exit_layer)]

    def _write_out(self, reading: Reading | None, state: ViewState) -> list[Any]:
        exit_layer = self.explorer.mllm.num_layers if state.exit_layer is None else state.exit_layer
        return self._exit(reading, exit_layer, write_out=True)

    def _thin(self, method: str, budget: float, reading: Reading | None, state: ViewState) -> tuple[ViewState, str]:
        state = replace(state, method=method, budget=budget)
        return state, _or_notice(lambda: self.explorer.thin_out(_asked(reading), state))

    def _cut(
        self, queries: str, keys: str, first: int, last: int, region: str, reading: Reading | None, state: ViewState
    ) -> list[Any]:
        try:
            window = read_window(first, last)
            state = replace(state, queries=queries, keys=keys, window=window, region=read_region(region))
        except ConfigError as error:
            return [markup.notice(str(error)), *[gr.skip()] * len(self.shown)]
        return [_or_notice(lambda: self.explorer.cut(_asked(reading), state)), *self._show(reading, state)]

    def _set_method(self, method: str, budget: float, state: ViewState) -> list[Any]:
        return [replace(state, method=method, budget=budget), ""]

    def _set_path(self, queries: str, keys: str, first: int, last: int, state: ViewState) -> list[Any]:
        try:
            return [replace(state, queries=queries, keys=keys, window=read_window(first, last)), ""]
        except ConfigError as error:
            return [gr.skip(), markup.notice(str(error))]

    def _save(
        self, reading: Reading | None, state: ViewState, image: Image.Image, request: gr.Request
    ) -> tuple[str, str, str]:
        if reading is None:
            return markup.notice("ask a question first"), "", ""
        uploaded = image if state.example is None else None
        text = view_file(state, uploaded)
        picture = markup.download("view.png", "image/png", self.explorer.picture(reading, state), "Save as PNG")
        plain = markup.download("view.json", "application/json", text.encode(), "Save as JSON")
        link = "" if uploaded is not None else f"{str(request.request.base_url).rstrip('/')}/?{state.to_link()}"
        return f"<p>{picture} {plain}</p>", link, text


def _asked(reading: Reading | None) -> Reading:
    if reading is None:
        raise ConfigError("ask a question first")
    return reading


def _told(text: str, stale: bool = False) -> Any:
    """The line above the answer: a sentence, or no line at all. The panels under a stale one are dimmed."""
    return gr.update(value=markup.notice(text, stale) if text else "", visible=bool(text))


def _or_notice(show: Callable[[], str]) -> str:
    try:
        return show()
    except DyvteError as error:
        return markup.notice(str(error))


def _region_text(state: ViewState) -> str:
    return "" if state.region is None else ", ".join(map(str, state.region))
