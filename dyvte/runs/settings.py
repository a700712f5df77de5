"""What values a setting may have, by its name: the same name means the same in every configuration of `conf/`.

Commands check their configuration before they load anything. What depends on the model or the data, such as the number
of layers, is checked where it is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dyvte.errors import ConfigError

DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu|meta)(:\d+)?")


@dataclass(frozen=True)
class Rule:
    """What one setting may be.

    Attributes:
        kind: `bool`, `int` (a whole number), `float` (any number) or `str`.
        low, high: the least and the largest number.
        above, below: numbers that it must lie between, themselves excluded.
        words: texts that it may be (for `str` the only ones).
        null: whether it may be left open.
        many: whether it is a list of such values.
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    words: tuple[str, ...] = ()
    null: bool = False
    many: bool = False

    def allows(self, value: Any) -> bool:
        """Whether a setting may have this value."""
        if value is None:
            return self.null
        if self.many:
            return isinstance(value, list) and bool(value) and all(self._fits(each) for each in value)
        return self._fits(value)

    def _fits(self, value: Any) -> bool:
        if isinstance(value, str) and (value in self.words or (self.kind is str and not self.words)):
            return True
        if isinstance(value, bool) or self.kind in (bool, str):
            return isinstance(value, bool) and self.kind is bool
        if not isinstance(value, (int, float)) or (self.kind is int and not isinstance(value, int)):
            return value is None and self.many and self.null
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        said = names[self.kind] if self.kind is not str or not self.words else ""
        limits = [(self.low, "of at least"), (self.high, "of at most"), (self.above, "above"), (self.below, "below")]
        bounds = " and ".join(f"{word} {limit:g}" for limit, word in limits if math.isfinite(limit))
        options = [" ".join(part for part in (said, bounds) if part), *self.words, *["null"] * self.null]
        options = [each for each in options if each]
        return ("a list, each " if self.many else "") + " or ".join(options)


FLAG = Rule(bool)
COUNT = Rule(int, low=1)
INDEX = Rule(int, low=0)
SHARE = Rule(float, above=0, high=1)
INSIDE = Rule(float, above=0, below=1)
POSITIVE = Rule(float, above=0)
NOT_NEGATIVE = Rule(float, low=0)
TEXT = Rule(str)


def _choice(*words: str, null: bool = False) -> Rule:
    return Rule(str, words=words, null=null)


RULES: dict[str, Rule] = {
    # every command
    "seed": Rule(int, low=0, high=2**32 - 1),
    "batch_size": COUNT,
    "limit": Rule(int, low=1, null=True),
    "max_new_tokens": COUNT,
    "bootstrap": COUNT,
    "permutations": COUNT,
    "dtype": _choice("auto", "float16", "bfloat16", "float32", "float64", null=True),
    **dict.fromkeys(("overwrite", "any_version", "debug", "verbose", "trust_remote_code", "allow_outside"), FLAG),
    # data
    "per_scene": COUNT,
    "turns": _choice("first", "single", "all"),
    "paraphrases": _choice("known", "held_out", "all"),
    "question_suffix": TEXT,
    **dict.fromkeys(("matched", "require_image"), FLAG),
    **dict.fromkeys(("file", "image_folder", "split", "subset"), Rule(str, null=True)),
    # policies
    "layer": Rule(int, low=0, null=True),
    "layers": Rule(int, low=0, many=True, null=True),
    "keep": Rule(float, above=0, null=True),  # a share; for some methods a number of tokens, or as the image says
    "threshold": Rule(float, low=0, high=1, words=("auto",)),
    "min_layer": INDEX,
    "max_layer": Rule(int, low=0, null=True),
    "block": COUNT,
    "merges": INDEX,
    "policy.stages": COUNT,
    "stratified": FLAG,
    "eta": NOT_NEGATIVE,
    "start": INDEX,
    "budget": SHARE,
    # experiments
    "etas": Rule(float, low=0, many=True),
    "kl_start": INDEX,
    "branch_tokens": Rule(int, low=0, null=True),
    "count": INDEX,
    "query": _choice("last", "instruction"),
    "maps.query": _choice("last", "instruction", "answer"),
    "sinks": _choice("mark", "leave_out"),
    **dict.fromkeys(("contributions", "heads"), FLAG),
    "budgets": Rule(float, above=0, high=1, null=True, many=True),
    "random_seeds": COUNT,
    "counted": _choice("flops", "tokens"),
    "equivalence": NOT_NEGATIVE,
    "published_tokens": Rule(int, low=1, null=True),
    "tolerance": NOT_NEGATIVE,
    "batch_sizes": Rule(int, low=1, many=True),
    "new_tokens": COUNT,
    "repeats": COUNT,
    **dict.fromkeys(("by_kind", "train_on_kinds", "ground_truth", "random_decoder", "bias", "standardize"), FLAG),
    # training of gates
    "train_samples": Rule(int, low=1, null=True),
    "validation_share": INSIDE,
    "rule": _choice("paper", "release", "stable", "agree"),
    "ratio": POSITIVE,
    "eps": NOT_NEGATIVE,
    "width": Rule(int, low=1, null=True),
    "bound": INSIDE,
    "confidence": INSIDE,
    "caution": NOT_NEGATIVE,
    "epochs": COUNT,
    "members": COUNT,
    "patience": INDEX,
    "layers_per_sample": Rule(int, low=1, null=True),
    **dict.fromkeys(("disagreement_price", "exit_weight", "label_share"), NOT_NEGATIVE),
    "lr": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "warmup": Rule(float, low=0, below=1),
    # the explorer
    "host": TEXT,
    "port": Rule(int, low=0, high=65535),
    "open_browser": FLAG,
    "queue": COUNT,
    "examples": COUNT,
    "keep_minutes": POSITIVE,
    "upload.max_mib": POSITIVE,
    "upload.max_pixels": COUNT,
    # conversion
    "shard_gigabytes": POSITIVE,
}
"""By the last part of a setting's name, or the last two."""

_CHECKED_GROUPS = frozenset(
    ("data", "policy", "calibration", "recipe", "maps", "samples", "labels", "model", "cost", "experiment", "upload")
)
"""Groups whose settings are checked; others (the testbeds' phases, pictures) use some of the names for other things."""


def check_settings(cfg: DictConfig) -> None:
    """Check every setting of a composed configuration that has a rule.

    Raises:
        ConfigError: the first one that is not allowed, with what would be.

    Example:
        >>> check_settings(OmegaConf.create({"batch_size": 1.5}))
        Traceback (most recent call last):
        dyvte.errors.ConfigError: batch_size=1.5: give a whole number of at least 1
    """
    try:
        content: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {' '.join(str(error).split())}") from error
    device = content.get("device")
    if device is not None and not (isinstance(device, str) and DEVICE.fullmatch(device)):
        raise ConfigError(f"device={device}: give auto, cpu, cuda, cuda:1 or mps")
    for path, value in leaves(content):
        rule = RULES.get(".".join(path[-2:]), RULES.get(path[-1]))
        if rule is None or (len(path) > 1 and path[0] not in _CHECKED_GROUPS) or "columns" in path:
            continue
        if not rule.allows(value):
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            raise ConfigError(f"{'.'.join(path)}={shown}: give {rule}")


def leaves(content: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every setting of a plain configuration, with the keys that lead to it."""
    for key, value in content.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            yield from leaves(value, here)
            continue
        if isinstance(value, list):  # the policies of a composition
            for number, each in enumerate(value):
                if isinstance(each, Mapping):
                    yield from leaves(each, (*here, str(number)))
        yield here, value
