"""How often the stage claims err, and how often they find what is there: `python -m docs.tooling.stages.simulation`.

Curves of known shape are given the errors of real data and judged by `analysis.statistics.stages`. The table goes to
`docs/stage_simulation.md`; `tests/test_stage_simulation.py` holds a smaller one to its limits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from analysis.statistics.bands import Array, ImageBootstrap
from analysis.statistics.markdown import markdown_table
from analysis.statistics.segments import stage_contrasts, stage_splits
from analysis.statistics.stages import FOUND, MIN_EFFECT, StageVerdict, recipe_verdict, stage_verdict
from docs.tooling.generated import fill, write_generated

Curve = Callable[[int, np.random.Generator], Array]
DEPTHS = (12, 18, 24, 30, 32)
NUM_IMAGES, PER_IMAGE = 40, 2
SHARED_DEVIATIONS = (0.03, 0.06, 0.12)
"""How far a layer is off its curve for every question alike (log enrichment)."""
N_BOOT = 100
RUNS = 5
RUN_SPREAD = 0.15
"""Standard deviation between runs of one recipe, of the level of the curve (log enrichment)."""
COMMAND = "python -m docs.tooling.stages.simulation"


def unit(num_layers: int) -> Array:
    """Depth from 0 to 1."""
    return np.linspace(0.0, 1.0, num_layers)


def constant(num_layers: int, rng: np.random.Generator) -> Array:
    """No change over the layers."""
    return np.zeros(num_layers)


def monotone(num_layers: int, rng: np.random.Generator) -> Array:
    """A line, an exponential, two levels, or a slope that ends in a plateau; up or down."""
    layer, size = unit(num_layers), rng.choice([-1, 1]) * rng.uniform(0.4, 1.5)
    shapes = (
        layer,
        np.exp(-rng.uniform(2, 12) * layer),
        (np.arange(num_layers) >= rng.integers(2, num_layers - 1)).astype(float),
        np.minimum(layer / rng.uniform(0.2, 0.8), 1.0),
    )
    return np.asarray(size * shapes[rng.integers(len(shapes))])


def parabola(num_layers: int, rng: np.random.Generator) -> Array:
    """Falls and rises, but smoothly: a bend."""
    return np.asarray(rng.uniform(2, 8) * (unit(num_layers) - rng.uniform(0.4, 0.6)) ** 2)


def skewed_u(num_layers: int, rng: np.random.Generator) -> Array:
    """A quick smooth fall and a slow rise without a plateau: a bend."""
    layer = unit(num_layers)
    fall = rng.uniform(0.4, 1.2) * np.exp(-rng.uniform(5, 20) * layer)
    return np.asarray(fall + rng.uniform(0.3, 0.8) * layer ** rng.uniform(1, 3))


def gaussian_process(num_layers: int, rng: np.random.Generator) -> Array:
    """A smooth curve without any plan: squared exponential kernel, 0.2 of the depth long, standard deviation 0.4."""
    layer = unit(num_layers)
    covariance = 0.16 * np.exp(-((layer[:, None] - layer) ** 2) / (2 * 0.2**2))
    return rng.multivariate_normal(np.zeros(num_layers), covariance, method="eigh")


def random_walk(num_layers: int, rng: np.random.Generator) -> Array:
    """Independent steps from layer to layer."""
    return rng.normal(0, 0.25, num_layers).cumsum()


def autoregressive(num_layers: int, rng: np.random.Generator) -> Array:
    """AR(1): each layer resembles the one before (0.8), around one level, standard deviation 0.4."""
    values = [rng.normal(0, 0.4)]
    for _ in range(num_layers - 1):
        values.append(0.8 * values[-1] + rng.normal(0, 0.4 * np.sqrt(1 - 0.8**2)))
    return np.array(values)


def three_stages(num_layers: int, rng: np.random.Generator) -> Array:
    """High, low, high again, each change spread over about a twelfth of the depth."""
    layer = unit(num_layers)

    def step(at: float) -> Array:
        return np.asarray(1 / (1 + np.exp(-np.clip(4 * 12 * (layer - at), -50, 50))))

    fall, rise = rng.uniform(0.4, 1.2), rng.uniform(0.3, 0.8)
    return np.asarray(fall * (1 - step(rng.uniform(0.12, 0.3))) + rise * step(rng.uniform(0.5, 0.75)))


NO_VALLEY: list[Curve] = [constant, monotone]
"""Neither a valley nor stages."""
BENDS: list[Curve] = [parabola, skewed_u]
"""A valley, but no stages."""
WANDERING: list[Curve] = [gaussian_process, random_walk, autoregressive]
"""Curves that may happen to have a valley, and stages: what is false about them is only that a recipe makes them."""
CURVES = [*NO_VALLEY, *BENDS, *WANDERING, three_stages]


def deviate(curve: Array, rng: np.random.Generator) -> Array:
    """A model's own curve: each layer is off the shape, for every question alike."""
    return np.asarray(curve + rng.choice(SHARED_DEVIATIONS) * rng.normal(size=curve.shape))


