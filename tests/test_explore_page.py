"""The explorer in a real browser: the whole path of a visitor, in a wide and a narrow window, without a complaint."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from PIL import Image

from dyvte.data import build_dataset
from dyvte.errors import ConfigError
from dyvte.mllm import MLLM
from dyvte.runs.config import compose

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS_A_QUESTION = 2.0
PATIENCE = 60_000
"""Milliseconds that a test waits for something to appear."""

UNFINISHED = (2, 9)
"""Example of the shipped model, and an exit layer with which its answer changes before its end."""


def require(module: str) -> Any:
    return pytest.importorskip(module, reason=f"no {module}: pip install 'dyvte[explore-test]'")


@dataclass
class Visit:
    """One page, and everything that it complained about or asked for elsewhere."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning", "assert"):
            self.complaints.append(message.text)

    def wait(self, selector: str) -> Any:
        return self.page.wait_for_selector(selector)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def ask(self, address: str) -> None:
        self.page.goto(address)
        self.wait("#view .photo")
        self.page.click("#ask")
        self.wait("#view .cells i")

    def drag(self, first: tuple[int, int], last: tuple[int, int]) -> None:
        cells = [
            self.page.locator(f'#view i[data-row="{row}"][data-column="{column}"]') for row, column in (first, last)
        ]
        cells[0].scroll_into_view_if_needed()
        places = [cell.bounding_box() for cell in cells]
        mouse = self.page.mouse
        middles = [(each["x"] + each["width"] / 2, each["y"] + each["height"] / 2) for each in places]
        mouse.move(*middles[0])
        mouse.down()
        mouse.move(*(sum(axis) / 2 for axis in zip(*middles, strict=True)))
        mouse.move(*middles[1])
        mouse.up()

    def value(self, part: str) -> str:
        return str(self.page.input_value(f"#{part} input, #{part} textarea"))


@pytest.fixture(scope="module")
def address(shapes: MLLM) -> Iterator[str]:
    require("gradio")
    from analysis.explore.explorer import Explorer
    from analysis.explore.serving import serve

    cfg = compose("explore", ["examples=3", "port=0", "upload.max_mib=0.5", "upload.max_pixels=250000"])
    blocks = serve(Explorer.of(shapes, build_dataset(cfg.data), cfg), cfg)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = require("playwright.sync_api")
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, headless=True, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture(params=[1280, 390])
def visit(request: pytest.FixtureRequest, chromium: Any) -> Iterator[Visit]:
    page = chromium.new_page(viewport={"width": request.param, "height": 900})
    found = Visit(page)
    yield found
    width = page.evaluate("document.documentElement.scrollWidth")
    page.close()
    assert found.complaints == []
    assert width <= request.param, "the page is wider than its window"
    assert {host.partition(":")[0] for host in found.hosts} <= {"127.0.0.1", ""}, "the page loads from elsewhere"


