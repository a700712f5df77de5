"""The examples in docstrings run as they are written; every public name has one.

They find `dyvte`, `torch`, `Path`, the shipped model `mllm`, a `sample`, and a `batch` of two questions.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import dyvte
from dyvte.data.shapes import ShapesDataset

if TYPE_CHECKING:
    from dyvte.mllm import MLLM

VALUES = {"__version__", "ROLES"}
"""Public names without a docstring of their own."""


def examples() -> list[doctest.DocTest]:
    """Every docstring of the package with an example."""
    found: dict[str, doctest.DocTest] = {}
    root = Path(dyvte.__file__).parent
    for file in sorted(root.rglob("*.py")):
        if ">>>" in file.read_text():
            name = ".".join(("dyvte", *file.relative_to(root).with_suffix("").parts))
            tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
            found |= {test.name: test for test in tests if test.examples}
    return list(found.values())


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_an_example_gives_what_it_says(example: doctest.DocTest, shapes: MLLM) -> None:
    dataset = ShapesDataset(split="test", limit=2, per_scene=1)
    batch = shapes.encode(images=[each.image for each in dataset], questions=[each.question for each in dataset])
    given = {"dyvte": dyvte, "torch": torch, "Path": Path, "mllm": shapes, "batch": batch, "sample": dataset[0]}
    example.globs |= given
    said: list[str] = []
    with torch.no_grad():
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not said, "".join(said)


def test_every_public_name_has_an_example() -> None:
    bare = [
        name
        for name in dyvte.__all__
        if name not in VALUES and ">>>" not in (inspect.getdoc(getattr(dyvte, name)) or "")
    ]
    assert not bare
