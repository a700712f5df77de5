"""The explorer's small brother in a notebook: its table of exits, and its widget worked by script."""

import pytest

import dyvte
from analysis.explore.explorer import Explorer
from analysis.explore.notebook import NotebookView, explore_widget
from dyvte.data import build_dataset
from dyvte.errors import ConfigError
from dyvte.runs.config import compose


@pytest.fixture(scope="module")
def explorer(shapes: dyvte.MLLM) -> Explorer:
    cfg = compose("explore", ["examples=4"])
    return Explorer.of(shapes, build_dataset(cfg.data), cfg)


def test_the_table_of_exits_is_what_the_model_answers_under_each(explorer: Explorer) -> None:
    mllm, changed = explorer.mllm, 0
    for number, example in enumerate(explorer.examples):
        view = NotebookView.ask(explorer, image=number)
        batch = mllm.encode(images=[example.image], questions=[example.question])
        assert view.answer == mllm.generate(batch)[0]
        for row in view.exits().itertuples():
            with dyvte.FixedExit(row.exit_layer)(mllm):
                given = mllm.generate(batch)[0]
            assert given.startswith(row.answer.removesuffix(" …"))
            assert row.same == (given == view.answer)
            changed += not row.same
    assert changed, "no exit changes an answer: nothing was tested"
    with pytest.raises(ConfigError, match="examples 0 to"):
        NotebookView.ask(explorer, image=len(explorer.examples))


def test_the_widget_follows_its_controls(explorer: Explorer) -> None:
    widgets = pytest.importorskip("ipywidgets")
    whole = explore_widget(explorer)
    controls, picture, exit_layer, left = whole.children
    (image, question, ask), answer, (_, layer, _) = controls.children[0].children, *(
        controls.children[1], controls.children[2].children
    )  # fmt: skip
    assert isinstance(ask, widgets.Button)
    first = picture.value
    layer.value = layer.max
    assert picture.value != first
    exit_layer.value = 0
    cheapest = NotebookView.ask(explorer, image=0).exits().answer[0]
    assert f"<b>{cheapest}</b>" in left.value
    image.value = 1
    assert question.value == explorer.examples[1].question
    ask.click()
    assert NotebookView.ask(explorer, image=1).answer in answer.value
