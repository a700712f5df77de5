"""What is installed works anywhere, is declared, and is what the README says."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dyvte import cli
from dyvte.runs.config import compose, config_folder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
FOLDERS = {"analysis", "benchmarks", "dyvte", "conf", "notebooks", "outputs", "tests", "docs", ".ci"}
FILES = {
    "pyproject.toml",
    "Makefile",
    "mkdocs.yml",
    "README.md",
    "LICENSE",
    "CITATION.cff",
    "CHANGELOG.md",
    "constraints.txt",
}
TOOL_FILES = {".gitignore", ".pre-commit-config.yaml"}


def build(kind: str, root: Path, into: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(into)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (built,) = into.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    built = build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))
    assert built.stat().st_size < 50e6  # what ships of the testbeds: at most 20 MB and 30 MB
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory) -> Path:
    """An empty environment with the wheel in it; other packages are those that the tests run with."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def installed(environment: Path) -> Path:
    """Where the wheel's files are."""
    (site,) = environment.glob("lib/python*/site-packages")
    return site


def test_configurations_and_weights_travel_in_the_wheel(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "dyvte", "analysis", "conf"], cwd=ROOT, capture_output=True, text=True)
    moved = {"analysis": "dyvte/analysis", "conf": "dyvte/_conf", "dyvte": "dyvte"}
    for file in filter(lambda file: (ROOT / file).is_file(), tracked.stdout.splitlines()):
        top, _, rest = file.partition("/")
        assert f"{moved[top]}/{rest}" in names, file
    assert {name.partition("/")[0] for name in names} == {"dyvte"}  # no analysis, conf, tests or benchmarks of ours


def test_the_wheel_can_be_built_from_the_sdist(wheel: Path, tmp_path: Path):
    with tarfile.open(build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("dyvte-*")
    assert {path.name for path in source.iterdir()} >= {"tests", "README.md", "LICENSE", "pyproject.toml"}
    again = build("wheel", source, tmp_path / "again")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_the_main_job_runs_where_it_is_installed(environment: Path, tmp_path: Path):
    """From a folder with an `analysis/` of its own, as a sweep of two jobs."""
    (tmp_path / "analysis").mkdir()
    for file in ("__init__.py", "stages.py"):
        (tmp_path / "analysis" / file).write_text("raise SystemExit('somebody else')")
    job = [
        "stages",
        "--multirun",
        "data.limit=2,3",
        "output_dir=out/${data.limit}",
        "bootstrap=20",
        "data.kinds=[count]",
    ]
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(environment / "bin" / "dyvte"), *job, "maps.count=1"],
        cwd=tmp_path,
        env={**variables, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for limit in (2, 3):
        summary = json.loads((tmp_path / f"out/{limit}/summary.json").read_text())
        assert summary["num_samples"] == limit
        assert list((tmp_path / f"out/{limit}/figures").glob("*.png"))
        overrides = (tmp_path / f"out/{limit}/overrides.yaml").read_text()
        assert f"- data.limit={limit}\n" in overrides


def test_commands_of_an_installed_package_find_their_configurations(environment: Path, installed: Path, tmp_path: Path):
    code = (
        "from dyvte.runs.config import config_folder, compose; "
        "print(config_folder()); print(compose('stages').output_dir)"
    )
    command = [str(environment / "bin" / "python"), "-c", code]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(installed / "dyvte/_conf"), "outputs/stages/llava_shapes/shapes"], (
        done.stderr
    )
    assert config_folder() == ROOT / "conf"  # while a checkout reads its own


def test_every_command_exists_and_is_listed():
    listed = cli.usage()
    cli.make_experiments_importable()
    for name, (module, what) in cli.COMMANDS.items():
        assert f"{name} " in listed
        assert what in listed
        assert find_spec(module), module


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
