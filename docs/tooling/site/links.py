"""A hook of mkdocs: links out of docs/ become links of the site.

Pages are written to be read on GitHub, so they link to files of the repository outside of docs/. In the site, a file
becomes a copy of itself under `repository/`, a notebook its page, README.md the first page, and a folder is named
without a link. A link to something that is not there is a warning, which `--strict` makes an error.
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
log = logging.getLogger("mkdocs.hooks.links")
_copied: set[str] = set()


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that pages link to."""
    _copied.clear()
    docs = Path(config.docs_dir)
    for page in files.documentation_pages():
        for _, target, _ in LINK.findall(page.content_string):
            path = Path(os.path.normpath((docs / page.src_uri).parent / target))
            name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
            if path.is_file() and not path.is_relative_to(docs) and path.suffix != ".md" and name not in _copied:
                _copied.add(name)
                files.append(File.generated(config, f"repository/{name}", content=path.read_bytes()))
    return files


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
        if name in _copied:
            return f"[{text}]({os.path.relpath(f'repository/{name}', here)})"
        return f"[{text}]({os.path.relpath('index.md', here)})" if name == "README.md" else text

    return LINK.sub(replaced, markdown)
