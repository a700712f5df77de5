"""What the explorer shows, without a browser: attention, altered answers, states and uploads against references."""

from __future__ import annotations

import base64
import io
import itertools
import json
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from analysis.explore import markup
from analysis.explore.__main__ import main
from analysis.explore.altered import (
    REGION,
    _decode,
    answer_from_argmax,
    cut_answer,
    exit_answer,
    known_methods,
    method_answer,
    region_mask,
    write_out_exit,
)
from analysis.explore.explorer import Explorer
from analysis.explore.reading import PatchGrid, Reading
from analysis.explore.state import ViewState, read_upload, read_view_file, view_file
from analysis.plots.style import data_address
from dyvte.data import build_dataset
from dyvte.errors import ConfigError
from dyvte.layout import VISUAL
from dyvte.mllm import MLLM
from dyvte.runs.config import compose

LIMITS = {"max_bytes": 2**20, "max_pixels": 10_000}
SECONDS_A_QUESTION = 2.0
END = 0
ONE_TOKEN = 0.01
"""Of the cost: shares are solved for, and patches are whole."""


@pytest.fixture(scope="module")
def explorer(shapes: MLLM) -> Explorer:
    cfg = compose("explore", ["examples=3"])
    return Explorer.of(shapes, build_dataset(cfg.data), cfg)


@pytest.fixture(scope="module")
def reading(explorer: Explorer) -> Reading:
    return asked(explorer, 0)


def asked(explorer: Explorer, number: int) -> Reading:
    example = explorer.examples[number]
    *_, (_, found) = explorer.ask(example.image, example.question)
    assert found is not None
    return found


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("page", "serving"):
        monkeypatch.delitem(sys.modules, f"analysis.explore.{name}", raising=False)
    with pytest.raises(ConfigError, match=r"dyvte\[explore\]"):
        main(compose("explore"))


# ------------------------------------------------------------------- where tokens look
def test_maps_are_the_visual_part_of_the_rows(reading: Reading) -> None:
    visual = (reading.batch.layout.roles[0] == VISUAL).nonzero()[:, 0]
    rows = reading.attention.rows
    for layer, head in itertools.product((0, 5), (0, 3)):
        shown = reading.attention_map(0, layer, head)
        assert np.allclose(shown.flatten()[reading.grid.numbers.flatten().argsort()], rows[layer, head, 0, visual])
    assert np.allclose(reading.attention_map(0, 2, None), reading.grid.arrange(rows[2, :, 0, visual].mean(0).numpy()))


def test_a_rectangle_holds_the_patches_of_its_cells() -> None:
    numbers = np.arange(12).reshape(4, 3).T  # down the columns, as in VILA
    grid = PatchGrid(numbers, np.zeros((6, 8, 3), np.uint8), True)
    assert grid.patches_in((0, 1, 1, 2)) == [3, 4, 6, 7]
    with pytest.raises(ConfigError, match="3 rows and 4 columns"):
        grid.patches_in((0, 0, 3, 0))


# --------------------------------------------------------------------- altered answers
NextToken = Callable[[tuple[int, ...]], int]


@cache
def toy_model(seed: int) -> NextToken:
    """A next token that depends on everything before it."""
    return cache(lambda text: zlib.crc32(repr((seed, text)).encode()) % 3)


def disturbed(model: NextToken, other: NextToken, rate: int) -> NextToken:
    """Mostly the same model."""
    return lambda text: other(text) if zlib.crc32(repr((text, rate)).encode()) % rate == 0 else model(text)


def greedy(model: NextToken, longest: int) -> list[int]:
    text: list[int] = []
    while len(text) < longest and (not text or text[-1] != END):
        text.append(model(tuple(text)))
    return text


def teacher_forced(model: NextToken, text: Sequence[int]) -> list[int]:
    return [model(tuple(text[:place])) for place in range(len(text))]


