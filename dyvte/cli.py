"""The console command: `dyvte stages model=llava7b` is `python -m analysis.stages model=llava7b`, from any folder.

An installed package carries the experiments as `dyvte.analysis`. In a checkout they lie in `analysis/` beside `dyvte/`
and are reached under the same name, so an `analysis/` of somebody else's in the current folder is never taken for them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import dyvte

COMMANDS: dict[str, tuple[str, str]] = {
    "stages": ("dyvte.analysis.stages", "attention between image and text in every layer, and the verdict on stages"),
    "exits": ("dyvte.analysis.exits", "what happens if the image leaves at exit layer k, for every k"),
    "knockout": ("dyvte.analysis.knockout", "what an answer loses when a path through attention is cut"),
    "stage-table": ("dyvte.analysis.stage_table", "which stages hold by attention, and which by cause"),
    "lens": ("dyvte.analysis.lens", "what each patch says after each layer, and when the answer appears"),
    "tables": ("dyvte.analysis.tables", "methods at matched cost"),
    "cost": ("dyvte.analysis.cost", "latency, FLOPs and memory of every method"),
    "kept-positions": ("dyvte.analysis.kept_positions", "which places of the image each method keeps"),
    "gate-findings": ("dyvte.analysis.gate_findings", "what the gates read, against controls"),
    "gate-claims": ("dyvte.analysis.gate_claims", "do gates read the state of the text, or the question"),
    "explore": ("dyvte.analysis.explore.__main__", "a page in the browser: ask about an image and look inside"),
    "report": ("dyvte.analysis.report.__main__", "every run so far on one HTML page"),
    "train": ("dyvte.train", "DyVTE's gates"),
    "evaluate": ("dyvte.evaluate", "what a policy costs in answers and saves in computation"),
    "generate": ("dyvte.generate", "one answer, and the layer where its image left"),
    "convert": ("dyvte.convert", "a checkpoint of the LLaVA code base into a transformers folder"),
    "smol": ("dyvte.testbed.smol.assemble", "fetch the language model of llava_smol and put the model together"),
    "train-smol": ("dyvte.testbed.smol.train", "the projector and adapter of llava_smol"),
    "train-testbed": ("dyvte.testbed.train", "the small model that ships"),
}


def usage() -> str:
    """Every command with what it does."""
    lines = [f"  {name:16}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dyvte COMMAND [key=value ...]",
            "",
            *lines,
            "",
            "dyvte COMMAND --help lists the settings of a command.",
        ]
    )


def make_experiments_importable() -> None:
    """In a checkout, let `dyvte.analysis` be the `analysis/` folder beside the package."""
    package = Path(dyvte.__file__).resolve().parent
    checkout = package.parent
    inside = (package / "analysis").is_dir()
    if not inside and (checkout / "analysis" / "stages.py").is_file() and str(checkout) not in dyvte.__path__:
        dyvte.__path__.append(str(checkout))


def main() -> None:
    """Run the command that the first word names with the words after it."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if words[0] == "--version":
        print(dyvte.__version__)
        return
    if words[0] not in COMMANDS:
        sys.exit(f"error: no command {words[0]!r}; choose one of {', '.join(COMMANDS)}")
    make_experiments_importable()
    sys.argv = [f"dyvte {words[0]}", *words[1:]]
    import_module(COMMANDS[words[0]][0]).main()


if __name__ == "__main__":
    main()
