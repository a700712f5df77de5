"""The one registry of methods: a method that is there in part only fails here."""

from __future__ import annotations

import inspect
import pkgutil
import re
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
import torch
from families import FAMILIES, random_batch
from hydra.utils import get_class
from omegaconf import OmegaConf

import dyvte
import dyvte.policies
from docs.tooling.site import deviations
from dyvte.batch import Batch
from dyvte.calibrate import build_policy
from dyvte.data.shapes import ShapesDataset
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.method import Calibration, Need
from dyvte.policies.registry import labels, methods
from dyvte.runs.config import compose

ROOT = Path(__file__).parents[1]
CONFIGS = {file.stem: OmegaConf.load(file) for file in sorted((ROOT / "conf" / "policy").glob("*.yaml"))}


def all_classes() -> dict[str, type[Policy]]:
    """Every policy that a file of `dyvte/policies/` defines."""
    found = {}
    for module in pkgutil.walk_packages(dyvte.policies.__path__, "dyvte.policies."):
        for name, value in inspect.getmembers(import_module(module.name), inspect.isclass):
            if issubclass(value, Policy) and value.__module__ == module.name and not name.startswith("_"):
                found[name] = value
    return found


def methods_in_files() -> list[str]:
    """All but what methods are made of: classes without a name that others are built on."""
    found = all_classes()
    bases = {base for each in found.values() for base in each.__mro__[1:]}
    return [name for name, each in found.items() if each not in bases or vars(each).get("name")]


@pytest.mark.parametrize("name", methods_in_files())
def test_a_method_says_everything_about_itself(name: str) -> None:
    method = all_classes()[name]
    for attribute in ("name", "label", "source"):
        assert attribute in vars(method), f"{name} has no {attribute} of its own"
    assert methods().get(method.name) is method, f"{name} is not exported by dyvte, or its name is taken"
    assert method.name in CONFIGS, f"conf/policy/{method.name}.yaml is missing"
    assert set(method.needs) <= set(get_args(Need))
    source = method.source
    assert re.fullmatch(r"(\d{4}\.\d{5})?", source.paper), source
    assert re.fullmatch(r"([\w.-]+/[\w.-]+)?", source.code), source
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md") if page.stem != "reference")
    rows = [row for row in pages.splitlines() if row.startswith("|") and re.search(rf"`{name}\b", row)]
    assert rows, f"no table of docs/ has {name}"
    assert any(all(need in row for need in method.needs) for row in rows), f"no row of {name} says what it needs"


@pytest.mark.parametrize("name", [name for name, method in methods().items() if method.source.paper])
def test_a_method_says_where_it_is_not_its_papers(name: str) -> None:
    """In its file, and so on docs/deviations.md."""
    said = deviations.differences(methods()[name])
    assert any(not each.startswith("Unverified") for each in said), f"no paragraph of {deviations.KINDS}"


def test_the_page_of_deviations_is_what_the_files_say() -> None:
    assert (ROOT / deviations.PAGE).read_text() == deviations.page(), f"run {deviations.COMMAND}"


def test_labels_tell_methods_apart() -> None:
    assert len(set(labels().values())) == len(methods())
    assert all(labels().values())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_of_the_method_of_its_name(name: str) -> None:
    """Or of a variant, whose name starts with the method's."""
    method = get_class(CONFIGS[name]["_target_"])
    assert name == method.name or name.startswith(f"{method.name}_")
    assert (
        str(CONFIGS[name]._get_node("name")._value()).startswith(name)
        or "dyvte.name_with" in (ROOT / "conf" / "policy" / f"{name}.yaml").read_text()
    )


SHARES = [name for name, method in methods().items() if method.acts == "thins" and method.meets_budgets]


@pytest.mark.parametrize("name", SHARES)
@torch.no_grad()
def test_a_method_that_thins_says_what_its_layers_see(name: str) -> None:
    """The planned shares are what the layers run on."""
    mllm = FAMILIES["llava"](0, num_layers=6)
    batch = random_batch(mllm, torch.Generator().manual_seed(1), (1, 1))
    policy = methods()[name].at_cost(Calibration(mllm, [batch]), 0.8)
    assert policy is not None
    seen: list[torch.Tensor] = []

    class Watch(Policy):
        def before_layer(self, layer: int, prefill: dyvte.Prefill) -> None:
            seen.append((prefill.kept & prefill.layout.visual).sum(1))

    with policy(mllm), Watch()(mllm):
        mllm.model(**batch)
    counts = torch.stack(seen, dim=1) / batch.layout.visual.sum(1, keepdim=True)
    expected = torch.tensor(policy.shares(mllm)).expand_as(counts)
    if name == "autoprune":  # every prompt has a curve of its own; what they share is the mean over layers
        counts, expected = counts.mean(1), expected.to(counts).mean(1)
    torch.testing.assert_close(counts, expected.to(counts), atol=1.5 / 16, rtol=0)


@cache
def shipped() -> tuple[MLLM, Batch]:
    """The model that ships, and two questions."""
    mllm, samples = dyvte.load("llava_shapes", device="cpu"), list(ShapesDataset("test", 2))
    return mllm, mllm.encode([each.image for each in samples], [each.question for each in samples])


@pytest.mark.parametrize("name", CONFIGS)
def test_its_configuration_makes_the_method_with_its_own_defaults_and_it_runs(name: str) -> None:
    """Settings in `conf/policy/` are checked, those of the class to two digits, and fit the model that ships."""
    needed = {"fixed_exit": ["policy.layer=1"], "vtw": ["policy.layer=1"], "skip_attention": ["policy.layers=[1]"]}
    mllm, batch = shipped()
    if name == "fitprune":
        keep = [1.0] * 6 + [0.5] * (mllm.num_layers - 6)
        needed[name] = [f"policy.recipe={{keep: {keep}, alpha: 0.1, budget: 0.8, cost: 0.8, num_samples: 1}}"]
    cfg = compose("evaluate", [f"policy={name}", *needed.get(name, [])])
    policy = build_policy(cfg.policy)
    assert type(policy) is get_class(CONFIGS[name]["_target_"])
    if name in methods() and name not in needed and name != "tome" and "gates" not in policy.needs:
        own = methods()[name]()
        for each in fields(own):
            assert getattr(policy, each.name) == pytest.approx(getattr(own, each.name), abs=0.005), each.name
    with policy(mllm) as run:
        assert all(mllm.generate_ids(batch, max_new_tokens=2))
    if policy.acts == "thins" and name != "dycoke":  # which leaves a still image whole
        assert run.prefill is not None
        assert ((run.prefill.kept & batch.layout.visual).sum(1) < batch.layout.visual.sum(1)).all()
