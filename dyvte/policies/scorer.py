"""Methods that rank visual tokens: one function `score`, the rest is shared.

    @dataclass
    class Brightest(ScorerPolicy):
        def score(self, tokens: VisualTokens) -> Tensor:
            return tokens.hidden.norm(dim=-1)

A method is asked image by image, for every image of every row, so that batches, padding and several images need no
thought. An image is a run of visual positions without text in between; its budget is its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyvte.errors import ConfigError, UnsupportedError
from dyvte.instrument.vision_tower import TowerNeeds, TowerTokens, TowerWatch, VisionTower
from dyvte.mllm import MLLM
from dyvte.policies.attention_policy import LayerAttention, watch_prefill
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.positions import check_positions, make_contiguous, shifted_decoding
from dyvte.policies.token_scores import images


@dataclass
class VisualTokens:
    """The n visual tokens of one image that are left when a method is asked.

    Attributes:
        layer: the decoder layer about to run.
        hidden: [n, d] its input states; before layer 0 what the projector made.
        text: [t, d] input states of the text after the row's last image.
        text_ids: [t] ids of that text.
        text_seen: [t] as `seen`, for that text.
        place: [n] number of the token in the whole image, 0 for its first.
        size: number of tokens of the whole image.
        seen: [n] what `look` gave for the tokens in the last layer looked at; None where none was.
        tower: what the vision tower says about them; None where nothing was asked for.
        mllm: the model.
        earlier: [n, d] states that the method put aside in `Prefill.state[id(self), "earlier"]`; None where it did not.
    """

    layer: int
    hidden: Tensor
    text: Tensor
    text_ids: Tensor
    place: Tensor
    size: int
    seen: Tensor | None
    text_seen: Tensor | None
    tower: TowerTokens | None
    mllm: MLLM
    earlier: Tensor | None = None

    @property
    def view(self) -> Tensor:
        """[n] number of the tile that a token is of, -1 for separators; all 0 where the tower was not looked at."""
        return torch.zeros_like(self.place) if self.tower is None else self.tower.view

    @property
    def question(self) -> str:
        """The text after the row's last image, without special tokens."""
        if self.mllm.tokenizer is None:
            raise UnsupportedError("this method reads the question: load the model with its processor")
        return self.mllm.tokenizer.decode(self.text_ids, skip_special_tokens=True)

    def at(self, index: Tensor) -> VisualTokens:
        """The tokens at `index` [m] (of n), all else as it is."""
        return replace(
            self,
            hidden=self.hidden[index],
            place=self.place[index],
            seen=None if self.seen is None else self.seen[index],
            tower=None if self.tower is None else self.tower.at(index),
            earlier=None if self.earlier is None else self.earlier[index],
        )

    @property
    def received(self) -> Tensor:
        """`seen`; never None where `watched_layers` names some."""
        assert self.seen is not None
        return self.seen

    @property
    def text_received(self) -> Tensor:
        """`text_seen`; never None where `watched_layers` names some."""
        assert self.text_seen is not None
        return self.text_seen

    def of_tower(self) -> TowerTokens:
        """What the vision tower says; never None where `tower_needs` asks for something."""
        assert self.tower is not None
        return self.tower


def top(scores: Tensor, number: int) -> Tensor:
    """[n] boolean: the `number` highest of the scores [n]; of equal ones the earlier."""
    order = scores.argsort(descending=True, stable=True)[: max(number, 0)]
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, order, True)


def number_kept(keep: float, size: int) -> int:
    """Tokens that a budget leaves of an image: a share (float, rounded, halves up) or a number (int)."""
    return min(keep, size) if isinstance(keep, int) else int(keep * size + 0.5)


