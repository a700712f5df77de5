"""A hook of mkdocs: every notebook as a page of the site, as it was kept, with its outputs. Nothing is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert.exporters import MarkdownExporter

ROOT = Path(__file__).resolve().parents[3]
SECTION = "notebooks"
TITLE = re.compile(r"^# (.+)$", re.MULTILINE)


def notebook_files() -> list[Path]:
    """In the order in which they are read."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def as_page(file: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown and its pictures, by their places below the folder of the section."""
    resources = {"unique_key": "output", "output_files_dir": file.stem}
    text, found = MarkdownExporter().from_filename(str(file), resources=resources)
    text = text.replace("![png](", "![What this cell draws](")
    # Links there are from notebooks/, here from docs/notebooks/.
    text = re.sub(r"\]\(\.\./(docs/)?", lambda link: "](../" if link[1] else "](../../", text)
    title, rest = text.split("\n", 1)
    kept = f"The notebook itself, to run and to change: [{file.name}](../../notebooks/{file.name})."
    return f"{title}\n\n{kept}\n{rest}", dict(found["outputs"])


def index_page(titles: dict[str, str]) -> str:
    """What there is."""
    listed = [f"- [{title}]({stem}.md)" for stem, title in titles.items()]
    words = "The paper's figures and more, a cell each, with the outputs that they had when they were last run."
    return "\n".join(["# Notebooks", "", words, "", *listed, ""])


def on_config(config: Any) -> Any:
    """Add the pages to the section of mkdocs.yml."""
    (section,) = (entry for entry in config.nav if "Notebooks" in entry)
    section["Notebooks"] = [f"{SECTION}/{name}.md" for name in ["index", *(file.stem for file in notebook_files())]]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and their pictures."""
    titles = {}
    for file in notebook_files():
        text, pictures = as_page(file)
        found = TITLE.search(text)
        titles[file.stem] = found[1] if found else file.stem
        files.append(File.generated(config, f"{SECTION}/{file.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"{SECTION}/{name}", content=content))
    files.append(File.generated(config, f"{SECTION}/index.md", content=index_page(titles)))
    return files
