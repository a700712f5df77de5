"""Statuses that say less than they seem to: of runs that never saw the image, lost it early, or saw another one.

A gate that was only shown statuses of the full model can let the image go wherever a question of that kind does well,
and does so all the more if the status holds nothing of the image. Trained on these runs too, it has to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyvte.errors import ConfigError

if TYPE_CHECKING:
    from dyvte.gates.labels import LabelSet

COUNTERFACTUALS = ("withheld", "swapped", "partial")
"""withheld: the image was never seen; swapped: another one was; both are labelled "stay" throughout. partial: the image
left after some layers, and gates behind them are labelled as that exit is: "stay" where it changes the answer."""
PARTIAL_DEPTHS = (1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
"""Depths at which the image leaves in `partial` runs, as shares of the layers: denser where answers are decided."""


def exits_for(counterfactual: Sequence[str], num_layers: int) -> list[int]:
    """Exit layers whose statuses a label set must keep for some counterfactual runs.

    Example:
        >>> exits_for(["withheld", "partial"], 12)
        [0, 1, 2, 3, 4, 6, 8]
    """
    found = {0} if "withheld" in counterfactual else set()
    if "partial" in counterfactual:
        found |= {min(max(round(share * num_layers), 1), num_layers - 1) for share in PARTIAL_DEPTHS}
    return sorted(found)


@dataclass(frozen=True)
class OtherRuns:
    """What the text status is in R other runs of N samples, of which `rows` are meant.

    Attributes:
        status: [N, R, L - 1, I].
        labels: [N, R, L + 1] whether gates should let the image go at exit k.
        counted: [R, L - 1] gates whose status differs from that of the full model's run.
        chances: [R] how often a run is drawn.
        rows: [n].
    """

    status: Tensor
    labels: Tensor
    counted: Tensor
    chances: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> OtherRuns:
        return replace(self, rows=self.rows[rows])

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Of every sample one run: its status [n, L - 1, I], labels [n, L + 1] and the gates that count [n, L - 1]."""
        run = torch.multinomial(self.chances, len(self.rows), replacement=True, generator=generator)
        return self.status[self.rows, run], self.labels[self.rows, run], self.counted[run].float()


def other_runs(labels: LabelSet, rule: Tensor, counterfactual: Sequence[str], parts: Sequence[str]) -> OtherRuns | None:
    """The runs of a label set that `counterfactual` names, each to be drawn equally often; None if it names none.

    `rule` is [N, L + 1], whether exit k is right; `parts` are what the gates look at.
    """
    if not counterfactual:
        return None
    gates = torch.arange(rule.shape[1] - 2)  # gate i decides on exit k = i + 1, after layers 0..i
    stay = torch.zeros_like(rule)
    stay[:, -1] = True
    status, of_runs, counted, chances = [], [], [], []
    for name in counterfactual:
        if name == "swapped":
            exits, found = [0], labels.counterfactual("swapped", parts)
        else:
            exits = [each for each in labels.exits if (each == 0) == (name == "withheld")]
            if not exits:
                raise ConfigError(
                    f"the labels in {labels.folder.path} hold no status of {name!r} runs: collect them with "
                    f"labels.exits={exits_for([name], rule.shape[1] - 1)}"
                )
            found = labels.counterfactual("exits", parts)[:, [labels.exits.index(each) for each in exits]]
        status.append(found)
        for left in exits:
            of_runs.append(rule_of_exit(rule, left) if left else stay)
            counted.append(gates >= left)
            chances.append(1 / len(exits))
    return OtherRuns(
        torch.cat(status, dim=1),
        torch.stack(of_runs, dim=1),
        torch.stack(counted),
        torch.tensor(chances),
        torch.arange(len(rule)),
    )


def rule_of_exit(rule: Tensor, left: int) -> Tensor:
    """[n, L + 1] labels of a run whose image left at exit `left`: from there on nothing gets better or worse."""
    labels = rule.clone()
    labels[:, left:-1] = rule[:, left, None]
    return labels
