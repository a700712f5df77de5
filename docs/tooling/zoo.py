"""The table of every image-text-to-text architecture of transformers: what dyvte does with a small random model."""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

import dyvte
from dyvte.errors import DyvteError
from tests.zoo.checks import CAUSES, CHECKS, TOLERANCE, Subject, outcome
from tests.zoo.specimens import build_model
from tests.zoo.verdicts import VARIANTS, VERDICTS, Verdict


@dataclass(frozen=True)
class Finding:
    """What came out for one architecture.

    Attributes:
        verdict: "works", "in part" or "refused".
        largest: difference over the checks that ran to their end; None without one.
        knockout: difference of the knock-out; None where it is refused.
        reason: of what is refused or does not agree.
    """

    verdict: str
    largest: float | None
    knockout: float | None
    reason: str


def examine(name: str, expected: Verdict) -> Finding:
    """Build an architecture in small and run every check on it."""
    model = build_model(expected.architecture or name, **expected.changes)
    try:
        mllm = dyvte.wrap(model)
    except DyvteError as refusal:
        return Finding("refused", None, None, str(refusal))
    subject = Subject(mllm)
    found = {check: outcome(run, subject) for check, run in CHECKS.items()}
    knockout = {check: outcome(run, subject) for check, run in CAUSES.items()}["knock-out"]
    numbers = {check: each for check, each in found.items() if isinstance(each, float)}
    good = {check: each for check, each in numbers.items() if each < TOLERANCE}
    wrong = {check: f"differs by {each:.0e}" for check, each in numbers.items() if check not in good}
    wrong |= {check: each for check, each in found.items() if isinstance(each, str)}
    by_reason: dict[str, list[str]] = {}
    for check, reason in wrong.items():
        by_reason.setdefault(reason.partition(": ")[2] or reason, []).append(check)
    reasons = "; ".join(f"{', '.join(checks)}: {reason}" for reason, checks in by_reason.items())
    verdict = "refused" if not good else "in part" if wrong else "works"
    cut = knockout if isinstance(knockout, float) else None
    if verdict == "works" and isinstance(knockout, str):
        reasons = knockout.partition(": ")[2]
    return Finding(verdict, max(good.values(), default=None), cut, reasons)


def tables() -> dict[str, str]:
    """Rows of the page's tables of architectures and of variants, and how many architectures work."""
    found = {
        name: examine(name, verdict)
        for name, verdict in tqdm((VERDICTS | VARIANTS).items(), desc="architectures", dynamic_ncols=True)
    }
    works = sum(found[name].verdict == "works" for name in VERDICTS)
    return {
        "architectures": "\n".join(_row(name, found[name]) for name in VERDICTS),
        "variants": "\n".join(_row(name, found[name]) for name in VARIANTS),
        "count": f"{works} of {len(VERDICTS)}",
    }


def _row(name: str, finding: Finding) -> str:
    largest, cut = ("-" if each is None else f"{each:.0e}" for each in (finding.largest, finding.knockout))
    reason = finding.reason.replace("|", "\\|").replace("\n", " ")
    return f"| {name} | {finding.verdict} | {largest} | {cut} | {reason} |"
