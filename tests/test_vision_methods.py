"""Methods that look at the vision tower: the numbers that their papers' rules give, worked out by hand or naively."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_policies import batch_of, kept_under, model
from test_scorer_policies import kept_of, picture
from torch import Tensor, tensor

from dyvte.errors import ConfigError
from dyvte.instrument.vision_tower import TowerTokens
from dyvte.policies.vision.fastervlm import FasterVLM
from dyvte.policies.vision.fopru import FoPru
from dyvte.policies.vision.visionzip import VisionZip
from dyvte.policies.vision.vispruner import VisPruner
from dyvte.policies.vision.vtc_cls import VTCCLS

DEPTH = 24
"""Encoder layers of the made-up tower, as many as CLIP ViT-L has."""


def tower_of(count: int, width: int | None = None, **fields: Any) -> TowerTokens:
    """What a tower says about one picture, `width` patches wide; layers may be negative."""
    width = count if width is None else width
    number = torch.arange(count)
    defaults: dict[str, Any] = {
        "view": torch.zeros(count, dtype=torch.long),
        "place": torch.stack([number // width, number % width], dim=1).float(),
        "attentions": {},
        "all_keys": {},
        "states": {},
        "class_queries": {},
        "class_states": {},
        "num_heads": 1,
        "num_layers": DEPTH,
    }
    by_layer = {
        name: {layer % DEPTH: each for layer, each in value.items()} if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return TowerTokens(**{**defaults, **by_layer})


def directions(*degrees: float) -> Tensor:
    angles = torch.deg2rad(tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@torch.no_grad()
def test_fastervlm_keeps_what_the_class_token_attends_to_most() -> None:
    mllm = model("llava", "eager")
    batch = batch_of(mllm, (1, 1))
    output = mllm.model.base_model.get_image_features(batch["pixel_values"], output_attentions=True)
    rows = output.attentions[-2].mean(1)[:, 0, 1:]
    _, kept = kept_under(FasterVLM(keep=5), mllm, batch)
    for row in range(2):
        visual = batch.layout.visual[row]
        assert kept_of(kept[0, row, visual]) == sorted(rows[row].topk(5).indices.tolist())


def test_vtc_cls_sums_upper_layers_without_the_last() -> None:
    rows = {21: [0.10, 0.30, 0.05, 0.20, 0.25, 0.10], 22: [0.25, 0.06, 0.28, 0.12, 0.19, 0.10]}
    tower = tower_of(6, attentions={layer: tensor(row) for layer, row in rows.items()})
    tokens = picture(hidden=torch.zeros(6, 2), tower=tower)
    policy = VTCCLS(keep=3)
    torch.testing.assert_close(policy.score(tokens), tensor([0.35, 0.36, 0.33, 0.32, 0.44, 0.20]))
    assert kept_of(policy.reduce(tokens, 3)[0]) == [0, 1, 4]
    mllm = model("llava")  # of two encoder layers
    assert list(VTCCLS().tower_needs(mllm).attention) == [0]
    with pytest.raises(ConfigError, match="starts at layer 1 and ends at 0"):
        VTCCLS(first=-1).tower_needs(mllm)


def test_fopru_keeps_tokens_or_rows() -> None:
    tower = tower_of(6, width=2, attentions={-2: tensor([0.30, 0.05, 0.10, 0.28, 0.20, 0.02])})
    tokens = picture(hidden=torch.zeros(6, 2), tower=tower)
    assert kept_of(FoPru().choose(tokens, 2)) == [0, 3]
    assert kept_of(FoPru(by="row").choose(tokens, 2)) == [2, 3]
    assert kept_of(FoPru(by="row").choose(tokens, 1)) == [2, 3], "one row at least"
    with pytest.raises(ConfigError, match="'rank' or 'row'"):
        FoPru(by="column")


def test_visionzip_targets_take_in_the_rest() -> None:
    keys = tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.9], [0.2, 1.0]])
    features = tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    tower = tower_of(6, attentions={-2: tensor([0.1, 0.4, 0.05, 0.2, 0.15, 0.1])}, all_keys={-2: keys})
    tokens = picture(hidden=features, tower=tower, mllm=model("internvl"))
    stay, states = VisionZip(contextual=2 / 3).reduce_tile(tokens, 3)
    assert kept_of(stay) == [0, 1, 3]
    assert states is not None
    assert states.flatten().tolist() == [5.0, 2.0, 3.0, 10.0, 5.0, 6.0]


def test_vispruner_thins_the_rest_out() -> None:
    attention = tensor([0.30, 0.02, 0.20, 0.10, 0.08, 0.12, 0.05, 0.13])
    features = directions(0, 10, 20, 90, 95, 45, 170, 52)
    tower = tower_of(8, attentions={-2: attention}, states={-1: features, -2: features})
    tokens = picture(hidden=torch.zeros(8, 2), tower=tower)
    assert kept_of(VisPruner(important=0.34).choose(tokens, 6)) == [0, 1, 2, 4, 5, 6]
    for number in range(1, 9):  # odd, tiny and empty second parts, where the paper's code fails
        assert int(VisPruner().choose(tokens, number).sum()) == number
