"""What commands say in the terminal: help on one screen, bars that count, quiet libraries, a last line."""

from __future__ import annotations

import io
import logging
import multiprocessing
import shlex
import sys
import threading
import time
import types
import warnings
from functools import cache
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from analysis.cost import cost_in_words
from analysis.kept_positions import places_in_words
from analysis.knockout import worst_cut_in_words
from analysis.statistics.methods import leaders_in_words
from analysis.statistics.verdicts import image_use_in_words
from dyvte.errors import DyvteWarning
from dyvte.evaluate import policy_in_words
from dyvte.runs import terminal
from dyvte.runs.config import HYDRA_VERSION, command, compose, config_folder

# Of what has no configuration of its own, and of models that are trained once, nothing has to be shown.
LISTED = [name for name in terminal.COMMANDS if name not in ("smol", "train-smol", "train-testbed")]


@cache
def with_hydra(name: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base=HYDRA_VERSION, config_dir=str(config_folder())):
        return hydra.compose(config_name=name, return_hydra_config=True)


@pytest.mark.parametrize("name", terminal.COMMANDS)
def test_help_fits_a_screen(name: str, monkeypatch: pytest.MonkeyPatch):
    module = terminal.COMMANDS[name][0].removeprefix("dyvte.") if "analysis" in terminal.COMMANDS[name][0] else ""
    spec = types.SimpleNamespace(name=module or terminal.COMMANDS[name][0])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    file = {"train-smol": "smol", "train-testbed": "testbed"}.get(name, name.replace("-", "_"))
    cfg = with_hydra(file)
    for called in ("anything.py", f"dyvte {name}"):
        monkeypatch.setattr(sys, "argv", [called])
        lines = cfg.hydra.help.template.replace("$$", "$").splitlines()
        assert len(lines) <= terminal.HELP_LINES, "\n".join(lines)
        assert max(map(len, lines)) <= terminal.HELP_COLUMNS, max(lines, key=len)
        assert terminal.program() in lines[0]


@pytest.mark.parametrize("name", LISTED)
def test_help_shows_three_examples_that_compose(name: str):
    file = name.replace("-", "_")
    examples = terminal.example_words(with_hydra(file).hydra.help.footer)
    assert len(examples) == 3
    for words, _ in examples:
        for jobs in alternatives([each for each in shlex.split(words) if each != "--multirun"]):
            compose(file, jobs)


def alternatives(words: list[str]) -> list[list[str]]:
    """The jobs of a sweep over one setting; the words themselves where none has several values."""
    several = [each for each in words if "," in each and "[" not in each and "{" not in each]
    if not several:
        return [words]
    key, _, values = several[0].partition("=")
    return [[f"{key}={value}" if each == several[0] else each for each in words] for value in values.split(",")]


def test_help_names_the_settings_of_the_command_and_how_to_call_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["dyvte evaluate"])
    text = with_hydra("evaluate").hydra.help.template
    assert text.startswith("dyvte evaluate: what a policy costs")
    assert "policy=none" in text
    assert "max_new_tokens=64" in text
    assert "calibration" not in text


def test_bars_say_what_they_count_and_how_long_it_takes():
    out = io.StringIO()
    with terminal.progress("llava_shapes on shapes", "samples", 8, initial=2, file=out) as bar:
        bar.update(4)
        bar.refresh()
    last = out.getvalue().split("\r")[-1]
    assert "llava_shapes on shapes: 6 of 8 samples |" in last
    assert last.rstrip().endswith("left")
    gone_through = list(terminal.progress("kept positions", "methods", ["a", "b"], file=out))
    assert gone_through == ["a", "b"]
    assert "2 of 2 methods" in out.getvalue()


@pytest.fixture
def _loud(monkeypatch: pytest.MonkeyPatch):
    """Warnings and levels as a process starts with them, restored afterwards."""
    import transformers

    level, verbosity = logging.getLogger().level, transformers.logging.get_verbosity()
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        yield
    logging.getLogger().setLevel(level)
    transformers.logging.set_verbosity(verbosity)
    monkeypatch.undo()


@pytest.mark.usefixtures("_loud")
def test_warnings_of_libraries_are_kept_off_and_ours_come_in_one_line():
    import transformers

    terminal.quiet_libraries()
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn("of a library", UserWarning, stacklevel=1)
        warnings.warn("of ours", DyvteWarning, stacklevel=1)
    (ours,) = shown
    assert warnings.formatwarning(ours.message, ours.category, ours.filename, ours.lineno) == "warning: of ours\n"
    assert "test_terminal.py" in warnings.formatwarning("x", UserWarning, __file__, 1)  # let through: as ever
    assert transformers.logging.get_verbosity() == transformers.logging.ERROR
    assert not logging.getLogger("any.library").isEnabledFor(logging.WARNING)


@pytest.mark.usefixtures("_loud")
def test_what_is_set_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch):
    import transformers

    transformers.logging.set_verbosity_info()
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    before = list(warnings.filters)
    terminal.quiet_libraries()
    assert transformers.logging.get_verbosity() == transformers.logging.INFO
    assert warnings.filters == before