@dataclass
class ScorerPolicy(Policy):
    """Keep the visual tokens of every image that score highest.

    Override `score` or `look`, `choose` where a rank does not say who stays, or `reduce` where tokens that stay take
    others in.

    Attributes:
        keep: share (0..1, with a decimal point) or number of the tokens of an image that stay.
        positions: "kept" leaves the tokens that stay their position ids; "contiguous" counts anew, as if the others had
            never been there (only for what leaves before layer 0).

    Example:
        >>> class LongestStates(dyvte.ScorerPolicy):
        ...     def score(self, tokens):
        ...         return tokens.hidden.norm(dim=-1)
        >>> with LongestStates(keep=16)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> (run.prefill.kept & run.prefill.layout.visual).sum(1).tolist()
        [16, 16]
    """

    acts = "thins"
    sums_layers: ClassVar[bool] = False
    """Whether what `look` gives adds up over the watched layers; else the last of them counts."""

    keep: float = 0.5
    positions: str = "kept"

    def __post_init__(self) -> None:
        number = isinstance(self.keep, (int, float)) and not isinstance(self.keep, bool)
        if not number or self.keep < 0 or (isinstance(self.keep, float) and self.keep > 1):
            name = type(self).__name__
            raise ConfigError(
                f"{name}: keep is a share 0..1 (with a decimal point) or a number of tokens, got {self.keep}"
            )

    # ------------------------------------------------------------------ what a method is

    def stages(self, mllm: MLLM) -> Mapping[int, float]:
        """The decoder layers before which tokens leave, with the budget left of the whole image; by default 0."""
        return {0: self.keep}

    def shares(self, mllm: MLLM) -> list[float]:
        """The budget of the last stage before each layer."""
        stages, share, found = self.stages(mllm), 1.0, list[float]()
        for layer in range(mllm.num_layers):
            share = stages.get(layer, share)
            if isinstance(share, int):
                raise UnsupportedError(f"{type(self).__name__}: costs are planned for shares, not {share} tokens")
            found.append(share)
        return found

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] the higher, the sooner a token stays; by default what `look` gave."""
        return tokens.received

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """[n] boolean, which tokens stay; by default the `number` highest scores, separators after all others."""
        scores = self.score(tokens)
        return top(scores.masked_fill(tokens.view < 0, float(scores.min()) - 1), number)

    def reduce(self, tokens: VisualTokens, number: int) -> tuple[Tensor, Tensor | None]:
        """Which tokens stay [n], and all states [n, d] where what stays takes others in; None where nothing does."""
        return self.choose(tokens, number), None

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """What to take from the vision tower; by default nothing."""
        return TowerNeeds()

    def watched_layers(self, mllm: MLLM) -> Collection[int]:
        """Decoder layers whose attention the method looks at; by default each before a stage, where it has a `look`."""
        if type(self).look is ScorerPolicy.look:
            return ()
        return [layer - 1 for layer in self.stages(mllm) if layer]

    def look(self, layer: int, prefill: Prefill, attention: LayerAttention) -> Tensor:
        """[b, n] one value for every position that a watched layer runs on; becomes `VisualTokens.seen`."""
        raise NotImplementedError

    # -------------------------------------------------------------------------- the engine

    def check(self, mllm: MLLM) -> None:
        """Refuse stages outside of the decoder and positions that the model has no exact meaning for."""
        stages = self.stages(mllm)
        for layer in stages:
            self.check_layer(layer, mllm)
        check_positions(type(self).__name__, self.positions, mllm)
        if self.positions == "contiguous" and 0 not in stages:
            raise ConfigError(f"{type(self).__name__}: positions='contiguous' is for what leaves before layer 0")

    @contextmanager
    def hooks(self, mllm: MLLM, run: PolicyRun) -> Iterator[None]:
        """As `Policy.hooks`; also refuses vision towers that are not mapped exactly, where one is needed."""
        with ExitStack() as stack:
            if needs := self.tower_needs(mllm):
                watch = stack.enter_context(VisionTower(mllm).watch(needs))
                stack.enter_context(_handing_over(self, mllm, run, watch))
            if watched := self.watched_layers(mllm):
                stack.enter_context(watch_prefill(mllm, run, watched, self._see))
            if self.positions == "contiguous":
                stack.enter_context(shifted_decoding(mllm, run))
            yield

    def _see(self, layer: int, prefill: Prefill, attention: LayerAttention) -> None:
        values = attention.unpacked(self.look(layer, prefill, attention), prefill.kept)
        key = (id(self), "seen")
        before = prefill.state.get(key, (layer, 0.0))
        prefill.state[key] = (layer, values + before[1] if self.sums_layers or before[0] == layer else values)

    @torch.no_grad()
    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Ask the method image by image."""
        budget = self.stages(prefill.mllm).get(layer)
        if budget is None:
            return
        leaving, hidden = torch.zeros_like(prefill.kept), prefill.hidden
        for at, tokens in self._images(layer, prefill):
            stay, merged = self.reduce(tokens, number_kept(budget, tokens.size))
            if merged is not None:
                hidden = hidden.clone() if hidden is prefill.hidden else hidden
                hidden[at] = merged.to(hidden.dtype)
            leaving[at[0], at[1][~stay]] = True
        prefill.hidden = hidden
        prefill.drop(leaving)
        if layer == 0 and self.positions == "contiguous":
            make_contiguous(prefill)

    def _images(self, layer: int, prefill: Prefill) -> Iterator[tuple[tuple[int, Tensor], VisualTokens]]:
        """(row, positions) and tokens of every image that has tokens left."""
        visual = prefill.layout.visual
        image, left = images(visual), prefill.kept & visual
        number = (visual.flatten().cumsum(0) - 1).view_as(image)  # of a token among all of the batch
        text = prefill.layout.text_status_positions
        tower = self._tower(prefill) if self.tower_needs(prefill.mllm) else None
        found, earlier = (prefill.state.get((id(self), name)) for name in ("seen", "earlier"))
        for row, most in enumerate((image.amax(1) + 1).tolist()):
            for index in range(most):
                whole = (image[row] == index).nonzero().flatten()
                at = whole[left[row, whole]]
                if len(at):
                    yield (
                        (row, at),
                        VisualTokens(
                            layer=layer,
                            hidden=prefill.hidden[row, at],
                            text=prefill.hidden[row, text[row]],
                            text_ids=prefill.input_ids[row, text[row]],
                            place=at - whole[0],
                            size=len(whole),
                            seen=None if found is None else found[1][row, at],
                            text_seen=None if found is None else found[1][row, text[row]],
                            tower=None if tower is None else tower.at(number[row, at]),
                            mllm=prefill.mllm,
                            earlier=None if earlier is None else earlier[row, at],
                        ),
                    )

    def _tower(self, prefill: Prefill) -> TowerTokens | None:
        tokens = prefill.state.get((id(self), "tower"))
        expected = int(prefill.layout.visual.sum())
        if expected == 0:
            return None
        if tokens is None or len(tokens.view) != expected:
            got = "did not run" if tokens is None else f"gave {len(tokens.view)} visual tokens for {expected} positions"
            raise UnsupportedError(
                f"{type(self).__name__} looks at the vision tower, which {got} in this prefill; pass images as "
                "pixel_values, without videos or beams"
            )
        return tokens


@contextmanager
def _handing_over(policy: Policy, mllm: MLLM, run: PolicyRun, watch: TowerWatch) -> Iterator[None]:
    """Within the block every prefill gets what was seen of the tower that made its visual tokens."""
    decoder = mllm.decoder

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if module is mllm.model and (given is None or getattr(given, "last_hidden_state", None) is not watch.seen):
            watch.tokens = watch.seen = None  # of another batch; a run within this call replaces it

    def hand_over(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module is decoder and run.prefill is not None:
            run.prefill.state[id(policy), "tower"] = watch.tokens

    with (
        mllm.model.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.register_forward_pre_hook(hand_over, with_kwargs=True),
    ):
        yield