def has_valley(curve: Array) -> bool:
    """Whether a model's own curve falls and rises by more than the minimum effect at some split."""
    fall, rise, _ = stage_contrasts(curve[None], stage_splits(len(curve)))
    return bool(((fall > MIN_EFFECT) & (rise > MIN_EFFECT)).any())


def samples(curve: Array, rng: np.random.Generator, images: int = NUM_IMAGES) -> tuple[Array, Array]:
    """Enrichment of some questions an image around a model's log curve, with errors of image and question."""
    image = np.repeat(np.arange(images), PER_IMAGE)
    of_image = 0.3 * rng.normal(size=(images, 1)) + 0.15 * rng.normal(size=(images, len(curve)))
    own = 0.3 * rng.normal(size=(len(image), len(curve)))
    return np.exp(curve + of_image[image] + own), image


def judge(curve: Array, rng: np.random.Generator, n_boot: int = N_BOOT) -> StageVerdict:
    """The verdict on data around a curve; visual to visual attention is flat."""
    cross, image = samples(curve, rng)
    return stage_verdict(cross, np.ones_like(cross), ImageBootstrap(image, n_boot, int(rng.integers(2**31))))


@dataclass(frozen=True)
class ModelRates:
    """Shares of simulated models.

    Attributes:
        valley: claim 1 is found.
        false_valley: it is, and the model's own curve, with the deviations that all questions share, has none.
        three_stage: the verdict.
    """

    valley: float
    false_valley: float
    three_stage: float


@dataclass(frozen=True)
class RecipeRates:
    """Shares of simulated groups of five runs for which (a) levels and (b) stages of claim 3 are found."""

    levels: float
    stages: float


def _generator(shape: Curve, num_layers: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, num_layers, CURVES.index(shape)])


def model_rates(shape: Curve, num_layers: int, repeats: int, seed: int = 0, n_boot: int = N_BOOT) -> ModelRates:
    """Claims 1 and 2 over models whose curves have one kind of shape."""
    rng = _generator(shape, num_layers, seed)
    valleys, false, three = [], [], []
    for _ in range(repeats):
        curve = deviate(shape(num_layers, rng), rng)
        verdict = judge(curve, rng, n_boot)
        valleys.append(verdict.claims["valley"] == FOUND)
        false.append(valleys[-1] and not has_valley(curve))
        three.append(verdict.verdict == "three_stage")
    return ModelRates(*(float(np.mean(each)) for each in (valleys, false, three)))


def recipe_rates(shape: Curve, num_layers: int, repeats: int, seed: int = 1, n_boot: int = N_BOOT) -> RecipeRates:
    """Claim 3 over groups of `RUNS` runs.

    What wanders does so anew in every run. Every other recipe draws its shape once; each run's levels are off it by
    `RUN_SPREAD`, smoothly over thirds of the depth.
    """
    rng = _generator(shape, num_layers, seed)
    levels, stages = [], []
    for _ in range(repeats):
        common = shape(num_layers, rng)
        runs = []
        for _ in range(RUNS):
            wobble = np.interp(unit(num_layers), unit(4), rng.normal(0, RUN_SPREAD, 4))
            curve = shape(num_layers, rng) if shape in WANDERING else common + wobble
            runs.append(judge(deviate(curve, rng), rng, n_boot).to_dict())
        found = recipe_verdict(runs)
        levels.append(found.levels == FOUND)
        stages.append(found.stages == FOUND)
    return RecipeRates(float(np.mean(levels)), float(np.mean(stages)))


def main() -> None:
    """Simulate and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=200, help="simulated models a cell")
    parser.add_argument("--recipes", type=int, default=25, help="simulated recipes a cell")
    options = parser.parse_args()
    of_models, of_recipes = [], []
    for shape in tqdm(CURVES, desc="shapes"):
        name = shape.__name__.replace("_", " ")
        models = [model_rates(shape, depth, options.models) for depth in DEPTHS]
        recipes = [recipe_rates(shape, depth, options.recipes) for depth in DEPTHS]
        of_models.append([name, *(_cell(each.false_valley, each.valley, each.three_stage) for each in models)])
        of_recipes.append([name, *(_cell(each.levels, each.stages) for each in recipes)])
    head = ["curve", *(f"{depth} layers" for depth in DEPTHS)]
    values = {
        "of_models": "\n".join(markdown_table(head, of_models)),
        "of_recipes": "\n".join(markdown_table(head, of_recipes)),
        "models": options.models,
        "recipes": options.recipes,
        "runs": RUNS,
        "images": NUM_IMAGES,
        "questions": NUM_IMAGES * PER_IMAGE,
        "low": f"{SHARED_DEVIATIONS[0]:.0%}",
        "high": f"{SHARED_DEVIATIONS[-1]:.0%}",
        "spread": RUN_SPREAD,
    }
    write_generated("docs/stage_simulation.md", fill("stage_simulation", values), COMMAND)


def _cell(*rates: float) -> str:
    return " / ".join(f"{rate:.2f}" for rate in rates)


if __name__ == "__main__":
    main()
