"""A hook of mkdocs: links out of docs/ become links of the site.

Pages are written to be read on GitHub, so they link to files of the repository outside of docs/. In the site, a file
becomes a copy of itself under `repository/`, a notebook its page, and a folder is named without a link. The first page
is README.md with the list of pages behind it, and a link that shows the name of a page's file shows its title. A link
to something that is not there is a warning, which `--strict` makes an error.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[3]
LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s#]*)(#[^)\s]*)?\)")
README_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)")
FILE_NAME = re.compile(r"\[([\w/]+\.md)\]\(([^)\s#]+\.md)\)")
FIRST_PAGE, LIST_OF_PAGES = "index.md", re.compile(r"^# .*\n+New here:.*\n")
log = logging.getLogger("mkdocs.hooks.links")
_copied: set[str] = set()


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that pages link to."""
    _copied.clear()
    docs = Path(config.docs_dir)
    for page in files.documentation_pages():
        text = readme(docs) if page.src_uri == FIRST_PAGE else ""
        for _, target, _ in LINK.findall(text + page.content_string):
            path = Path(os.path.normpath((docs / page.src_uri).parent / target))
            name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
            if path.is_file() and not path.is_relative_to(docs) and path.suffix != ".md" and name not in _copied:
                _copied.add(name)
                files.append(File.generated(config, f"repository/{name}", content=path.read_bytes()))
    return files


def readme(docs: Path) -> str:
    """README.md, its links as a page of docs/ has them."""
    text = (ROOT / "README.md").read_text()
    return README_LINK.sub(lambda found: f"]({os.path.relpath(ROOT / found[1], docs)}", text)


def with_titles(markdown: str, here: Path) -> str:
    """Links that show the name of the file of a page, with the page's title in its place."""

    def titled(found: re.Match[str]) -> str:
        text, target = found.groups()
        page = here / target
        if Path(text).name != page.name or not page.is_file():
            return found[0]
        title = page.read_text().partition("\n")[0]
        return f"[{title.removeprefix('# ')}]({target})" if title.startswith("# ") else found[0]

    return FILE_NAME.sub(titled, markdown)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that leave docs/ into links of the site."""
    docs, here = Path(config.docs_dir), Path(page.file.src_uri).parent

    def replaced(found: re.Match[str]) -> str:
        text, target, _ = found.groups()
        path = Path(os.path.normpath(docs / here / target))
        if path.is_relative_to(docs):
            return found[0]
        if not path.exists():
            log.warning(f"{page.file.src_uri}: link to {target}, which does not exist")
            return text
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".ipynb" and here.name != path.parent.name:  # in all pages but its own
            return f"[{text}]({os.path.relpath(path.with_suffix('.md').relative_to(ROOT), here)})"
        if name == "notebooks":
            return f"[{text}]({os.path.relpath('notebooks/index.md', here)})"
        if name in _copied:
            return f"[{text}]({os.path.relpath(f'repository/{name}', here)})"
        return f"[{text}]({os.path.relpath('index.md', here)})" if name == "README.md" else text

    if page.file.src_uri == FIRST_PAGE:
        pages = re.sub(r"^##", "###", LIST_OF_PAGES.sub("", markdown), flags=re.MULTILINE)
        markdown = f"{readme(docs)}\n## Pages\n{pages}"
    return with_titles(LINK.sub(replaced, markdown), docs / here)
