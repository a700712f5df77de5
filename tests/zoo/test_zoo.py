"""Every image-text-to-text architecture of transformers has the verdict that `verdicts.py` says, on a small model.

`pytest tests/zoo` runs the quick checks, `make zoo` all of them.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace

import pytest
import torch
import transformers

import dyvte
from dyvte.errors import DyvteError, DyvteWarning
from tests.zoo.checks import CAUSES, CHECKS, QUICK, TOLERANCE, Subject, outcome
from tests.zoo.specimens import NAMES, build_model, random_rows
from tests.zoo.verdicts import BROKEN, NOT_EXAMINED, VARIANTS, VERDICTS, Verdict

CHOSEN = CAUSES | (CHECKS if os.environ.get("DYVTE_ZOO") == "all" else {name: CHECKS[name] for name in QUICK})


def test_every_architecture_of_transformers_has_a_verdict() -> None:
    assert sorted(VERDICTS) == sorted(set(NAMES) - set(NOT_EXAMINED))


@pytest.mark.parametrize("name", [*VERDICTS, *VARIANTS])
def test_verdict(name: str) -> None:
    verdict = {**VERDICTS, **VARIANTS}[name]
    architecture = verdict.architecture or name
    if architecture in BROKEN.get(transformers.__version__, ()):
        pytest.skip(f"{architecture} of transformers {transformers.__version__} does not run by itself")
    model = build_model(architecture, **verdict.changes)
    if verdict.refused:
        with pytest.raises(DyvteError, match=re.escape(verdict.refused)) as refusal:
            dyvte.wrap(model)
        assert "\n" not in str(refusal.value)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mllm = dyvte.wrap(model)
    told = [str(each.message) for each in caught if issubclass(each.category, DyvteWarning)]
    refused = verdict.fails.keys() & CHECKS.keys()
    assert bool(told) == bool(refused)  # who loads a model is told what it will refuse, before anything runs
    for line in told:
        assert "\n" not in line
        assert "AttentionProbe works" in line
        assert all(verdict.fails[check] in line for check in refused)
    examine(Subject(mllm), verdict)


def examine(subject: Subject, verdict: Verdict) -> None:
    for check, run in CHOSEN.items():
        found = outcome(run, subject)
        if check not in verdict.fails:
            assert isinstance(found, float), f"{check}: {found}"
            assert found < TOLERANCE, check
        elif reason := verdict.fails[check]:
            assert isinstance(found, str), f"{check} works now: say so in verdicts.py"
            assert reason in found, check
        else:
            assert isinstance(found, float), f"{check}: {found}"
            assert found >= TOLERANCE, f"{check} works now: say so in verdicts.py"


@torch.no_grad()
def test_a_prefix_is_shared_only_where_positions_do_not_count_other_rows() -> None:
    """HunYuan-VL numbers the images of a batch: two questions on one image have prefixes of their own there."""
    subject = Subject(dyvte.wrap(build_model("hunyuan_vl")))
    first = random_rows(1)[0]
    batch = subject.batch_of([first, replace(first, after=first.after[::-1])])
    apart = dyvte.exit_sweep(subject.mllm, batch).logits
    together = dyvte.exit_sweep(subject.mllm, batch, shared_image=[0, 0]).logits
    torch.testing.assert_close(together, apart, atol=TOLERANCE, rtol=0)
