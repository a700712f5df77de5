"""What a command says in the terminal: its help, how far it is, and no warnings of other libraries."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from dyvte.errors import DyvteWarning

COMMANDS: dict[str, tuple[str, str]] = {
    "stages": ("dyvte.analysis.stages", "attention between image and text by layer, and its stages"),
    "exits": ("dyvte.analysis.exits", "what happens if the image leaves at layer k, for every k"),
    "knockout": ("dyvte.analysis.knockout", "what an answer loses when a path through attention is cut"),
    "stage-table": ("dyvte.analysis.stage_table", "which stages hold by attention, and which by cause"),
    "lens": ("dyvte.analysis.lens", "what each patch says by layer, and when the answer appears"),
    "tables": ("dyvte.analysis.tables", "methods at matched cost"),
    "cost": ("dyvte.analysis.cost", "latency, FLOPs and memory of every method"),
    "kept-positions": ("dyvte.analysis.kept_positions", "which places of the image each method keeps"),
    "gate-findings": ("dyvte.analysis.gate_findings", "what the gates read, against controls"),
    "gate-claims": ("dyvte.analysis.gate_claims", "do gates read the state of the text, or the question"),
    "gate-recipes": ("dyvte.analysis.gate_recipes", "options of the gates' recipe side by side"),
    "explore": ("dyvte.analysis.explore.__main__", "a page in the browser: ask about an image, look inside"),
    "report": ("dyvte.analysis.report.__main__", "every run so far on one HTML page"),
    "train": ("dyvte.train", "DyVTE's gates"),
    "evaluate": ("dyvte.evaluate", "what a policy costs in answers and saves in computation"),
    "generate": ("dyvte.generate", "one answer, and the layer where its image left"),
    "convert": ("dyvte.convert", "a checkpoint of the LLaVA code base as a transformers folder"),
    "smol": ("dyvte.testbed.smol.assemble", "fetch llava_smol's language model, join its parts"),
    "train-smol": ("dyvte.testbed.smol.train", "the projector and adapter of llava_smol"),
    "train-testbed": ("dyvte.testbed.train", "the small model that ships"),
}
"""The words after `dyvte`: where each command is, and what it gives."""


HELP_LINES, HELP_COLUMNS = 24, 80
"""A terminal as it opens."""
SETTING_LINES = 8
_COMMON = ("model", "data", "device", "batch_size", "seed", "output_dir", "overwrite", "verbose")
_NOT_LISTED = {*_COMMON, "command", "any_version", "debug", "calibration", "gate_training"}


def help_text(root: DictConfig) -> str:
    """What `--help` prints: what the command gives, three examples, its settings; at most a screen.

    Examples are the lines of `hydra.help.footer` in the command's file in `conf/`: the words after the command, and
    after a `#` what they are for. `root` is the composed configuration with Hydra's own part.
    """
    name = root.hydra.job.config_name
    known = COMMANDS.get(f"train-{name}") or COMMANDS.get(name.replace("_", "-"))
    what = known[1] if known else ""
    call = program()
    lines = textwrap.wrap(f"{call}: {what}" if what else call, HELP_COLUMNS)
    lines += ["", f"usage: {call} [key=value ...]", ""]
    if examples := example_words(root.hydra.help.footer):
        lines.append("examples:")
        for words, why in examples:
            typed, said = f"  {call} {words}".rstrip(), f"  # {why}" if why else ""
            lines += [typed + said] if len(typed + said) <= HELP_COLUMNS else [said, typed]
        lines.append("")
    settings = [f"{key}={_shown(value)}" for key, value in _own_settings(root)]
    if settings:
        lines += [f"settings (conf/{name}.yaml says what they mean):", *_filled(settings, SETTING_LINES), ""]
    choices = root.hydra.runtime.choices
    common = [f"{key}={choices.get(key, _shown(root[key]))}" for key in _COMMON if key in root and key != "output_dir"]
    common += ["output_dir=FOLDER"] if "output_dir" in root else []
    lines += ["of every command:", *_filled(common, SETTING_LINES)]
    lines += ["", "--cfg job prints all settings; --multirun key=A,B runs one after another"]
    return "\n".join(lines).replace("$", "$$")  # Hydra fills in a template


def example_words(text: str) -> list[tuple[str, str]]:
    """The examples of a help text: the words after the command, and what they are for.

    Example:
        >>> example_words("data.limit=64  # a quick look")
        [('data.limit=64', 'a quick look')]
    """
    parts = [line.partition("#") for line in text.splitlines() if line.strip()]
    return [(words.strip(), why.strip()) for words, _, why in parts]


def program() -> str:
    """How this command was called: `dyvte stages`, or `python -m analysis.stages`."""
    if sys.argv[0].startswith("dyvte "):
        return sys.argv[0]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return f"python {Path(sys.argv[0]).name}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def _own_settings(root: DictConfig) -> list[tuple[str, Any]]:
    """Settings that not every command has: groups by the file that was chosen, blocks of values by their keys."""
    choices, found = root.hydra.runtime.choices, []
    plain: Any = OmegaConf.to_container(root, resolve=False)
    for key, value in plain.items():
        if key == "hydra" or key in _NOT_LISTED:
            continue
        if key in choices:
            found.append((key, choices[key]))
        elif isinstance(value, dict) and value and all(isinstance(each, dict) for each in value.values()):
            found.append((f"{key}.NAME", value))  # their names are the user's
        elif isinstance(value, dict):
            found += [(f"{key}.{inner}", each) for inner, each in value.items()]
        else:
            found.append((key, value))
    return found


def _shown(value: Any) -> str:
    """A value as on the command line; what is long or follows from other settings as dots."""
    if isinstance(value, (list, dict)) or "${" in str(value):
        return "..."
    if value == "???":
        return "???"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))


def _filled(words: list[str], most: int) -> list[str]:
    """Words in lines of the terminal's width, the last of them dots where they do not fit into `most`."""
    return textwrap.wrap(
        " ".join(words),
        HELP_COLUMNS,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
        max_lines=most,
        placeholder=" ...",
    )


