"""The testbed's world: scenes of two to six objects on a textured background, and their rendering.

A scene is drawn on a square canvas divided into ``GRID`` x ``GRID`` cells. Every object lies in a cell of its own,
moved, rotated and tinted a little, so that "the object left of X" has one meaning (the neighbouring cell) while no two
images are alike. Everything is a pure function of a seed: scene ``i`` of a split is the same on every machine.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dyvte.errors import ConfigError

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.14, 0.16),
    "green": (0.16, 0.66, 0.22),
    "blue": (0.14, 0.28, 0.88),
    "yellow": (0.95, 0.85, 0.12),
    "purple": (0.58, 0.16, 0.72),
    "cyan": (0.12, 0.80, 0.86),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
SIZES: tuple[str, ...] = ("small", "large")
ATTRIBUTES: tuple[str, ...] = ("color", "shape", "size")
VALUES: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "shape": SHAPES, "size": SIZES}
ROWS: tuple[str, ...] = ("top", "middle", "bottom")
COLUMNS: tuple[str, ...] = ("left", "center", "right")
GRID = 3
CELL = 32
IMAGE_SIZE = GRID * CELL
MIN_OBJECTS, MAX_OBJECTS = 2, 6

RADIUS = {"small": (5.0, 6.5), "large": (9.5, 12.0)}

# Scenes of different splits, and of captions and questions, never share a seed: the split is part of it.
SPLITS: dict[str, int] = {"train": 0, "validation": 1, "test": 2, "caption": 3, "text": 4, "vision": 5, "probe": 6}


@dataclass(frozen=True)
class Object:
    """One object: its attributes, its cell, and how it is drawn (pixels, radians, RGB in 0..1)."""

    color: str
    shape: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]

    def __getitem__(self, attribute: str) -> str:
        if attribute not in ATTRIBUTES:
            raise KeyError(f"an object has no attribute {attribute!r}; choose one of {ATTRIBUTES}")
        return getattr(self, attribute)

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column."""
        return self.row, self.column

    @property
    def place(self) -> str:
        """The cell in two words."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """Objects in random order, and the seed of the background."""

    split: str
    seed: int
    index: int
    objects: tuple[Object, ...]

    @property
    def image_id(self) -> str:
        """Name of the scene, unique over splits and seeds."""
        return f"{self.split}-{self.seed}-{self.index:07d}"

    def at(self, row: int, column: int) -> Object | None:
        """The object in a cell, if any."""
        return next((o for o in self.objects if o.cell == (row, column)), None)


def scene_generator(split: str, seed: int, index: int, purpose: int = 0) -> np.random.Generator:
    """The random generator of one scene; ``purpose`` separates the scene's own draws from its questions'."""
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; choose one of {sorted(SPLITS)}")
    return np.random.default_rng([SPLITS[split], seed, index, purpose])


def sample_scene(
    split: str, seed: int, index: int, min_objects: int = MIN_OBJECTS, max_objects: int = MAX_OBJECTS
) -> Scene:
    """Draw scene ``index`` of a split.

    Colours and shapes come from a random subset each, so that scenes with repeated attributes (which counting and
    "the other object of the same colour" need) are as common as scenes without.
    """
    if not MIN_OBJECTS <= min_objects <= max_objects <= MAX_OBJECTS:
        raise ValueError(
            f"a scene holds {MIN_OBJECTS} to {MAX_OBJECTS} objects, asked for {min_objects} to {max_objects}"
        )
    rng = scene_generator(split, seed, index)
    number = int(rng.integers(min_objects, max_objects + 1))
    cells = rng.permutation(GRID * GRID)[:number]
    colors = rng.permutation(list(COLORS))[: int(rng.integers(2, len(COLORS) + 1))]
    shapes = rng.permutation(list(SHAPES))[: int(rng.integers(2, len(SHAPES) + 1))]
    objects = []
    for cell in cells:
        color, shape, size = str(rng.choice(colors)), str(rng.choice(shapes)), SIZES[int(rng.integers(2))]
        row, column = divmod(int(cell), GRID)
        radius = float(rng.uniform(*RADIUS[size]))
        slack = CELL / 2 - radius - 1.0
        dx, dy = rng.uniform(-slack, slack, 2)
        rgb = tuple(float(c) for c in np.clip(np.array(COLORS[color]) + rng.normal(0, 0.04, 3), 0, 1))
        objects.append(
            Object(
                color,
                shape,
                size,
                row,
                column,
                x=(column + 0.5) * CELL + float(dx),
                y=(row + 0.5) * CELL + float(dy),
                radius=radius,
                angle=float(rng.uniform(-0.25, 0.25)),
                rgb=rgb,  # type: ignore[arg-type]
            )
        )
    return Scene(split, seed, index, tuple(objects))


def scene_of(image_id: str) -> Scene | None:
    """The scene that an `image_id` of the built-in tasks names, None for the images of others.

    Example:
        >>> scene_of(sample_scene("test", 0, 12).image_id).index
        12
    """
    found = re.fullmatch(rf"({'|'.join(SPLITS)})-(\d+)-(\d{{7,}})", image_id)
    return sample_scene(found[1], int(found[2]), int(found[3])) if found else None


def scene_stream(split: str, seed: int, purpose: int) -> Iterator[tuple[Scene, np.random.Generator]]:
    """Scene after scene of a split without end, each with the generator of its questions."""
    for index in itertools.count():
        yield sample_scene(split, seed, index), scene_generator(split, seed, index, purpose)


def signed_distance(shape: str, x: NDArray[np.float64], y: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Distance in pixels from the outline of a shape centred at the origin, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.84 * radius
    if shape == "triangle":
        half = 0.62 * radius
        return np.maximum.reduce([y - half, 0.866 * x - 0.5 * y - half, -0.866 * x - 0.5 * y - half])
    if shape == "cross":
        arm = radius / 3.0
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - radius, short - arm)
    raise ValueError(f"unknown shape {shape!r}; choose one of {SHAPES}")


def _coverage(item: Object) -> tuple[slice, slice, NDArray[np.float64]]:
    """Window (rows, columns) around an object and its anti-aliased coverage there, 0..1."""
    reach = int(np.ceil(item.radius)) + 2
    top, left = max(int(item.y) - reach, 0), max(int(item.x) - reach, 0)
    bottom, right = min(int(item.y) + reach + 1, IMAGE_SIZE), min(int(item.x) + reach + 1, IMAGE_SIZE)
    y, x = np.mgrid[top:bottom, left:right] + 0.5
    x, y = x - item.x, y - item.y
    cos, sin = np.cos(item.angle), np.sin(item.angle)
    distance = signed_distance(item.shape, cos * x + sin * y, cos * y - sin * x, item.radius)
    return slice(top, bottom), slice(left, right), np.clip(0.5 - distance, 0.0, 1.0)


def _background(rng: np.random.Generator) -> NDArray[np.float64]:
    """A grey gradient with stripes and pale grey blobs: textures that are nobody's attribute."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / IMAGE_SIZE
    angle, base = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.75)
    across = np.cos(angle) * x + np.sin(angle) * y
    grey = base + rng.uniform(-0.12, 0.12) * across
    grey = grey + rng.uniform(0, 0.04) * np.sin(2 * np.pi * rng.uniform(3, 10) * across + rng.uniform(0, 2 * np.pi))
    for _ in range(int(rng.integers(0, 4))):
        cx, cy, spread = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.02, 0.08)
        grey = grey + rng.uniform(-0.08, 0.08) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * spread**2))
    tint = rng.normal(0, 0.015, 3)
    return grey[..., None] + tint


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene: uint8 RGB of shape [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    rng = scene_generator(scene.split, scene.seed, scene.index, purpose=1)
    image = _background(rng)
    for item in scene.objects:
        rows, columns, alpha = _coverage(item)
        alpha = alpha[..., None]
        image[rows, columns] = (1 - alpha) * image[rows, columns] + alpha * np.array(item.rgb)
    image += rng.normal(0, 0.02, (IMAGE_SIZE, IMAGE_SIZE, 1)) + rng.normal(0, 0.01, image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def patch_labels(scene: Scene, patch_size: int, threshold: float = 0.12) -> dict[str, NDArray[np.int64]]:
    """Per-patch attribute indices of the object that covers most of each patch, for the vision tower's pretraining.

    Returns for each attribute an array of shape [(IMAGE_SIZE / patch_size) ** 2] in row-major order: 0 where no object
    covers at least ``threshold`` of the patch, else 1 + the value's index in ``VALUES``. Under "row" and "column", the
    patch's own place in the grid of patches (a tower that is not asked for it forgets where a patch lies).
    """
    side = IMAGE_SIZE // patch_size
    best = np.full((side, side), threshold)
    labels = {a: np.zeros((side, side), dtype=np.int64) for a in ATTRIBUTES}
    for item in scene.objects:
        rows, columns, alpha = _coverage(item)
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
        canvas[rows, columns] = alpha
        cover = canvas.reshape(side, patch_size, side, patch_size).mean(axis=(1, 3))
        wins = cover > best
        best[wins] = cover[wins]
        for attribute in ATTRIBUTES:
            labels[attribute][wins] = 1 + VALUES[attribute].index(item[attribute])
    labels["row"], labels["column"] = np.mgrid[0:side, 0:side]
    return {a: v.reshape(-1) for a, v in labels.items()}
