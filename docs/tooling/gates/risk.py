"""How often a threshold's bound is missed, and how often it is shown: `python -m docs.tooling.gates.risk`.

Questions about images fail in ways that are known, and `dyvte.gates.risk` judges them. The tables go to
`docs/risk_control.md`; `tests/test_risk.py` holds a smaller simulation to its limits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import beta, binom
from tqdm import tqdm

from analysis.statistics.markdown import markdown_table
from docs.tooling.generated import fill, write_generated
from dyvte.gates.metrics import Array
from dyvte.gates.risk import choose_threshold, risk_p_value, too_few_images

COMMAND = "python -m docs.tooling.gates.risk"
ALPHA = 0.05
BOUNDS = (0.01, 0.05, 0.2)
RHO_LOW, RHO_HIGH = 0.1, 0.5
"""Correlation of two questions about one image."""


@dataclass(frozen=True)
class Design:
    """So many images with so many questions each."""

    images: int
    questions: int

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.images} x {self.questions}"


DESIGNS = (Design(650, 3), Design(100, 10), Design(40, 25))
ALONE = Design(1950, 1)
Chances = Callable[[float, tuple[int, int], np.random.Generator], Array]


# ------------------------------------------------------------------------- how questions fail


def independent(risk: float, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Every image has the same risk."""
    return np.full(shape, risk)


