"""The documentation says what is there: links lead somewhere, commands compose, names and messages exist."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import hydra
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

import dyvte
from dyvte.policies.registry import methods
from dyvte.runs.config import HYDRA_VERSION, config_folder, missing_settings

ROOT = Path(__file__).parents[1]
TOP = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("[!.]*.md"))]
OURS = r"dyvte|analysis|benchmarks|docs\.tooling"
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]+\b|\.\.\.")
"""What stands for a value of the reader's in running text: FOLDER, NAME, ..."""


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of the fenced code blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


# ---------------------------------------------------------------------------- links


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def targets(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    found: dict[str, int] = {}
    names = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", page.read_text()))
    for heading in re.findall(r"^#{1,6} (.+?)\s*$", prose(page), re.MULTILINE):
        anchor = slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
        names.add(f"{anchor}-{found[anchor]}" if anchor in found else anchor)
        found[anchor] = found.get(anchor, 0) + 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_relative_link_leads_somewhere(page: Path):
    for target in targets(page):
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no {file}"
        assert file.is_relative_to(ROOT), f"{target} leaves the repository"
        if anchor:
            assert file.suffix == ".md", f"{target}: {file.name} has no headings"
            assert anchor in anchors(file), f"{target}: no such heading in {file.name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_picture_says_in_words_what_it_shows(page: Path):
    assert not re.findall(r"!\[\s*\]\([^)]*\)", prose(page))
    for image in re.findall(r"<img [^>]*>", prose(page)):
        assert re.search(r"alt=\"[^\"]+\"", image), image


def test_the_map_names_every_page():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in targets(index)}
    others = [page for page in PAGES if page not in {index, *TOP}]
    missing = [page_id(page) for page in others if not linked & {page, page.parent}]
    assert not missing


# ------------------------------------------------------------------------- commands


def commands_in(text: str) -> Iterator[str]:
    """Lines that run a module, however it is started, with continuation lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if re.search(rf"(^|\s)-m ({OURS})\b", line):
            yield line.strip().removeprefix("$ ")


def block_commands() -> list[tuple[Path, str]]:
    return [
        (page, line)
        for page in PAGES
        for language, block in blocks(page)
        if language in ("", "sh", "bash", "console")
        for line in commands_in(block)
    ]


def inline_commands() -> list[tuple[Path, str]]:
    return [
        (page, line)
        for page in PAGES
        for span in re.findall(r"`([^`]+)`", prose(page))
        for line in commands_in(" ".join(span.split()))
    ]


def module_and_words(line: str) -> tuple[str, list[str]]:
    """The module that a line runs, and its arguments: `accelerate launch -m dyvte.train x=1` -> dyvte.train, [x=1]."""
    words = shlex.split(line, comments=True)
    start = next(i for i, word in enumerate(words[1:]) if word == "-m" and re.match(OURS, words[i + 2])) + 1
    return words[start + 1], words[start + 2 :]


def source_of(module: str) -> str:
    spec = find_spec(module)
    assert spec, f"there is no module {module}"
    assert spec.origin, f"{module} is no command"
    return Path(spec.origin).read_text()


def configuration_of(module: str) -> str | None:
    """Name of the Hydra configuration of a command; None where it reads its arguments otherwise."""
    match = re.search(r"^@command\(\"(\w+)\"\)", source_of(module), re.MULTILINE)
    return match[1] if match else None


def jobs(overrides: list[str], multirun: bool) -> list[list[str]]:
    """The settings of each job of a sweep; without `--multirun` there is one."""
    if not multirun:
        return [overrides]
    choices = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([str(override.input_line)])
    return [list(job) for job in itertools.product(*choices)]


def check_command(line: str, configs: Path) -> None:
    """Fail unless the module exists and every setting composes to a configuration that lacks nothing.

    Args:
        line: as on the page.
        configs: folder that holds the configurations that the page shows, for `--config-dir`.
    """
    module, words = module_and_words(line)
    name = configuration_of(module)
    if name is None:
        for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
            sources = source_of(module) + source_of("benchmarks.common")
            assert f'"{option}"' in sources, f"{module} has no option {option}"
        return
    searchpath = []
    if "--config-dir" in words:
        at = words.index("--config-dir")
        folder = configs / words[at + 1]
        assert folder.is_dir(), f"the page shows no file under {words[at + 1]}/"
        searchpath = [f"hydra.searchpath=[file://{folder}]"]
        words = words[:at] + words[at + 2 :]
    flags = [word for word in words if word.startswith("-")]
    assert set(flags) <= {"--multirun", "--help"}, flags
    overrides = [word for word in words if not word.startswith("-")]
    if module == "dyvte.convert":
        from dyvte.convert import name_positional

        overrides = name_positional(overrides)
    with hydra.initialize_config_dir(version_base=HYDRA_VERSION, config_dir=str(config_folder())):
        for job in jobs(overrides, "--multirun" in flags):
            cfg = hydra.compose(name, [*searchpath, *job])
            assert isinstance(cfg, DictConfig)
            assert not missing_settings(cfg), f"needs {missing_settings(cfg)}"


@pytest.fixture
def shown_configs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folder with the YAML blocks of a page that begin with their file name: `# my_conf/policy/mine.yaml`."""
    for language, block in blocks(request.node.callspec.params["page"]):
        if language == "yaml" and (named := re.match(r"# (\S+\.yaml)\n", block)):
            file = tmp_path / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block)
            assert isinstance(yaml.safe_load(block), dict)
    return tmp_path


