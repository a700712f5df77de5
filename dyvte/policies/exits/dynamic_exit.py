"""Visual tokens leave each row at the first layer whose gate says so.

DyVTE, arXiv 2411.19628, Section 4: a gate after every layer looks at the status of the text tokens and removes all
visual tokens once they have given what the answer needs.

Deviations: labels and recipe of the gates that ship are not the paper's, which are `recipe=paper` (docs/gates.md says
what differs and why); a threshold may be chosen on validation data, and exits may be bounded to some layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dyvte.errors import ConfigError, UnsupportedError
from dyvte.gates.features import CHANGE, LENS, QUESTION, at_layer, bases_of
from dyvte.gates.lens import lens_features
from dyvte.gates.metrics import at_exit, first_exit
from dyvte.gates.module import Gates, load_gates
from dyvte.instrument.states import STATUS_PARTS, status_weights, token_status
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.method import Calibration, Source, largest_within

PROBABILITIES = "exit_probabilities"
"""Key of `Prefill.state` under which the gates' answers are kept: {k: [B]}."""
BASES = "status_before"
"""Key of `Prefill.state` under which the status after the layer before lies, part by part."""
TEXT_LAST = "text_last"
"""The status part that the lens is read from."""


@dataclass
class DynamicExit(Policy):
    """Leave out a row's visual tokens from the first layer on whose gate says exit.

    Rows of a batch leave at their own layers; `PolicyRun.exit_layers` holds them, and `exit_probabilities(run)` what
    the gates said. What generated tokens attend to follows: they see the visual keys of layers before the exit only.

    Attributes:
        gates: trained gates, a folder of them, a Hub id, or the name of a shipped model.
        threshold: exit where a gate's exit probability is above it; one number or one a gate. "auto" takes what
            training chose on validation data and stored with the gates.
        min_layer: no exit layer k below this one; 1 at the least, as the first gate follows the first layer.
        max_layer: rows still there leave at this exit layer at the latest. None lets them stay to the end (k = L).
        thresholds: the threshold of every gate.

    Example:
        >>> with dyvte.DynamicExit("llava_shapes")(mllm) as run:
        ...     answers = mllm.generate(batch)
        >>> run.exit_layers.shape
        torch.Size([2])
    """

    name = "dynamic_exit"
    label = "dynamic exit"
    source = Source("2411.19628", "DoubtedSteam/DyVTE")
    needs = ("gates",)
    acts = "exits"

    gates: Gates | str | Path
    threshold: float | Sequence[float] | Literal["auto"] = "auto"
    min_layer: int = 1
    max_layer: int | None = None
    thresholds: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.gates = load_gates(self.gates)
        if isinstance(self.threshold, str) and self.threshold != "auto":
            raise ValueError(f'DynamicExit: threshold must be a number, one a gate, or "auto", got {self.threshold!r}')
        self.thresholds = self.gates.thresholds(None if isinstance(self.threshold, str) else self.threshold)
        if QUESTION in self.gates.status:
            raise UnsupportedError("gates that look at the question alone are a control; they cannot run in a policy")

    def check(self, mllm: MLLM) -> None:
        """Refuse gates for another model, and exit layers outside 1..L; move the gates to the model's device."""
        assert isinstance(self.gates, Gates)
        self.gates.check(mllm)
        last = mllm.num_layers if self.max_layer is None else self.max_layer
        if not 1 <= self.min_layer <= last <= mllm.num_layers:
            raise ValueError(
                f"DynamicExit: need 1 <= min_layer <= max_layer <= {mllm.num_layers} for this model, "
                f"got {self.min_layer} and {self.max_layer}"
            )
        self.gates.to(mllm.device)

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """One threshold for all gates, chosen for the mean cost over the prompts."""
        threshold = threshold_at_cost(calibration, budget)
        return None if threshold is None else cls(_gates_of(calibration), threshold)

    @classmethod
    def published(cls, calibration: Calibration) -> Policy | None:
        """The threshold that training stored."""
        return cls(_gates_of(calibration))

    @torch.no_grad()
    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Ask the gate after the layer before this one, and drop the visual tokens of the rows that it lets go.

        The host waits for what gates say where a row may leave: not where no row sees its image any longer, nor where
        the threshold decides alone.
        """
        assert isinstance(self.gates, Gates)
        if layer == 0 or not prefill.sees_image:
            return
        if layer == self.max_layer:
            prefill.drop_image()
            return
        if layer < self.min_layer and not self._remembers:
            return
        said = prefill.state.setdefault(PROBABILITIES, {})
        probability = self.gates.exit_probability(self._status(prefill), layer - 1, said.get(layer - 1))
        said[layer] = probability
        threshold = self.thresholds[layer - 1]
        if layer < self.min_layer or threshold >= 1:  # no row may leave, so the host need not wait
            return
        prefill.drop_image(None if threshold < 0 else probability > threshold)

    @property
    def _remembers(self) -> bool:
        """Whether what a gate says depends on the layers before its own."""
        assert isinstance(self.gates, Gates)
        return self.gates.cumulative or any(part.endswith(CHANGE) for part in self.gates.status)

    def _status(self, prefill: Prefill) -> Tensor:
        """What the gates look at, [B, I] on their device."""
        assert isinstance(self.gates, Gates)
        parts, state = bases_of(self.gates.status), prefill.state
        read = [part for part in STATUS_PARTS if part in parts or (part == TEXT_LAST and LENS in parts)]
        hidden, size = prefill.hidden, prefill.mllm.hidden_size
        hidden = hidden if hidden.shape[-1] == size else hidden[..., :size]  # of several streams the first
        key = "status weights", self.gates.status
        if (weights := state.get(key)) is None:
            weights = state[key] = status_weights(prefill.layout, read).to(hidden.device, hidden.dtype)
        status = token_status(hidden, weights.to(hidden.device))
        if tuple(read) == self.gates.status:
            return status.to(self.gates.inner.device)
        pieces = status.chunk(len(read), dim=-1)
        now = dict(zip(read, pieces, strict=True))
        if LENS in parts:
            now[LENS] = lens_features(prefill.mllm, now[TEXT_LAST]).to(hidden.dtype)
        before, state[BASES] = state.get(BASES), now
        return at_layer(self.gates.status, now, before).to(self.gates.inner.device)


def exit_probabilities(run: PolicyRun) -> dict[int, Tensor]:
    """Exit probability [B] of every gate that was asked in the last prefill, by the exit layer k it decides on.

    What a gate says about a row that left before it has no meaning.

    Example:
        >>> with dyvte.DynamicExit("llava_shapes")(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> {layer: probability.shape[0] for layer, probability in dyvte.exit_probabilities(run).items()}[1]
        2
    """
    return {} if run.prefill is None else dict(run.prefill.state.get(PROBABILITIES, {}))


def _gates_of(calibration: Calibration) -> Gates:
    if calibration.gates is None:
        raise ConfigError("dynamic exit needs gates: give them with gates=FOLDER")
    return calibration.gates


def threshold_at_cost(calibration: Calibration, budget: float, before: Policy | None = None) -> float | None:
    """The largest threshold within the budget, if any: what gates say does not depend on it, so one pass is enough.

    Where a policy thins `before`, the gates decide from the layer after its own on.
    """
    gates, mllm = _gates_of(calibration), calibration.mllm
    shares = [1.0] * mllm.num_layers if before is None else before.shares(mllm)
    first = 1 if before is None else int(before.layer) + 1  # type: ignore[attr-defined]
    never = DynamicExit(gates, threshold=2.0, min_layer=first)
    said = []
    for batch in calibration.batches:
        with ExitStack() as stack, torch.no_grad():
            for each in ([] if before is None else [before]) + [never]:
                run = stack.enter_context(each(mllm))
            mllm.model(**batch, logits_to_keep=1)
            found = exit_probabilities(run)
        nothing = torch.zeros(len(batch["input_ids"]))
        said.append(torch.stack([found.get(k, nothing).cpu() for k in range(1, mllm.num_layers)], dim=1))
    probability, costs = torch.cat(said), calibration.exit_costs(shares)

    def cost(threshold: float) -> float:
        exits = first_exit(probability, [threshold] * len(gates), first)
        return float(at_exit(costs, exits).mean())

    return largest_within(cost, budget, low=-1e-6, high=1.0)
