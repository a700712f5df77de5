"""The console command: `dyvte stages model=llava7b` is `python -m analysis.stages model=llava7b`, from any folder.

An installed package carries the experiments as `dyvte.analysis`. In a checkout they lie in `analysis/` beside `dyvte/`
and are reached under the same name, so an `analysis/` of somebody else's in the current folder is never taken for them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import dyvte
from dyvte.runs.terminal import COMMANDS


def usage() -> str:
    """Every command with what it does."""
    lines = "\n".join(f"  {name:16}{what}" for name, (_, what) in COMMANDS.items())
    more = "dyvte COMMAND --help shows examples and the settings of a command."
    return f"usage: dyvte COMMAND [key=value ...]\n\n{lines}\n\n{more}"


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