@pytest.mark.parametrize(("verbose", "quiet"), [("false", True), ("true", False)])
def test_a_command_ends_with_what_it_found(
    verbose: str, quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    called = []
    monkeypatch.setattr("dyvte.runs.config.quiet_libraries", lambda: called.append(True))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dyvte stages", f"verbose={verbose}"])

    @command("stages")
    def main(cfg: DictConfig) -> str | None:
        print("a table")
        return f"{cfg.data.limit} samples are enough."

    main()
    assert capsys.readouterr().out.splitlines()[1:] == ["a table", "found: 512 samples are enough."]
    assert called == [True] * quiet
    assert main(compose("stages", ["data.limit=3"])) == "3 samples are enough."  # a function of a configuration


# ------------------------------------------------------------------- what is found, in words
def test_exits_say_until_where_the_image_is_used():
    summary = {
        "num_layers": 4,
        "agreement": [0.25, 0.5, 0.99, 1, 1],
        "flops_decoder": [1, 2, 3, 4, 5],
        "findings": {"contribution_stops": {"verdict": "found", "exit_layer": 2, "reasons": ["x"]}},
    }
    used, blind = image_use_in_words(summary)
    assert "first 2 of 4 layers" in used
    assert "99.0% of the answers stay, at 60.0%" in used
    assert "25.0%" in blind
    open_question = {**summary, "findings": {"contribution_stops": {"verdict": "undetermined", "reasons": ["few"]}}}
    assert "undetermined (few). More questions" in image_use_in_words(open_question)[0]


def band(*mean: float) -> dict[str, dict[str, list[float]]]:
    limits = {"mean": list(mean), "low": [each - 5 for each in mean], "high": [each + 5 for each in mean]}
    return {"agreement_points": limits}


def test_knockout_names_the_path_and_the_layers_that_matter_most():
    effects = {"question->visual": band(-3, -40), "last->question": band(-1, -2), "last->visual (random)": band(-90, 0)}
    summary = {"windows": [[0, 3], [3, 6]], "width": 3, "overall": {"effects": effects}}
    words = worst_cut_in_words(summary)
    assert words.startswith("The answers need the question to read the image in layers 3-5 most: cut there, 40.0%")
    assert "[35.0, 45.0]" in words
    none = {**summary, "overall": {"effects": {"last->question": band(-1, -2)}}}
    assert worst_cut_in_words(none).startswith("No path")


def test_a_policy_says_what_it_keeps_beside_fixed_exits():
    numbers = {"agreement": 0.985, "cost": 0.6, "cost_of_fixed_exits": 0.8}
    words = policy_in_words({"policy": "dynamic_exit", **numbers})
    for part in ("dynamic_exit keeps 98.5%", "at 60% of", "fixed exits keep as many at 80%"):
        assert part in words


def test_tables_say_who_is_ahead_or_that_none_could_be_compared():
    verdict = {
        "on": "accuracy", "budget": 0.5, "ahead": "fastv", "accuracy": 0.8, "not_told_apart": [],
        "lead": {"tome": [0.1, 0.05, 0.15]},
    }  # fmt: skip
    assert leaders_in_words([verdict]) == (
        "At 0.5 of the FLOPs, all questions: FastV (80.0%) is ahead of all others, of ToMe by 10.0 points [5.0, 15.0]."
    )
    tied = leaders_in_words([{**verdict, "not_told_apart": ["tome"]}])
    assert tied.endswith("is the most accurate, not told apart from all others.")
    assert "name more methods" in leaders_in_words([])


def test_places_and_times_in_words():
    places = {"fastv": ("late", 0.6), "divprune": ("late", 0.7), "tome": ("early", 0.4)}
    found = [
        {"method": name, "preference": f"{which} places", "mean_place": mean} for name, (which, mean) in places.items()
    ]
    words = places_in_words(found)
    assert words.startswith(
        "2 of 3 methods keep late places, DivPrune most; 1 of 3 methods keep early places, ToMe most"
    )
    assert places_in_words([{**found[0], "preference": "no preference shown"}]).startswith("no method prefers")
    import pandas as pd

    rows = [
        {"batch_size": 1, "method": "fastv", "prefill_ratio": 0.1, "prefill_ratio_q75": 0.2, "kv_cache_bytes": 1e3},
        {"batch_size": 8, "method": "none", "prefill_ratio": 1.0, "prefill_ratio_q75": 1.0, "kv_cache_bytes": 9e3},
        {"batch_size": 8, "method": "fastv", "prefill_ratio": 0.7, "prefill_ratio_q75": 1.1, "kv_cache_bytes": 5e3},
        {"batch_size": 8, "method": "tome", "prefill_ratio": 0.6, "prefill_ratio_q75": 0.8, "kv_cache_bytes": 4e3},
    ]
    words = cost_in_words(pd.DataFrame(rows))
    assert words.startswith("1 of 2 methods shorten the prefill of a batch of 8; ToMe most, to 60%")
    assert "name methods" in cost_in_words(pd.DataFrame(rows[1:2]))


def test_a_forked_process_that_is_killed_while_it_draws_leaves_no_lock() -> None:
    context = multiprocessing.get_context("fork")
    holding = context.Event()

    def hold() -> None:
        with type(terminal.progress("child", "steps", 1)).get_lock():
            holding.set()
            time.sleep(60)

    terminal.progress("parent", "steps", 1).close()
    process = context.Process(target=hold)
    process.start()
    assert holding.wait(30)
    process.kill()
    process.join()
    drawn = threading.Thread(target=lambda: terminal.progress("parent", "steps", 1).close(), daemon=True)
    drawn.start()
    drawn.join(10)
    assert not drawn.is_alive()
