"""The role of every position of a multimodal prompt: system, visual, instruction or answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROLES = ("system", "visual", "instruction", "answer")
SYSTEM, VISUAL, INSTRUCTION, ANSWER = range(len(ROLES))
PADDING = -1


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Role of every position of a batch.

    `visual` are the image placeholders, `system` is the text before the first of them, `instruction` the text after
    it up to the end of the prompt (text between images included), `answer` what was generated or teacher-forced.
    In a row without an image all prompt text is `instruction`.

    Attributes:
        roles: [B, N] with the index into `ROLES`, or -1 for padding. Padding may be on either side.

    Example:
        >>> layout = dyvte.TokenLayout.from_input_ids(torch.tensor([[1, 7, 7, 5]]), None, [7])
        >>> [dyvte.ROLES[role] for role in layout.roles[0]]
        ['system', 'visual', 'visual', 'instruction']
    """

    roles: Tensor

    @classmethod
    def from_input_ids(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        visual_token_ids: Sequence[int],
        answer_start: int | Tensor | None = None,
    ) -> TokenLayout:
        """Find the roles from token ids.

        Args:
            input_ids: [B, N] ids of the prompt, with the image token repeated once per visual token.
            attention_mask: [B, N], 0 at padding; None when nothing is padded.
            visual_token_ids: ids of the image (and video) placeholders.
            answer_start: index of the first answer position, one for all rows or [B]; None when there is no answer.
                An image token that a model generated after this position is `answer`, not `visual`.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, length], got shape {tuple(input_ids.shape)}")
        if attention_mask is None:
            valid = torch.ones_like(input_ids, dtype=torch.bool)
        elif attention_mask.shape == input_ids.shape:
            valid = attention_mask.to(input_ids.device).bool()
        else:
            raise ValueError(
                f"attention_mask must be 2-D like input_ids {tuple(input_ids.shape)} to find roles, "
                f"got {tuple(attention_mask.shape)}"
            )
        visual = _any_of(input_ids, visual_token_ids) & valid
        in_answer = None
        if answer_start is not None:
            position = torch.arange(input_ids.shape[1], device=input_ids.device)
            start = torch.as_tensor(answer_start, device=input_ids.device)
            in_answer = position >= start.expand(len(input_ids))[:, None]
            visual &= ~in_answer
        before_image = (visual.cumsum(1) == 0) & visual.any(1, keepdim=True)

        roles = torch.where(before_image, SYSTEM, INSTRUCTION).masked_fill_(visual, VISUAL)
        if in_answer is not None:
            roles.masked_fill_(in_answer, ANSWER)
        layout = cls(roles.masked_fill_(~valid, PADDING))
        no_prompt = ((layout.roles == PADDING) | (layout.roles == ANSWER)).all(1)
        if no_prompt.any():
            row = int(no_prompt.int().argmax())
            raise ValueError(f"row {row} of the batch has no prompt token: its attention_mask is 0 everywhere")
        return layout

    @property
    def system(self) -> Tensor:
        """[B, N] text before the first visual position."""
        return self.roles == SYSTEM

    @property
    def visual(self) -> Tensor:
        """[B, N] image placeholders."""
        return self.roles == VISUAL

    @property
    def instruction(self) -> Tensor:
        """[B, N] prompt text after the first visual position (all prompt text of a row without an image)."""
        return self.roles == INSTRUCTION

    @property
    def answer(self) -> Tensor:
        """[B, N] generated or teacher-forced text."""
        return self.roles == ANSWER

    @property
    def text(self) -> Tensor:
        """[B, N] every position that is neither visual nor padding."""
        return (self.roles != VISUAL) & (self.roles != PADDING)

    @property
    def padding(self) -> Tensor:
        """[B, N] padding."""
        return self.roles == PADDING

    @property
    def has_image(self) -> Tensor:
        """[B] whether the row holds a visual position."""
        return self.visual.any(1)

    @property
    def text_status_positions(self) -> Tensor:
        """[B, N] instruction positions after the last visual one: what the text status and `cross` look at."""
        visual_from_here_on = self.visual.flip(1).cumsum(1).flip(1) > 0
        return self.instruction & ~visual_from_here_on

    @property
    def last_prompt(self) -> Tensor:
        """[B] index of the last prompt token (the one whose logits predict the answer's first token)."""
        position = torch.arange(self.roles.shape[1], device=self.roles.device)
        in_prompt = (self.roles != PADDING) & (self.roles != ANSWER)
        return torch.where(in_prompt, position, -1).amax(1)

    @property
    def first_token(self) -> Tensor:
        """[B] index of the first position that is not padding: the attention sink."""
        return (self.roles != PADDING).int().argmax(1)

    def __eq__(self, other: object) -> bool:
        """Whether every position has the same role, on whatever device."""
        if not isinstance(other, TokenLayout):
            return NotImplemented
        return torch.equal(self.roles.cpu(), other.roles.cpu())

    __hash__ = None  # type: ignore[assignment]

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout on another device."""
        return TokenLayout(self.roles.to(device))


def _any_of(ids: Tensor, wanted: Sequence[int]) -> Tensor:
    """Where `ids` are one of the few `wanted`, compared one by one: a tensor of them would have to be sent to a GPU."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for each in wanted:
        found |= ids == each
    return found