@given(seed=st.integers(0, 99), rate=st.integers(1, 4), longest=st.integers(1, 8))
@settings(max_examples=60)
def test_what_teacher_forcing_tells_is_the_beginning_of_the_altered_answer(seed: int, rate: int, longest: int) -> None:
    full, other = toy_model(seed), toy_model(seed + 1000)
    altered = disturbed(full, other, rate)
    answer, truth = greedy(full, longest), greedy(altered, longest)
    argmax = teacher_forced(altered, answer)
    found = answer_from_argmax(answer, argmax, answer, [END])
    assert found.ids == truth[: len(found.ids)]
    assert not found.complete or found.ids == truth
    assert found.changed == next((j for j, (a, b) in enumerate(zip(answer, truth, strict=False)) if a != b), None)
    calls: list[int] = []

    def read(text: list[int]) -> list[int]:
        calls.append(len(text))
        return teacher_forced(altered, text)

    assert _decode(found.ids, answer, read, [END], longest) == truth
    assert len(calls) <= longest


def test_of_two_tokens_that_tie_either_is_the_full_models() -> None:
    assert answer_from_argmax([5, 6], [9, 6], [9, 6], end_ids=[6]).changed is None


def test_exits_read_off_the_sweep_are_what_is_generated(shapes: MLLM, explorer: Explorer) -> None:
    changed = 0
    for number in range(len(explorer.examples)):
        found = asked(explorer, number)
        for exit_layer in (0, 3, 9):
            told = exit_answer(found.sweep, exit_layer, found.end_ids)
            truth = write_out_exit(shapes, found.batch, exit_layer, explorer.max_new_tokens)
            assert truth[: len(told.ids)] == told.ids
            changed += told.changed is not None
    assert exit_answer(found.sweep, found.num_layers, found.end_ids).changed is None
    assert changed, "no exit changes an answer: the test shows nothing"


def test_a_cut_region_is_a_cut_of_its_keys(shapes: MLLM, reading: Reading) -> None:
    """All patches as a region are the group `visual`; cutting nothing that matters changes nothing."""
    whole = list(range(int(reading.batch.layout.visual.sum())))

    def cut(keys: str, patches: Sequence[int], window: tuple[int, int]) -> tuple[list[int], float]:
        found = cut_answer(
            shapes,
            reading.batch,
            reading.answer_ids,
            ("instruction", keys),
            window,
            patches,
            reading.end_ids,
            8,
        )
        return found.answer.ids, found.log_probability_change

    by_region, by_group = cut(REGION, whole, (0, 12)), cut("visual", [], (0, 12))
    assert by_region[0] == by_group[0]
    assert by_region[1] == pytest.approx(by_group[1], abs=1e-4)
    ids, change = cut(REGION, [0], (3, 3))
    assert ids == reading.answer_ids[0].tolist()
    assert change == pytest.approx(0, abs=1e-4)


def test_regions_that_are_not_there_are_refused(reading: Reading) -> None:
    assert region_mask(reading.batch, [0, 5, 5]).sum() == 2
    for patches in ([], [-1], [144]):
        with pytest.raises(ConfigError, match="region"):
            region_mask(reading.batch, patches)


def test_methods_keep_fewer_patches_for_a_smaller_budget(shapes: MLLM, reading: Reading) -> None:
    for method in ("fastv", "uniform", "pyramid_drop"):
        kept = []
        for budget in (0.4, 0.8, 1.0):
            found = method_answer(shapes, reading.batch, method, budget, 4)
            assert found is not None
            assert found.cost <= budget + ONE_TOKEN
            kept.append(float(found.kept.double().mean()))
        assert kept == sorted(kept)
        assert kept[0] < kept[-1] == 1.0
    with pytest.raises(ConfigError, match="no method"):
        method_answer(shapes, reading.batch, "nothing", 0.5, 4)
    with pytest.raises(ConfigError, match="budget"):
        method_answer(shapes, reading.batch, "fastv", 0.0, 4)


