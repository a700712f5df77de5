"""What is installed works anywhere, is declared, and is what the README says."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dyvte.runs.config import compose, config_folder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
FOLDERS = {"analysis", "dyvte", "conf", "notebooks", "outputs", "tests", "docs", ".ci"}
FILES = {"pyproject.toml", "Makefile", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "constraints.txt"}
TOOL_FILES = {".gitignore", ".pre-commit-config.yaml"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, unpacked as `pip install --target` would."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 25e6
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_configurations_and_weights_travel_in_the_wheel(installed: Path):
    conf = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert conf == {path.relative_to(installed / "dyvte/_conf") for path in (installed / "dyvte/_conf").rglob("*.yaml")}
    tracked = subprocess.run(["git", "ls-files", "dyvte", "analysis"], cwd=ROOT, capture_output=True, text=True)
    for file in tracked.stdout.splitlines():
        assert (installed / file).is_file(), file
    assert {path.name for path in installed.iterdir()} <= {"analysis", "dyvte", f"dyvte-{version(installed)}.dist-info"}


def version(installed: Path) -> str:
    (metadata,) = installed.glob("dyvte-*.dist-info")
    return metadata.name.removeprefix("dyvte-").removesuffix(".dist-info")


def test_commands_of_an_installed_package_find_their_configurations(installed: Path, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = (
        "from dyvte.runs.config import config_folder, compose; "
        "print(config_folder()); print(compose('stages').output_dir)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(installed / "dyvte/_conf"), "outputs/stages/llava_shapes/shapes"], (
        done.stderr
    )
    assert config_folder() == ROOT / "conf"  # while a checkout reads its own


# ---------------------------------------------------------------- declared and pinned
def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def imports(folder: str) -> set[str]:
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"analysis", "dyvte"}


def test_every_import_is_declared():
    declared = {canonicalize_name(each.name) for each in requirements(*PROJECT["optional-dependencies"])}
    distributions = packages_distributions()
    for name in imports("dyvte") | imports("analysis"):
        providers = {canonicalize_name(each) for each in distributions.get(name, [name])}
        assert providers & declared, f"{name} is imported but not in pyproject.toml"


def test_every_dependency_is_pinned_to_the_version_in_use():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line) for line in lines), "no local tags, no addresses"
    pinned = {canonicalize_name(name): number for name, number in (line.split("==") for line in lines)}
    seen: set[str] = set()
    todo = requirements("dev", "notebooks")
    while todo:
        each = todo.pop()
        name = canonicalize_name(each.name)
        key = f"{name}{sorted(each.extras)}"
        if key in seen or name.startswith(("nvidia-", "cuda-", "triton")):  # come with torch's GPU builds
            continue
        seen.add(key)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # not for this platform, or an extra that is not installed
        assert name in pinned, f"{name} is not in constraints.txt"
        assert found.version.partition("+")[0] == pinned[name], name
        for line in found.requires or []:
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in (each.extras or {""})):
                todo.append(needed)


def test_the_top_level_is_what_it_should_be():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert {line.partition("/")[0] for line in tracked.stdout.splitlines()} <= FOLDERS | FILES | TOOL_FILES


# ---------------------------------------------------------------- the README
def test_the_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "expected:" in capsys.readouterr().out


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("python -m")]


@pytest.mark.parametrize("line", commands())
def test_the_commands_exist(line: str):
    _, _, module, *overrides = shlex.split(line, comments=True)
    assert find_spec(module), f"there is no {module}"
    assert compose(module.rpartition(".")[2], overrides).output_dir


def test_links_and_make_targets_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert target in rules, target
