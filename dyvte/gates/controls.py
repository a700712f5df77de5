"""What dynamic exits must beat, computed from the label set alone: does each question's own exit matter at all?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dyvte.gates.features import QUESTION
from dyvte.gates.metrics import cluster_interval, difference_interval, first_exit
from dyvte.gates.module import SHIPPED_GATES, load_gates
from dyvte.gates.training import gate_probabilities
from dyvte.instrument.sweep.criteria import exit_depth, lucky_exit_depth

if TYPE_CHECKING:
    from dyvte.gates.labels import LabelSet
    from dyvte.policies.exits.dynamic_exit import DynamicExit

QUESTION_GATES = "question_only"
"""Folder, inside that of the gates, of the control gates that saw the question only."""


def control_exits(policy: DynamicExit, source: str, answers: pd.DataFrame, reference: LabelSet) -> dict[str, Tensor]:
    """With which probability every question leaves at every layer, under each control.

    - `permuted`: the gates' own exits, dealt to the questions at random. Keeps how often each exit is taken and
      destroys which question takes it.
    - `permuted within kind`: the same among questions of one kind.
    - `fixed exit`: the first exit that reached the gates' agreement on the validation data they were trained with.
    - `fixed exit by kind`: one for each kind of question, chosen on the same data for the same agreement; kinds that
      were not in it take the fixed exit.
    - `question only`: gates of the same recipe that saw the question's words but never the image.

    Args:
        policy: the evaluated policy.
        source: folder, Hub id or name that its gates came from.
        answers: the evaluation's table, with `exit_layer` and `kind`.
        reference: label set of the evaluation data.

    Returns:
        name -> [n, L + 1], rows sum to 1. Controls that the gates' folder holds nothing for are left out.
    """
    num_exits = reference.num_layers + 1
    kinds = answers["kind"].astype(str).to_numpy()
    taken = one_hot(torch.tensor(answers["exit_layer"].to_numpy(copy=True)), num_exits).double()
    controls = {"permuted": taken.mean(0).expand(len(answers), -1)}
    within = torch.empty_like(taken)
    for kind in np.unique(kinds):
        chosen = torch.from_numpy(kinds == kind)
        within[chosen] = taken[chosen].mean(0)
    controls["permuted within kind"] = within

    def certain(exits: list[int] | Tensor) -> Tensor:
        return one_hot(torch.as_tensor(exits), num_exits).double()

    facts: dict[str, Any] = load_gates(policy.gates).facts.get("controls", {})
    if facts:
        one, by_kind = facts["fixed_exit"], facts["fixed_exit_by_kind"]
        controls["fixed exit"] = certain([one] * len(answers))
        controls["fixed exit by kind"] = certain([by_kind.get(kind, one) for kind in kinds])
    folder = Path(SHIPPED_GATES.get(str(source), source)) / QUESTION_GATES
    if folder.is_dir():
        gates = load_gates(folder)
        probability = gate_probabilities(gates, reference.status([QUESTION])[reference.rows_of(answers)])
        controls["question only"] = certain(first_exit(probability, gates.thresholds()))
    return controls


def exits_by_hops(answers: pd.DataFrame, reference: LabelSet) -> pd.DataFrame | None:
    """Exit depth by the number of look-ups in the image that a question takes (`hops` in its metadata).

    The hypothesis, stated before any figure was seen: more hops, later exit. The oracle shows whether the model itself
    works that way, the policy's own exits whether it follows. `step` is the difference to one hop fewer.

    Returns:
        One row a number of hops and measure, with 95% intervals clustered by image (NaN for a single one); None where
        questions have no hops.
    """
    hops = np.array([json.loads(text).get("hops", -1) for text in answers["metadata"]])
    if len(set(hops)) < 2 or (hops < 0).any():
        return None
    agree = reference.agree[reference.rows_of(answers)]
    depths = {
        "oracle, first exit that keeps the answer": lucky_exit_depth(agree),
        "oracle, first exit from which on it is kept": exit_depth(agree),
        "policy": torch.tensor(answers["exit_layer"].to_numpy(copy=True)),
    }
    images, num_layers = answers["image_id"].to_numpy(), agree.shape[1] - 1
    rows = []
    for measure, depth in depths.items():
        before: npt.NDArray[np.bool_] | None = None
        for number in sorted(set(hops)):
            chosen = torch.from_numpy(hops == number)
            interval = cluster_interval(depth[chosen], images[chosen.numpy()], span=num_layers)
            row = {"measure": measure, "hops": int(number), "questions": int(chosen.sum())}
            row |= zip(("depth", "low", "high"), interval, strict=True)
            if before is not None:
                step = difference_interval(depth, hops == number, before, images, span=num_layers)
                row |= zip(("step", "step_low", "step_high"), step, strict=True)
            rows.append(row)
            before = hops == number
    return pd.DataFrame(rows)