@pytest.mark.parametrize("method", ["fastervlm", "visionzip", "tome", "vtw"])
def test_methods_of_every_kind_can_be_tried(explorer: Explorer, reading: Reading, method: str) -> None:
    assert method in known_methods()
    shown = explorer.thin_out(reading, explorer.check(ViewState(method=method, budget=0.9)))
    assert "of 144 patches" in shown


# --------------------------------------------------------------------------- a session
def test_a_question_is_answered_token_by_token_and_in_time(explorer: Explorer) -> None:
    example = explorer.examples[1]
    asked(explorer, 1)
    started = time.process_time()  # of this process: other work on the machine is not the explorer's
    steps = list(explorer.ask(example.image, example.question))
    assert time.process_time() - started < SECONDS_A_QUESTION
    words = [each for each, found in steps if found is None]
    assert [len(each) for each in words] == list(range(1, len(words) + 1))
    *_, (final, found) = steps
    assert found is not None
    batch = explorer.mllm.encode([example.image], [example.question])
    assert found.answer_ids[0].tolist() == explorer.mllm.generate_ids(batch, max_new_tokens=32)[0]
    assert len(final) == len(words[-1]) == found.answer_ids.shape[1]


def test_sessions_at_the_same_time_do_not_mix(explorer: Explorer) -> None:
    alone = [asked(explorer, number) for number in range(2)]
    together: dict[int, Reading] = {}
    threads = [
        threading.Thread(target=lambda number=number: together.__setitem__(number, asked(explorer, number)))
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found in enumerate(alone):
        assert torch.equal(found.attention.rows, together[number].attention.rows)
        assert found.words == together[number].words


@pytest.mark.parametrize(
    ("image", "question", "why"),
    [
        (None, "what ?", "choose an image"),
        (0, "  ", "empty"),
        (0, "x" * 1001, "1000 characters"),
        (0, "\ud800", "half"),
    ],
)
def test_questions_that_cannot_be_asked(explorer: Explorer, image: int | None, question: str, why: str) -> None:
    picture = None if image is None else explorer.examples[image].image
    with pytest.raises(ConfigError, match=why):
        list(explorer.ask(picture, question))


def test_an_abandoned_question_lets_the_next_one_in(explorer: Explorer) -> None:
    example = explorer.examples[0]
    asking = explorer.ask(example.image, example.question)
    next(asking)
    asking.close()
    assert asked(explorer, 0).words


def test_text_of_the_model_is_no_markup(explorer: Explorer, reading: Reading) -> None:
    hostile = '"><script>alert(1)</script>'
    words = [[[hostile] * 3 for _ in layer] for layer in reading.lens_words]
    bad = replace(reading, words=[hostile] * len(reading.words), lens_words=words, question=hostile)
    state = explorer.fitted(bad, explorer.start())
    shown = [
        markup.patch_view(bad, state),
        markup.token_row(bad.words, 0),
        markup.head_row(bad, state),
        markup.notice(hostile),
        markup.exit_panel(bad, 3, exit_answer(bad.sweep, 3, bad.end_ids), [hostile] * 2, 0.5),
    ]
    assert "<script" not in "".join(shown)
    assert all("http" not in each for each in shown)


def test_the_note_is_about_the_head_that_is_shown(explorer: Explorer, reading: Reading) -> None:
    for head in (None, 0, 4):
        state = replace(explorer.start(), layer=8, head=head)
        values = reading.attention_map(0, 8, head)
        assert f"{values.sum():.1%} of the attention is on the image" in markup.patch_view(reading, state)


def test_the_picture_is_a_png(explorer: Explorer, reading: Reading) -> None:
    state = replace(explorer.start(), token=0, layer=2, head=1, region=(0, 0, 2, 2))
    with Image.open(io.BytesIO(explorer.picture(reading, state))) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


# -------------------------------------------------------------------- states and files
small = st.integers(0, 40)
pairs = st.tuples(small, small).map(sorted).map(tuple)
rectangles = st.tuples(pairs, pairs).map(lambda both: (both[0][0], both[1][0], both[0][1], both[1][1]))
states = st.builds(
    ViewState,
    model=st.text(max_size=20),
    example=st.none() | small,
    question=st.text(st.characters(codec="utf-8"), max_size=60),
    token=small,
    layer=small,
    head=st.none() | small,
    exit_layer=st.none() | small,
    budget=st.floats(0.01, 1),
    window=st.none() | pairs,
    region=st.none() | rectangles,
)


@given(state=states)
def test_a_state_comes_back_from_its_link_and_its_file(state: ViewState) -> None:
    assert ViewState.from_link(state.to_link().partition("=")[2]) == state
    assert read_view_file(view_file(state, None), **LIMITS) == (state, None)


@given(state=states, layers=st.integers(1, 8), tokens=st.integers(1, 4), side=st.integers(1, 8))
def test_a_clipped_state_fits(state: ViewState, layers: int, tokens: int, side: int) -> None:
    limits = {"num_layers": layers, "num_heads": 4, "num_tokens": tokens, "rows": side, "columns": side}
    found = state.clipped(**limits)
    assert found.layer < layers
    assert found.token < tokens
    assert found.head is None or found.head < 4
    assert found.exit_layer is None or found.exit_layer <= layers
    assert found.window is not None
    assert 0 <= found.window[0] <= found.window[1] <= layers
    assert found.region is None or max(found.region) < side
    assert found.clipped(**limits) == found


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"layer": -1}, "layer"),
        ({"layer": True}, "layer"),
        ({"token": "0"}, "token"),
        ({"budget": 0}, "budget"),
        ({"window": [3, 1]}, "window"),
        ({"region": [0, 0, 1]}, "region"),
        ({"region": [2, 0, 1, 0]}, "region"),
        ({"question": "x" * 1001}, "question"),
        ({"__class__": 1}, "unknown key"),
        ([], "not an object"),
    ],
)
def test_states_that_are_none_are_refused_by_name(content: object, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        read_view_file(json.dumps(content), **LIMITS)


def test_links_that_are_none_are_refused() -> None:
    for link in ("%%%", "AAAA", "x" * 5000, base64.urlsafe_b64encode(b"[1]").decode(), "é"):
        with pytest.raises(ConfigError, match="view"):
            ViewState.from_link(link)


def test_a_view_of_another_page_is_refused(explorer: Explorer) -> None:
    for state in (ViewState(model="other"), ViewState(example=3), ViewState(method="x"), ViewState(keys="x")):
        with pytest.raises(ConfigError, match="the view"):
            explorer.check(state)


def test_the_file_of_an_uploaded_image_holds_it() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    _, found = read_view_file(view_file(ViewState(question="?"), image), **LIMITS)
    assert found is not None
    assert np.array_equal(np.asarray(found), np.asarray(image))


# ----------------------------------------------------------------------------- uploads
def png_claiming(width: int, height: int) -> str:
    """A few bytes whose header says that they unpack to an image of any size."""
    raw = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + bytes(8)):
        raw += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return "data:image/png;base64," + base64.b64encode(raw).decode()


@pytest.mark.parametrize(
    ("upload", "why"),
    [
        ("hello", "no file"),
        ("data:image/png;base64,@@@", "damaged"),
        ("data:text/plain;base64," + base64.b64encode(b"hello").decode(), "no image"),
        ("data:image/png;base64," + base64.b64encode(bytes(2**20 + 10)).decode(), "larger than 1 MiB"),
        (png_claiming(100_000, 100_000), "pixels"),
        (png_claiming(101, 100), "101 x 100 pixels"),
    ],
)
def test_uploads_that_are_too_large_or_no_image_are_refused(upload: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        read_upload(upload, **LIMITS)


def test_an_upload_is_the_image_that_was_sent() -> None:
    image = Image.new("RGB", (100, 100), (3, 5, 7))
    assert np.array_equal(np.asarray(read_upload(data_address(image), **LIMITS)), np.asarray(image))
