"""TokenLayout: which position is system, visual, instruction or answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyvte import ROLES, TokenLayout

IMAGE, VIDEO, TEXT = 7, 8, 1
SYSTEM, VISUAL, INSTRUCTION, ANSWER = range(4)


def layout_of(ids: list[list[int]], mask: list[list[int]] | None = None, answer_start: object = None) -> TokenLayout:
    attention_mask = None if mask is None else torch.tensor(mask)
    return TokenLayout.from_input_ids(torch.tensor(ids), attention_mask, (IMAGE, VIDEO), answer_start)  # type: ignore


def test_roles_of_one_image() -> None:
    layout = layout_of([[1, 1, 7, 7, 1, 1, 1]])
    assert layout.roles.tolist() == [[0, 0, 1, 1, 2, 2, 2]]
    assert ROLES == ("system", "visual", "instruction", "answer")
    assert layout.last_prompt.tolist() == [6]
    assert layout.has_image.tolist() == [True]
    assert layout.first_token.tolist() == [0]


def test_text_between_images_is_instruction_but_not_part_of_the_question() -> None:
    layout = layout_of([[1, 7, 1, 8, 7, 1, 1]])
    assert layout.roles.tolist() == [[0, 1, 2, 1, 1, 2, 2]]
    assert layout.text_status_positions.tolist() == [[False, False, False, False, False, True, True]]


def test_prompt_without_image_is_instruction() -> None:
    layout = layout_of([[0, 1, 1, 1]], [[0, 1, 1, 1]])
    assert layout.roles.tolist() == [[-1, 2, 2, 2]]
    assert layout.has_image.tolist() == [False]
    assert layout.text_status_positions.tolist() == [[False, True, True, True]]


def test_answers_start_anywhere_and_hold_no_visual_tokens() -> None:
    layout = layout_of([[1, 7, 1, 1, 7], [7, 1, 1, 7, 1]], answer_start=torch.tensor([4, 2]))
    assert layout.roles.tolist() == [[0, 1, 2, 2, 3], [1, 2, 3, 3, 3]]
    assert layout.last_prompt.tolist() == [3, 1]
    assert layout.answer.sum().item() == 4


@given(
    system=st.integers(0, 4),
    images=st.lists(st.integers(1, 5), max_size=3),
    question=st.integers(1, 5),
    answer=st.integers(0, 3),
    padding=st.integers(0, 4),
    left=st.booleans(),
)
def test_roles_move_with_padding(
    system: int, images: list[int], question: int, answer: int, padding: int, left: bool
) -> None:
    visual = [token for length in images for token in [IMAGE] * length + [TEXT]]
    ids = [TEXT] * system + visual + [TEXT] * (question + answer)
    start = len(ids) - answer
    plain = layout_of([ids], answer_start=start)
    # an image token among the padding is padding
    padded_ids = [IMAGE] * padding + ids if left else ids + [IMAGE] * padding
    mask = [0] * padding + [1] * len(ids) if left else [1] * len(ids) + [0] * padding
    shift = padding if left else 0
    padded = layout_of([padded_ids], [mask], answer_start=start + shift)
    assert padded.roles[0, shift : shift + len(ids)].tolist() == plain.roles[0].tolist()
    assert padded.padding.sum() == padding
    assert padded.last_prompt.item() == plain.last_prompt.item() + shift
    assert padded.first_token.item() == shift

    assert plain.visual.sum() == sum(images)
    assert plain.answer.sum() == answer
    assert plain.system.sum() == (system if images else 0)
    everything = plain.system.int() + plain.visual.int() + plain.instruction.int() + plain.answer.int()
    assert (everything == 1).all()
    assert torch.equal(plain.text, ~plain.visual)
    after_image = plain.text_status_positions[0].nonzero().flatten().tolist()
    assert after_image == list(range(start - question - bool(images) - (0 if images else system), start))


def test_bad_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"must be \[batch, length\]"):
        TokenLayout.from_input_ids(torch.tensor([1, 2]), None, [7])
    with pytest.raises(ValueError, match="2-D like input_ids"):
        TokenLayout.from_input_ids(torch.tensor([[1, 2]]), torch.ones(1, 1, 2, 2), [7])
    with pytest.raises(ValueError, match="row 1 of the batch has no prompt token"):
        layout_of([[1, 7], [1, 7]], [[1, 1], [0, 0]])


def test_moves_between_devices() -> None:
    assert layout_of([[1, 7]]).to("cpu").roles.device.type == "cpu"