def somewhat_together(risk: float, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """The risk of an image is drawn from a beta distribution; correlation 0.1."""
    return _beta(risk, RHO_LOW, shape, rng)


def much_together(risk: float, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """The same with a correlation of 0.5."""
    return _beta(risk, RHO_HIGH, shape, rng)


def whole_images(risk: float, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """All questions about an image fail or none."""
    return (rng.random(shape) < risk).astype(np.float64)


def hard_images(risk: float, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Half of the questions about some images fail, none about the others."""
    return 0.5 * (rng.random(shape) < 2 * risk)


def one_kind(risk: float, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """A fifth of the images, always the same, are of a kind that has all of the risk."""
    return np.where(np.arange(shape[1]) % 5 == 0, 5 * risk, 0.0) * np.ones(shape)


SHAPES: tuple[Chances, ...] = (
    independent, somewhat_together, much_together, whole_images, hard_images, one_kind
)  # fmt: skip


def _beta(risk: float, rho: float, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    size = (1 - rho) / rho
    return rng.beta(risk * size, (1 - risk) * size, shape) if risk else np.zeros(shape)


# ------------------------------------------------------------------------------ three tests


def by_betting(failed: Array, questions: int, bound: float) -> Array:
    """p-values [draws] of `dyvte.gates.risk`, of failures [draws, m]."""
    return risk_p_value(failed, np.full(failed.shape[-1], questions), bound)


def by_hoeffding_bentkus(failed: Array, questions: int, bound: float) -> Array:
    """The same by Hoeffding's and Bentkus' inequalities on the means of images (arXiv 2101.02703, Section 3.1.1)."""
    num_images = failed.shape[-1]
    mean = np.minimum((failed / questions).mean(-1), bound)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(mean > 0, mean * np.log(mean / bound), 0.0)
    divergence = divergence + (1 - mean) * np.log((1 - mean) / (1 - bound))
    bentkus = np.e * binom.cdf(np.ceil(num_images * mean - 1e-9), num_images, bound)
    return np.minimum(np.minimum(np.exp(-num_images * divergence), bentkus), 1.0)


def by_design_effect(failed: Array, questions: int, bound: float) -> Array:
    """The same by the exact binomial limit with the number of questions over an estimated design effect.

    Korn & Graubard, Survey Methodology 24, 1998: what was used here before, and what surveys use.
    """
    num_images = failed.shape[-1]
    rate = failed.mean(-1) / questions
    total = num_images * questions
    alone = rate * (1 - rate) / (total - 1)
    variance = (failed / questions).var(-1, ddof=1) / num_images
    effect = np.divide(variance, alone, out=np.ones_like(rate), where=alone > 0)
    effective = total / np.maximum(effect, 1.0)
    return np.where(rate < 1, beta.sf(bound, rate * effective + 1, np.maximum((1 - rate) * effective, 1e-9)), 1.0)


Test = Callable[[Array, int, float], Array]
TESTS: dict[str, Test] = {
    "betting": by_betting, "Hoeffding-Bentkus": by_hoeffding_bentkus, "design effect": by_design_effect
}  # fmt: skip


def refuted(
    shape: Chances, design: Design, risk: float, bound: float, draws: int, rng: np.random.Generator,
    tests: Sequence[Test] = (by_betting,),
) -> list[float]:  # fmt: skip
    """Share of simulated samples in which each test refutes a risk of `bound`, where the true risk is `risk`."""
    failed = rng.binomial(design.questions, shape(risk, (draws, design.images), rng)).astype(np.float64)
    return [float((test(failed, design.questions, bound) <= ALPHA).mean()) for test in tests]


# ------------------------------------------------------------------------------- thresholds

Curve = Callable[[Array], Array]


def falling(certainty: Array) -> Array:
    """The surer a gate, the less often it is wrong."""
    return (1 - certainty) ** 2


def level(certainty: Array) -> Array:
    """How sure a gate is says nothing."""
    return np.full_like(certainty, 0.4)


def overconfident(certainty: Array) -> Array:
    """The surest are wrong: the risk passes the bound while thresholds are still high, and then stays."""
    return np.where(certainty > 0.7, 0.5, 0.0)


CURVES: tuple[Curve, ...] = (falling, level, overconfident)


@dataclass(frozen=True)
class Missed:
    """Share of the simulated choices whose risk is above the bound, and the mean risk of what was chosen."""

    share: float
    mean_risk: float


def bound_missed(
    shape: Chances, design: Design, bound: float, draws: int, rng: np.random.Generator, curve: Curve = falling
) -> Missed:
    """Choose the threshold of a gate whose risk is known at each, again and again on new questions."""
    fine = np.linspace(0, 1, 10_001)
    wrong = curve(fine)
    risk_above = np.append((wrong[::-1].cumsum()[::-1] / len(fine))[1:], 0.0)  # by threshold
    images = np.repeat(np.arange(design.images), design.questions)
    risks = []
    for _ in range(draws):
        certainty = rng.random(len(images))
        # of an image whose chance of 0.5 is the usual one, as many questions fail as the curve says
        chance = 2 * np.repeat(shape(0.5, (1, design.images), rng)[0], design.questions)
        fails = rng.random(len(images)) < chance * curve(certainty)
        agree = torch.from_numpy(np.stack([~fails, ~fails, np.ones_like(fails)], axis=1))
        probability = torch.from_numpy(certainty)[:, None]
        threshold = choose_threshold(probability, agree, images, bound, 1 - ALPHA).threshold
        risks.append(float(np.interp(threshold, fine, risk_above)))
    return Missed(float((np.array(risks) > bound).mean()), float(np.mean(risks)))


# ----------------------------------------------------------------------------------- the page


def main() -> None:
    """Simulate and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2_000, help="simulated samples a cell")
    parser.add_argument("--choices", type=int, default=40, help="simulated choices of a threshold a cell")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    names = {shape: shape.__name__.replace("_", " ") for shape in SHAPES}

    tests = list(TESTS.values())

    def largest(shape: Chances, design: Design) -> list[float]:
        found = [refuted(shape, design, bound, bound, options.draws, rng, tests) for bound in BOUNDS]
        return [max(of_test) for of_test in zip(*found, strict=True)]

    at_bound = [
        [names[shape], *(_cell(largest(shape, design)) for design in DESIGNS)]
        for shape in tqdm(SHAPES, desc="at the bound")
    ]
    below = [
        [f"{bound:g}", f"{share:g}", names[shape], *(
            _cell(refuted(shape, design, share * bound, bound, options.draws, rng, tests))
            for design in (*DESIGNS, ALONE)
        )]
        for bound in BOUNDS[:2] for share in (0.2, 0.4) for shape in (independent, somewhat_together, whole_images)
    ]  # fmt: skip
    chosen = []
    for curve in tqdm(CURVES, desc="thresholds"):
        for shape in (independent, much_together, whole_images):
            found = [bound_missed(shape, design, 0.1, options.choices, rng, curve) for design in DESIGNS]
            chosen.append([curve.__name__, names[shape], *(_cell([each.share, each.mean_risk]) for each in found)])
    needed = [
        [f"{bound:g}", *(str(lacking.needed if (lacking := too_few_images([0], bound, level)) else 1)
                         for level in (0.9, 0.95, 0.99))]
        for bound in (0.005, 0.01, 0.02, 0.05, 0.1)
    ]  # fmt: skip
    designs = [design.name for design in DESIGNS]
    values = {
        "at_bound": "\n".join(markdown_table(["questions fail", *designs], at_bound)),
        "below": "\n".join(
            markdown_table(["bound", "risk / bound", "questions fail", *designs, ALONE.name], below)
        ),
        "chosen": "\n".join(markdown_table(["gate", "questions fail", *designs], chosen)),
        "needed": "\n".join(markdown_table(["bound", *(f"{level:.0%}" for level in (0.9, 0.95, 0.99))], needed)),
        "shapes": "\n".join(f"- *{names[shape]}*: {(shape.__doc__ or '').strip()}" for shape in SHAPES),
        "curves": "\n".join(f"- *{curve.__name__}*: {(curve.__doc__ or '').strip()}" for curve in CURVES),
        "tests": " / ".join(TESTS),
        "bounds": ", ".join(f"{bound:g}" for bound in BOUNDS),
        "draws": f"{options.draws:,}",
        "choices": options.choices,
        "worst": f"{max(float(cell.split(' / ')[0]) for row in at_bound for cell in row[1:]):.3f}",
    }  # fmt: skip
    write_generated("docs/risk_control.md", fill("risk_control", values), COMMAND)


def _cell(rates: list[float]) -> str:
    return " / ".join(f"{rate:.3f}" for rate in rates)


if __name__ == "__main__":
    main()