BAR = "{desc}: {n_fmt} of {total_fmt} {unit} |{bar:20}| {elapsed} gone, {remaining} left{postfix}"


class _Bar(tqdm):
    """A bar with a lock of its own process.

    Forked processes share the lock of tqdm's bars, and one that is killed while it draws would have the others wait.
    """


_Bar.set_lock(RLock())
if hasattr(os, "register_at_fork"):  # not on Windows, where nothing is forked
    os.register_at_fork(after_in_child=lambda: _Bar.set_lock(RLock()))


def progress(what: str, counted: str, over: Sequence[Any] | int, **settings: Any) -> tqdm[Any]:
    """A progress bar that says what it counts and how long it will take.

    `what` is going on, as `llava_shapes on shapes`; what is `counted` is named in the plural; `over` is what is gone
    through, or how many there are. Other settings are tqdm's, as `initial` and `disable`.
    """
    items: dict[str, Any] = {"total": over} if isinstance(over, int) else {"iterable": over}
    return _Bar(**items, desc=what, unit=counted, bar_format=BAR, dynamic_ncols=True, **settings)


_formatwarning = warnings.formatwarning


def _own_in_one_line(message: Warning | str, category: type[Warning], *where: Any, **source: Any) -> str:
    own = issubclass(category, DyvteWarning)
    return f"warning: {message}\n" if own else _formatwarning(message, category, *where, **source)


def quiet_libraries() -> None:
    """Keep warnings and log messages of other libraries off; the package's own warnings come as one line each.

    Levels that are set in the environment (`TRANSFORMERS_VERBOSITY`, `-W`, `PYTHONWARNINGS`) stay.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", DyvteWarning)
    warnings.formatwarning = _own_in_one_line
    logging.getLogger().setLevel(logging.ERROR)
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # where transformers is imported later
        if "transformers" in sys.modules:
            sys.modules["transformers"].logging.set_verbosity_error()
