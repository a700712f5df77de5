"""The page of methods that look at the vision tower: its tables are the code's, its example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_policies import batch_of, model

import dyvte
from dyvte.errors import UnsupportedError
from dyvte.instrument.vision_patches import PATCHES
from dyvte.instrument.vision_tower import VisionTower
from dyvte.policies.registry import methods

PAGE = (Path(__file__).parents[1] / "docs" / "methods_vision.md").read_text()
LOOKING = {method.__name__: method for method in methods().values() if "vision tower" in method.needs}


def section(title: str) -> str:
    return PAGE.partition(title)[2].partition("\n## ")[0]


def test_the_tables_are_of_the_methods_that_need_the_tower_and_of_the_towers_that_are_mapped() -> None:
    page = section("# Methods that look at the vision tower")
    listed = re.findall(r"^\| \[`(\w+)`\]\(\.\./(\S+)\)", page, re.MULTILINE)
    assert {name for name, _ in listed} == set(LOOKING)
    for name, path in listed:
        assert LOOKING[name].__module__ == path.removesuffix(".py").replace("/", ".")
    unverified = set(re.findall(r"^\| `(\w+)` \|", section("## What is not the papers'"), re.MULTILINE))
    assert unverified == {name for name, method in LOOKING.items() if method.source.unverified}
    rows = re.findall(r"^\| \S+ \| (`.+`) \| (yes|no) \|", section("## Vision towers"), re.MULTILINE)
    has_class_token = {family: said == "yes" for names, said in rows for family in re.findall(r"`(\w+)`", names)}
    assert has_class_token.keys() == PATCHES.keys()
    for family in has_class_token.keys() & FAMILIES.keys():
        assert VisionTower(model(family)).has_class_token == has_class_token[family]


@pytest.mark.parametrize("name", sorted(LOOKING))
def test_a_tower_that_is_not_mapped_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PATCHES, "gemma3")
    with pytest.raises(UnsupportedError, match="'gemma3' is not mapped"), LOOKING[name]()(model("gemma3")):
        pass


@pytest.mark.parametrize("family", sorted(PATCHES.keys() & FAMILIES.keys()))
@torch.no_grad()
def test_the_example_runs_in_every_family_of_the_table(family: str) -> None:
    code = PAGE.partition("<!-- example -->\n```python\n")[2].partition("```")[0]
    mllm = model(family)
    batch = batch_of(mllm)
    scope: dict[str, Any] = {"mllm": mllm, "batch": batch}
    exec(compile(code, "docs/methods_vision.md", "exec"), scope)
    assert not torch.equal(scope["logits"][0], mllm(**batch).logits[0])
    assert issubclass(scope["UnlikeTheImage"], dyvte.ScorerPolicy)