@pytest.mark.parametrize(("page", "line"), block_commands(), ids=lambda each: None)
def test_commands_in_code_blocks_compose(page: Path, line: str, shown_configs: Path):
    check_command(line, shown_configs)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_in_running_text_compose(page: Path, shown_configs: Path):
    for line in [line for other, line in inline_commands() if other == page]:
        module, words = module_and_words(line)
        if not words or PLACEHOLDER.search(line):  # a command by its name
            source_of(module)
        else:
            check_command(line, shown_configs)


@pytest.mark.parametrize(
    "line",
    [
        "python -m analysis.no_such_command",
        "python -m analysis.stages data.limits=3",
        "python -m analysis.stages model=no_such_model",
        "python -m dyvte.evaluate policy=fixed_exit",  # needs its layer
        "python -m dyvte.evaluate policy=none,dynamic_exit",  # needs --multirun
        "python -m dyvte.evaluate --config-dir nowhere policy=mine",
        "python -m benchmarks.sweep --no-such-option 3",
        "torchrun --nproc_per_node 2 -m dyvte.train recipe=no_such_recipe",
    ],
)
def test_a_wrong_command_would_be_found(line: str, tmp_path: Path):
    assert list(commands_in(line)) == [line]
    with pytest.raises((AssertionError, hydra.errors.HydraException)):
        check_command(line, tmp_path)


def is_command(path: Path) -> bool:
    """Whether a file ends with `if __name__ == "__main__":`."""
    tests = [ast.unparse(each.test) for each in ast.parse(path.read_text()).body if isinstance(each, ast.If)]
    return "__name__ == '__main__'" in tests


def test_every_command_is_documented():
    documented = {module_and_words(line)[0] for _, line in [*block_commands(), *inline_commands()]}
    # copied into another environment and run there as a file; the console command, `dyvte`
    alone = {"dyvte.conversion.export_visual_tokens", "dyvte.cli"}
    for folder in ("dyvte", "analysis", "benchmarks", "docs/tooling"):
        for path in (ROOT / folder).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
            assert not is_command(path) or module in documented | alone, f"no page says python -m {module}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_and_extras_exist(page: Path):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose(page)) if span.startswith("make ")]
    lines = [line for _, block in blocks(page) for line in block.splitlines() if line.startswith("make ")]
    for line in [*spans, *lines]:
        wanted = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
        assert set(wanted) <= targets, line
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"(?:dyvte|'\.|\"\.)\[([a-z,-]+)\]['\"]", text):
        assert set(names.split(",")) <= set(extras), names


