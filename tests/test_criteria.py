"""KL criterion, exit labels, exit depths and token status, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dyvte.instrument.states import STATUS_PARTS, status_weights, text_status, token_status
from dyvte.instrument.sweep.criteria import (
    exit_depth,
    kl_exit_layer,
    kl_stays_below,
    kl_to_full,
    lucky_exit_depth,
    paper_labels,
    release_labels,
    sequence_nll,
    token_agreement,
)
from dyvte.layout import TokenLayout

label_rows = st.lists(st.booleans(), min_size=1, max_size=8)
divergences = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=12)


@pytest.mark.parametrize("direction", ["exit_to_full", "full_to_exit"])
def test_kl_is_pytorchs(direction: str) -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)) * 3
    exits, full = logits.log_softmax(-1), logits[:, -1:].log_softmax(-1).expand_as(logits)
    first, second = (exits, full) if direction == "exit_to_full" else (full, exits)
    expected = torch.nn.functional.kl_div(second, first, log_target=True, reduction="none").sum(-1)
    found = kl_to_full(logits, direction)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    assert (found[:, -1] == 0).all()
    assert not torch.allclose(kl_to_full(logits, "exit_to_full"), kl_to_full(logits, "full_to_exit"))


def test_kl_of_two_coins() -> None:
    logits = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    expected = 0.5 * torch.tensor(0.5 / 0.9).log() + 0.5 * torch.tensor(0.5 / 0.1).log()
    assert kl_to_full(logits)[0] == pytest.approx(float(expected), rel=1e-6)


def test_kl_of_suppressed_tokens_and_of_half_precision() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [2.0, 1.0, -torch.inf]])
    assert kl_to_full(logits).isfinite().all()
    assert kl_to_full(logits.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="exit_to_full"):
        kl_to_full(logits, "sideways")  # type: ignore[arg-type]


@given(divergences, st.floats(0, 1), st.integers(0, 5))
def test_kl_exit_layers_by_their_definitions(values: list[float], eta: float, start: int) -> None:
    divergence = torch.tensor(values)
    layers = range(start, len(values))
    below = [k for k in layers if divergence[k] <= eta]
    staying = [k for k in layers if all(divergence[j] <= eta for j in range(k, len(values)))]
    assert kl_exit_layer(divergence, eta, start) == (below[0] if below else None)
    assert kl_stays_below(divergence, eta, start) == (staying[0] if staying else None)


def test_a_divergence_that_rises_again() -> None:
    divergence = torch.tensor([9.0, 0.001, 0.5, 0.001, 0.0])
    assert kl_exit_layer(divergence, 0.01, start=0) == 1
    assert kl_exit_layer(divergence, 0.01, start=2) == 3
    assert kl_stays_below(divergence, 0.01, start=0) == 3


def test_vtws_search_starts_at_layer_five() -> None:
    assert kl_exit_layer(torch.zeros(33), 0.003) == 5


def test_sequence_nll_leaves_padding_out() -> None:
    token_nll = torch.tensor([[[1.0, 3.0, torch.nan], [2.0, 2.0, torch.nan]]])
    assert sequence_nll(token_nll, torch.tensor([[True, True, False]])).tolist() == [[2.0, 2.0]]


def test_paper_labels() -> None:
    agree = torch.tensor([[True, True, False, True]])
    nll = torch.tensor([[1.02, 1.04, 0.5, 1.0]])
    assert paper_labels(agree, nll).tolist() == [[True, False, False, True]]
    confident = torch.tensor([[2e-4, 2e-3, 0.5, 1e-5]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert paper_labels(everything, confident).tolist() == [[True, False, False, True]]
    assert paper_labels(everything, confident, eps=0.0).tolist() == [[False, False, False, True]]


def test_release_labels() -> None:
    valid = torch.tensor([[True] * 100 + [False]])
    tokens = torch.zeros(1, 4, 101, dtype=torch.long)
    tokens[0, 0, :1] = 1  # 99% agree
    tokens[0, 1, :2] = 1  # 98%
    tokens[0, 2, 100] = 1  # differs at padding only
    agreement = token_agreement(tokens, valid)
    nll = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert release_labels(agreement, nll).tolist() == [[True, False, True, True]]
    worse = torch.tensor([[1.03, 1.0, 1.029, 1.0]])  # strictly below 1.03 times
    assert release_labels(agreement, worse).tolist() == [[False, False, True, True]]
    certain = torch.zeros(1, 4)
    assert release_labels(agreement, certain).tolist() == [[False, False, False, True]]


@given(label_rows)
def test_exit_depths_by_their_definitions(labels: list[bool]) -> None:
    labels = [*labels, True]  # the full model's own label
    table = torch.tensor([labels])
    assert exit_depth(table).item() == min(k for k in range(len(labels)) if all(labels[k:]))
    assert lucky_exit_depth(table).item() == labels.index(True)
    assert lucky_exit_depth(table) <= exit_depth(table)
    table[:, -1] = False
    assert exit_depth(table).item() == min(k for k in range(len(labels)) if all(labels[k:]))


# ------------------------------------------------------------------------- token status


def layout_of(roles: list[list[int]]) -> TokenLayout:
    return TokenLayout(torch.tensor(roles))


def states(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, 3, generator=torch.Generator().manual_seed(0))


def test_text_status_is_the_mean_of_the_question_and_its_last_state() -> None:
    # padding, system, visual, text between images, visual, question, answer
    layout = layout_of([[-1, 0, 1, 2, 1, 2, 2, 2, 3, 3]])
    hidden = states(1, 10)
    expected = torch.cat([hidden[0, 5:7].mean(0), hidden[0, 7]])
    torch.testing.assert_close(text_status(hidden, layout)[0], expected)


def test_other_statuses_in_the_order_asked_for() -> None:
    layout = layout_of([[0, 1, 1, 2, 2, -1], [2, 2, 2, 2, -1, -1]])
    hidden = states(2, 6)
    status = token_status(hidden, status_weights(layout, STATUS_PARTS)).view(2, 4, 3)
    expected = torch.stack([hidden[0, 3], hidden[0, 4], hidden[0, 1:3].mean(0), hidden[0, 2]])
    torch.testing.assert_close(status[0], expected)
    # without an image all text counts, and there is no image status
    expected = torch.stack([hidden[1, :3].mean(0), hidden[1, 3], torch.zeros(3), torch.zeros(3)])
    torch.testing.assert_close(status[1], expected)


def test_a_question_of_one_token_is_its_own_mean() -> None:
    hidden = states(1, 3)
    status = text_status(hidden, layout_of([[1, 1, 2]]))
    torch.testing.assert_close(status[0], torch.cat([hidden[0, 2], hidden[0, 2]]))


def test_unknown_status_parts() -> None:
    with pytest.raises(ValueError, match="'image_first'"):
        status_weights(layout_of([[1, 2]]), ["image_first"])
