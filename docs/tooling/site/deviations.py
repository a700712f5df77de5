"""`python -m docs.tooling.site.deviations`: docs/deviations.md, where each method differs from its paper or code.

The paragraphs are those of the methods' files that begin with "Deviations" and "Unverified", else what the class says.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from docs.tooling.generated import write_generated
from dyvte.policies.base import Policy
from dyvte.policies.registry import methods

COMMAND = "python -m docs.tooling.site.deviations"
PAGE = Path("docs/deviations.md")
ROOT = Path(__file__).resolve().parents[3]
KINDS = ("Deviations", "Unverified", "Read in summaries only")
"""How paragraphs begin that say what is not, or not known to be, the paper's."""

HEAD = f"""# Where methods differ from their papers

From the first lines of each method's file, written by `{COMMAND}`. *Unverified* is what neither paper nor code was at
hand for; it is our choice. What all methods share is in [policies.md](policies.md)."""


def differences(method: type[Policy]) -> list[str]:
    """The paragraphs of a method's file that say where it is not its paper's, each in one line."""
    said = (inspect.getdoc(inspect.getmodule(method)) or "").split("\n\n")
    found = [" ".join(each.split()) for each in said if each.startswith(KINDS)]
    if method.source.unverified and not any(each.startswith(KINDS[1:]) for each in found):
        found.append(f"Unverified: {method.source.unverified}.")
    return found


def page() -> str:
    """The page: every method that has a paper, those of one file together, in the order of the registry."""
    files: dict[str, list[type[Policy]]] = {}
    for method in methods().values():
        if method.source.paper:
            files.setdefault(inspect.getfile(method), []).append(method)
    parts = [HEAD]
    for file, together in files.items():
        link = Path("..") / Path(file).relative_to(ROOT)
        papers = dict.fromkeys(each.source.paper for each in together)
        links = ", ".join(f"[{each}](https://arxiv.org/abs/{each})" for each in papers)
        title = f"## {', '.join(each.label for each in together)}"
        where = f"[{link.name}]({link.as_posix()}), {links}."
        parts.append("\n\n".join([title, where, *differences(together[0])]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_generated(PAGE, page(), COMMAND)