def test_the_whole_path(visit: Visit, address: str) -> None:
    page = visit.page
    visit.ask(address)  # the first question of a process warms up
    page.click('#examples button[data-example="1"]')
    visit.wait('#examples button[data-example="1"][aria-pressed="true"]')
    page.wait_for_selector("#view .cells i", state="detached")
    started = time.process_time()  # of the server, which runs in this process: other work on the machine is not its
    page.click("#ask")
    visit.wait("#view .cells i")
    assert time.process_time() - started < SECONDS_A_QUESTION

    # where a token looks, by layer and head, and what a patch says
    page.click('#answer button[data-token="1"]')
    visit.wait('#answer button[data-token="1"][aria-pressed="true"]')
    page.click('#bars button[data-layer="8"]')
    visit.wait('#bars button[data-layer="8"][aria-pressed="true"]')
    page.click('#heads button[data-head="4"]')
    visit.wait('#heads button[data-head="4"][aria-pressed="true"]')
    assert "Layer 8, head 4, for “<end>”" in page.inner_text("#view .note")
    page.hover('#view i[data-row="3"][data-column="2"]')
    assert page.inner_text("#view .readout").startswith("Row 3, column 2")
    page.click('#bars button[data-layer="0"]')
    visit.wait("#view i.sink")

    # the image leaves at layer 0
    visit.tab("Exits")
    slider = page.locator("#exit input[type=range]")
    slider.wait_for()  # its tab may still be drawn, and what is not seen takes no focus
    slider.press("Home")
    page.get_by_text("0 of 12 layers see the image").wait_for()
    assert not page.is_visible("#write-out")  # the same answer: it is there to its end

    # a method
    visit.tab("Methods")
    page.click("#thin")
    visit.wait("#thinned .stages figure:nth-of-type(2)")

    # a region, then a path in a window
    visit.tab("Cut")
    visit.drag((1, 2), (5, 6))
    page.wait_for_function("document.querySelectorAll('#view i.chosen').length === 25")
    assert visit.value("region") == "1, 2, 5, 6"
    assert visit.value("keys") == "region"
    page.click("#do-cut")
    page.get_by_text("25 patches cut in layers 0 to 11").wait_for()

    # out, and in again elsewhere
    visit.tab("Save")
    page.click("#do-save")
    visit.wait("#saved a.download")
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Save as PNG").click()
    with Image.open(waiting.value.path()) as picture:
        assert picture.format == "PNG"
    link, saved = visit.value("link"), json.loads(visit.value("json"))
    assert saved["head"] == 4
    assert saved["region"] == [1, 2, 5, 6]
    page.goto(link)
    visit.wait('#heads button[data-head="4"][aria-pressed="true"]')
    assert page.locator("#view i.chosen").count() == 25
    assert visit.value("question") == saved["question"]


def test_no_panel_outlives_what_it_is_of(chromium: Any, address: str) -> None:
    """Each control that a shown panel depends on takes it off the page, or marks it, when it moves."""
    visit = Visit(chromium.new_page(viewport={"width": 1280, "height": 900}))
    page = visit.page

    def empties(part: str) -> None:
        page.wait_for_function("part => document.querySelector(`#${part}`).innerText.trim() === ''", arg=part)

    def step(part: str) -> None:
        slider = page.locator(f"#{part} input[type=range]")
        slider.wait_for()
        slider.press("ArrowRight" if slider.input_value() == slider.get_attribute("min") else "ArrowLeft")

    visit.ask(address)
    visit.tab("Methods")
    page.click("#thin")
    visit.wait("#thinned .result")
    step("budget")
    empties("thinned")
    page.click("#thin")
    visit.wait("#thinned .result")

    visit.tab("Cut")
    step("last")
    page.click("#do-cut")
    visit.wait("#was-cut .result")
    step("first")
    empties("was-cut")
    visit.drag((1, 1), (1, 2))
    page.wait_for_function("document.querySelectorAll('#view i.chosen').length === 2")
    page.click("#do-cut")
    page.get_by_text("2 patches cut in layers 1 to 10").wait_for()

    visit.tab("Save")
    page.click("#do-save")
    visit.wait("#saved a.download")
    assert json.loads(visit.value("json"))["budget"] == 0.45
    page.click('#bars button[data-layer="3"]')
    empties("saved")
    assert visit.value("link") == visit.value("json") == ""

    page.fill("#question textarea, #question input", "What else?")
    page.get_by_text("Ask to see the new question").wait_for()
    assert page.evaluate("Number(getComputedStyle(document.querySelector('#shown')).opacity)") < 1
    page.click('#examples button[data-example="1"]')
    page.wait_for_selector(".notice.stale", state="detached")
    page.get_by_text("Ask first.").wait_for(state="attached")
    for part, name in (("answer", ""), ("bars", ""), ("left", "Exits"), ("thinned", "Methods"), ("was-cut", "Cut")):
        if name:
            visit.tab(name)
            page.locator(f"#{part}").wait_for(state="attached")
        empties(part)
    assert visit.value("region") == ""
    assert page.locator("#view .cells i").count() == 0
    assert visit.complaints == []
    page.close()