# --------------------------------------------------------------------------- Python


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_examples_parse_and_use_names_that_exist(page: Path):
    for language, block in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dyvte":
                assert hasattr(dyvte, node.attr) or find_spec(f"dyvte.{node.attr}"), f"no dyvte.{node.attr}"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("dyvte", "analysis", "benchmarks")
            ):
                assert node.module
                defined = source_of(node.module)
                for alias in node.names:
                    assert re.search(rf"\b{alias.name}\b", defined), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("page", [ROOT / "docs" / "hidden_state.md"], ids=page_id)
def test_what_a_block_changes_is_restored_as_the_page_shows(page: Path, capsys: pytest.CaptureFixture[str]):
    (example,) = [block for language, block in blocks(page) if language == "python"]
    exec(compile(example, page.name, "exec"), {})
    shown = [comment.split() for comment in re.findall(r"# ((?:True|False) (?:True|False))$", example, re.MULTILINE)]
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == shown


# -------------------------------------------------------------- reference, messages, site


def test_the_reference_holds_every_public_name():
    listed = set(re.findall(r"^::: [\w.]*?(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE))
    assert set(dyvte.__all__) - {"__version__"} <= listed


def texts_of(folder: Path) -> str:
    """Every piece of text in the code below a folder, with `...` where a value goes."""
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_on_the_page_of_pitfalls_are_those_of_the_code():
    """Who searches the page for what a terminal said finds it; capitals and numbers there stand for a value."""
    said = texts_of(ROOT / "dyvte") + texts_of(ROOT / "analysis")
    rows = re.findall(r"^\| (`.+?`.*?) \|", (ROOT / "docs" / "pitfalls.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    for row in rows:
        for message in re.findall(r"`([^`]+)`", row):
            parts = re.split(r"'?\b[A-Z_]{3,}\b'?|\.\.\.|'\w+'|\b\d+(?:\.\.\d+)?\b|\w*Cache\b|[()]", message)
            longest = max((part.strip(" ':;,`") for part in parts), key=len)
            assert longest in said, f"no message says {longest!r} ({message})"


def text_of(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


def test_the_site_builds_without_a_warning(tmp_path: Path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr + done.stdout
    page = {file.parent.relative_to(tmp_path / "site").as_posix(): file.read_text()
            for file in (tmp_path / "site").rglob("index.html")}  # fmt: skip
    assert "testbed_smol/hero.png" in page["."]  # the README, and the pages by their titles
    assert "how_to_own_data.md" not in text_of(page["."])
    assert "dyvte.policies.exits.fixed_exit.FixedExit" in page["reference"]
    sources = json.loads((ROOT / "docs/images/sources.json").read_text())
    mapped = sources["kept_positions.png"]["numbers"]["methods.*.method"]
    assert mapped
    for name, method in methods().items():
        assert f"policy={name}" in text_of(page[f"methods/{name}"])
        assert method.source.paper in page[f"methods/{name}"]
        assert f'href="{name}/"' in page["methods"]
        assert ("Which places it keeps" in page[f"methods/{name}"]) == (name in mapped)
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        shown = page[f"notebooks/{notebook.stem}"]
        assert shown.count("What this cell draws") == notebook.read_text().count('"image/png"')
    assert page["concepts"].count("<math") > 10
    assert "arithmatex" not in page["concepts"], "a formula was left as it is"
    for text in page.values():  # it is read without a network
        assert not re.findall(r'<(?:script|img)[^>]*src="https?:|<link[^>]*rel="stylesheet"[^>]*href="https?:', text)


def test_the_readme_is_short_and_shows_a_picture_first():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert any("](docs/testbed_smol/hero.png)" in line for line in lines[:10])


# ---------------------------------------------------------------------------- citations


def test_every_method_can_be_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for each in citation["references"]:
        assert each["title"], each
        assert each["authors"], each
        assert all(set(author) == {"given-names", "family-names"} for author in each["authors"]), each["title"]
    cited = {each["url"].rpartition("/")[2] for each in citation["references"]}
    table = (ROOT / "docs" / "policies.md").read_text().partition("| policy |")[2].partition("\n\n")[0]
    assert set(re.findall(r"\b\d{4}\.\d{5}\b", table)) <= cited