def test_an_answer_is_written_out_where_something_is_left_of_it(chromium: Any, address: str) -> None:
    visit = Visit(chromium.new_page())
    page, (example, exit_layer) = visit.page, UNFINISHED
    page.goto(address)
    visit.wait("#view .photo")
    page.click(f'#examples button[data-example="{example}"]')
    visit.wait(f'#examples button[data-example="{example}"][aria-pressed="true"]')
    page.click("#ask")
    visit.wait("#view .cells i")
    visit.tab("Exits")
    slider = page.locator("#exit input[type=range]")
    slider.fill(str(exit_layer))
    page.get_by_text(f"{exit_layer} of 12 layers see the image: another answer").wait_for()
    page.click("#write-out")
    page.wait_for_selector("#write-out", state="hidden")
    assert page.locator("#left .spoken span").all_inner_texts() == ["small", "<end>"]
    assert visit.complaints == []
    page.close()


def test_an_image_of_ones_own(visit: Visit, address: str, tmp_path: Path) -> None:
    page = visit.page
    page.goto(address)
    visit.wait("#view .photo")
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    for name, side in (("large.png", 700), ("wide.png", 600), ("good.png", 40)):
        Image.fromarray(
            noise[:side, :side] if name != "wide.png" else noise[:1, :1].repeat(600, 0).repeat(600, 1)
        ).save(tmp_path / name)
    field_of_file = "#examples input[type=file]"
    page.set_input_files(field_of_file, tmp_path / "large.png")
    page.get_by_text("larger than 0.5 MiB").wait_for()
    page.set_input_files(field_of_file, tmp_path / "wide.png")
    page.get_by_text("600 x 600 pixels").wait_for()
    page.set_input_files(field_of_file, tmp_path / "good.png")
    page.wait_for_selector('#examples button[aria-pressed="true"]', state="detached")
    page.click("#ask")
    visit.wait("#view .cells i")
    visit.tab("Save")
    page.click("#do-save")
    visit.wait("#saved a.download")
    assert json.loads(visit.value("json"))["image"].startswith("data:image/png;base64,")
    assert visit.value("link") == ""


def test_two_visitors_do_not_see_each_other(chromium: Any, address: str) -> None:
    first, second = (Visit(chromium.new_page()) for _ in range(2))
    first.ask(address)
    second.page.goto(address)
    second.wait("#view .photo")
    assert second.page.locator("#answer button").count() == 0
    second.page.click('#examples button[data-example="2"]')
    second.wait('#examples button[data-example="2"][aria-pressed="true"]')
    assert first.page.locator('#examples button[data-example="0"][aria-pressed="true"]').count() == 1
    assert first.page.locator("#view .cells i").count() > 0
    first.page.close()
    second.page.close()


def test_a_damaged_link_is_told_of(visit: Visit, address: str) -> None:
    visit.page.goto(f"{address}?view=%25%25%25")
    visit.page.get_by_text("damaged").wait_for()


def test_nothing_of_the_disk_is_served(address: str) -> None:
    for path in (Path(__file__), Path("pyproject.toml").resolve(), Path("/etc/hostname")):
        for prefix in ("gradio_api/file=", "file=", "gradio_api/file/"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}{prefix}{path}")
            assert refused.value.code in (403, 404)


def test_a_taken_port_is_told_of(shapes: MLLM, address: str) -> None:
    require("gradio")
    from analysis.explore.explorer import Explorer
    from analysis.explore.serving import serve

    cfg = compose("explore", ["examples=1", f"port={address.rstrip('/').rpartition(':')[2]}"])
    with pytest.raises(ConfigError, match="port="):
        serve(Explorer.of(shapes, build_dataset(cfg.data), cfg), cfg)


def test_it_listens_to_this_machine_alone() -> None:
    assert compose("explore").host == "127.0.0.1"
