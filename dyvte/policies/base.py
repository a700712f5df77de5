"""What a policy is, and the engine that runs policies: which positions each decoder layer still sees.

A policy is a dataclass. Calling it with a model gives a context manager; within the block everything that runs the
model (`model(**batch)`, `model.generate`, a pipeline) runs under the policy:

    with FixedExit(layer=16)(mllm):
        answers = mllm.generate(batch)

To write one, subclass `Policy` and override `before_layer`. It is called during prefill before every decoder layer, in
order, with a `Prefill` that holds that layer's input states and the roles of the positions, and takes visual positions
out with `prefill.drop(mask)`. What was dropped stays out: this layer and all later ones run on the remaining positions
of each row, store only their keys and values, and generated tokens attend to those.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dyvte.cost.flops import overhead
from dyvte.errors import ConfigError, UnsupportedError
from dyvte.instrument.cache import KeptLayer
from dyvte.instrument.hooks import (
    LayerCall,
    check_model,
    drive_layers,
    is_driven,
    output_states,
    override_method,
    with_states,
)
from dyvte.instrument.keys.borrowed import BorrowingLayer
from dyvte.instrument.keys.cache_layers import check_cache, kept_layer, restore_layers
from dyvte.instrument.keys.indexed import starts_of
from dyvte.instrument.keys.places import running_at
from dyvte.instrument.keys.shared import PrefillSharing, borrows_keys
from dyvte.instrument.running_state import packed_arguments
from dyvte.layout import TokenLayout
from dyvte.mllm import as_mllm
from dyvte.model_parts import VISUAL_MARKS, cache_among, inner_models, runs_together
from dyvte.policies.decoding import Decoding, without_keys
from dyvte.policies.generation import check_generation, same_settings
from dyvte.policies.method import Calibration, Need, Source
from dyvte.policies.prefill import Prefill as Prefill

if TYPE_CHECKING:
    from dyvte.mllm import MLLM


@dataclass
class Policy:
    """Decides which visual positions each decoder layer still sees. Subclass it as a dataclass of settings.

    A policy object holds settings only; what belongs to one prefill goes to `Prefill.state`, so one object can serve
    several models and calls. Policies nest: inner ones decide after outer ones, on what is left.

    Attributes:
        name: of the method in `conf/policy/` and in tables; empty for what is no method by itself.
        label: what tables and figures call it.
        source: where it is from.
        needs: what it takes beside the model and the prompt.
        acts: "exits" if all visual tokens leave at once, "thins" if some stay, "" for neither; says what composes.
        by_place: whether places in the whole grid of the image decide.
        meets_budgets: whether some setting trades cost for answers.
        has_published_setting: whether its defaults are what its paper or its code has.
        watches_steps: whether it looks at the attention of generated tokens; all rows then attend together.

    Example:
        >>> class LeaveAtThird(dyvte.Policy):
        ...     def before_layer(self, layer, prefill):
        ...         if layer == 3:
        ...             prefill.drop(prefill.layout.visual)
        >>> with LeaveAtThird()(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> run.exit_layers.tolist()
        [3, 3]
    """

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    source: ClassVar[Source] = Source()
    needs: ClassVar[tuple[Need, ...]] = ()
    acts: ClassVar[Literal["exits", "thins", ""]] = ""
    by_place: ClassVar[bool] = False
    meets_budgets: ClassVar[bool] = True
    has_published_setting: ClassVar[bool] = False
    watches_steps: ClassVar[bool] = False

    def shares(self, mllm: MLLM) -> list[float]:
        """Share of the visual tokens that each of the L decoder layers sees, from which a setting's cost is planned."""
        raise UnsupportedError(f"{type(self).__name__} does not say which share of the tokens its layers see (shares)")

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """The setting that costs `budget` (see `Calibration.counted`) on the prompts, None where none does.

        By default `keep` is solved for, with all other settings at their defaults.
        """
        if "keep" not in {each.name for each in fields(cls)}:
            return None
        return calibration.solve(lambda keep: cls(keep=keep), budget)  # type: ignore[call-arg]

    @classmethod
    def published(cls, calibration: Calibration) -> Policy | None:
        """The setting that its paper, or its training, made; None where there is none."""
        return cls() if cls.has_published_setting else None

    def check(self, mllm: MLLM) -> None:
        """Refuse a model that the settings do not fit; called when the block is entered."""

    def check_layer(self, layer: int, mllm: MLLM, first: int = 0) -> None:
        """Refuse a decoder layer outside of `first`..L-1."""
        if not first <= layer < mllm.num_layers:
            last, name = mllm.num_layers - 1, type(self).__name__
            raise ConfigError(f"{name}: layer must be {first}..{last} for this model, got {layer}")

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Decide what leaves before decoder layer `layer` (0-based) runs.

        `prefill.hidden` is that layer's input, that is, the output of layer `layer - 1`; leaving here means an exit
        layer k = `layer`. Called for every layer of every prefill, and not while decoding. Should not read tensor
        values on the host: `prefill.drop` takes the decision as a mask and the engine synchronises once.
        """
        raise NotImplementedError

    def hidden_keys(self, layer: int, prefill: Prefill) -> Tensor | None:
        """[B, N] boolean: positions of the prompt whose keys generated tokens do not see in a layer; None hides none.

        Called before every layer of every step that decodes on the KV cache, which goes on holding those keys.
        """
        return None

    def hooks(self, mllm: MLLM, run: PolicyRun) -> AbstractContextManager[None]:
        """What the policy has in place on the model within its block, beside the engine's own; nothing by default."""
        return nullcontext()

    @contextmanager
    def __call__(self, model: MLLM | nn.Module, layout: TokenLayout | None = None) -> Iterator[PolicyRun]:
        """Run the model under this policy within the block.

        Args:
            model: an `MLLM`, or a transformers model (compiled, of PEFT, or plain).
            layout: roles of the positions of the one prefill of the block, where ids alone do not tell (teacher-forced
                answers); by default found from the ids of each forward call.

        Yields:
            A `PolicyRun`, whose `exit_layers` are those of the last prefill.

        Raises:
            UnsupportedError: the model, its cache or the way of generating cannot be driven exactly.
        """
        mllm = as_mllm(model)
        self.check(mllm)
        with _Engine.of(mllm).running(self, layout) as run, self.hooks(mllm, run):
            yield run


@dataclass
class PolicyRun:
    """What happened under a policy.

    Attributes:
        prefill: the last prefill, None before the first.

    Example:
        >>> with dyvte.FixedExit(layer=6)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> run.exit_layers.tolist()
        [6, 6]
    """

    prefill: Prefill | None = None

    @property
    def exit_layers(self) -> Tensor:
        """[B] exit layer k of every row of the last prefill: how many layers saw a visual token of it.

        0 for a row without image.
        """
        if self.prefill is None:
            raise RuntimeError("no prefill has run under this policy yet")
        return self.prefill.layers_with_image


class _Engine:
    """Runs the policies that are active on one model. It exists from the first block entered to the last one left."""

    _engines: ClassVar[weakref.WeakKeyDictionary[nn.Module, _Engine]] = weakref.WeakKeyDictionary()

    def __init__(self, mllm: MLLM) -> None:
        self.mllm = mllm
        self.policies: list[tuple[Policy, TokenLayout | None, PolicyRun]] = []
        self.prefill: Prefill | None = None
        self._decoding = False
        self._calls: list[nn.Module] = []  # forward calls in progress, a wrapper's before its inner model's
        self._prompt: dict[str, Any] = {}  # what `generate` was given; it encodes images and videos by itself
        self._start: Tensor | None = None  # first tokens, where blocks of keys are counted from them
        self._steps = Decoding(mllm)

    @classmethod
    def of(cls, mllm: MLLM) -> _Engine:
        engine = cls._engines.get(mllm.model)
        return cls(mllm) if engine is None else engine

    @contextmanager
    def running(self, policy: Policy, layout: TokenLayout | None) -> Iterator[PolicyRun]:
        run = PolicyRun()
        entry = (policy, layout, run)
        with nullcontext() if self.policies else self._installed():
            self.policies.append(entry)
            try:
                yield run
            finally:
                self.policies = [each for each in self.policies if each is not entry]

    @contextmanager
    def _installed(self) -> Iterator[None]:
        check_model(self.mllm)
        if is_driven(self.mllm):
            raise UnsupportedError("the decoder layers are being driven by exit_sweep; run policies outside of it")
        model = self.mllm.model
        generate = model.generate

        def checked_generate(*args: Any, **kwargs: Any) -> Any:
            check_generation(model, args, kwargs)
            self._prompt = kwargs
            try:
                return generate(*args, **kwargs)
            finally:
                self._prompt = {}

        with ExitStack() as stack:
            stack.enter_context(drive_layers(self.mllm, self._run_layer))
            stack.enter_context(override_method(model, "generate", checked_generate))
            # A wrapper's generate calls the inner model; its forward may too, within a call that has begun already
            for module in (model, *inner_models(model)):
                begin = self._hook(module, self._begin)
                stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._hook(module, self._end), always_call=True).remove)
            self._engines[model] = self
            stack.callback(self._engines.pop, model)
            yield

    @staticmethod
    def _hook(watched: nn.Module, function: Callable[..., None]) -> Callable[..., None]:
        """A plain function that does nothing on a deep copy of the model."""

        def hook(module: nn.Module, *rest: Any) -> None:
            if module is watched:
                function(module, *rest)

        return hook

    # ------------------------------------------------------------------- a forward call

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append(module)
        if len(self._calls) > 1:
            return
        names = list(inspect.signature(module.forward).parameters)
        inputs = dict(zip(names, args, strict=False)) | kwargs
        input_ids, cache = inputs.get("input_ids"), cache_among(inputs)
        if input_ids is None and module is not self.mllm.model:  # a wrapper's generate gives embeddings
            input_ids = self._prompt.get("input_ids")
        if input_ids is None:
            raise UnsupportedError(
                "a policy finds the visual tokens by their ids: pass input_ids, not inputs_embeds alone"
            )
        if cache is not None:
            check_cache(cache)
        self._start = starts_of(self.mllm, inputs.get("attention_mask"))
        self.prefill, self._decoding = None, cache is not None and cache.get_seq_length() > 0
        if self._decoding:
            self._check_continued(cache, input_ids, inputs.get("pixel_values"))
            self._steps.begin(self._start, together=any(policy.watches_steps for policy, _, _ in self.policies))
            return
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UnsupportedError("a policy needs a 2-D attention mask [batch, length] to tell padding from text")
        layout = self._layout(input_ids, mask, inputs.get(VISUAL_MARKS))
        self.prefill = Prefill(
            self.mllm,
            layout,
            hidden=input_ids.new_empty(0),
            _kept=~layout.padding,
            input_ids=input_ids,
            inputs=self._prompt | {name: each for name, each in inputs.items() if each is not None},
        )
        if self.prefill.ends_with_visual:
            self.prefill = None
            raise UnsupportedError("a prompt ends with a visual token, so no text token would be left to answer from")
        for _, _, run in self.policies:
            run.prefill = self.prefill

    def _layout(self, input_ids: Tensor, mask: Tensor | None, marks: Tensor | None) -> TokenLayout:
        found = self.mllm.layout(input_ids, mask, marks)
        for _, layout, run in self.policies:
            if layout is None:
                continue
            if run.prefill is not None:
                raise UnsupportedError("a layout belongs to one prefill: enter the block anew for the next batch")
            given = layout.to(input_ids.device)
            if given.roles.shape != found.roles.shape or not torch.equal(given.padding, found.padding):
                raise UnsupportedError(
                    f"the layout given to the policy is of another batch: its shape is {tuple(given.roles.shape)} and "
                    f"that of the inputs {tuple(found.roles.shape)}, or their padding differs"
                )
            if (given.visual & ~found.visual).any():
                raise UnsupportedError("the layout given to the policy has visual positions where the inputs have none")
            return given
        return found

    def _check_continued(self, cache: Cache, input_ids: Tensor, pixel_values: Tensor | None) -> None:
        filled_under = getattr(cache, "dyvte_policies", [])
        active = [policy for policy, _, _ in self.policies]
        if not same_settings(filled_under, active):
            names, now = (", ".join(map(repr, each)) or "no policy" for each in (filled_under, active))
            weights = "; their weights differ" if names == now else ""
            raise UnsupportedError(
                f"the KV cache was filled under {names}, which is not the policy of this block ({now}{weights}); "
                "prefill again"
            )
        # A single token was generated; that it is the image token (of a model with random weights) does not matter.
        if pixel_values is not None or (input_ids.shape[1] > 1 and self.mllm.layout(input_ids).visual.any()):
            raise UnsupportedError(
                "images in a later part of a prompt (chunked prefill, a further turn) are not supported"
            )

    def _end(self, *_: Any) -> None:
        self._calls.pop()
        if self._calls:
            return
        self._steps.end()
        if self.prefill is not None:
            self.prefill.hidden = self.prefill.hidden.new_empty(0)  # do not hold on to activations
            self.prefill.inputs = {}
            self.prefill.forget()
        self.prefill, self._decoding = None, False

    # -------------------------------------------------------------------------- a layer

    def _run_layer(self, call: LayerCall) -> Any:
        if self._decoding and runs_together(self.mllm.attentions[call.index]):
            return call.run()
        if self._decoding:
            index, layers = self._cache_index(call.index), call.cache.layers
            layer = layers[index] if index < len(layers) else None  # none for borrowers
            return self._steps.run_layer(self._with_keys_hidden(call, layer), layer)
        if self.prefill is None:
            raise UnsupportedError(
                f"decoder layer {call.index} was called outside of {type(self.mllm.model).__name__}.forward; a policy "
                "needs the ids of the whole model's forward call"
            )
        return self._prefill_layer(call, self.prefill)

    def _with_keys_hidden(self, call: LayerCall, layer: Any) -> LayerCall:
        """The call without the keys that a policy hides from generated tokens."""
        for policy, _, run in self.policies:
            if type(policy).hidden_keys is Policy.hidden_keys:
                continue
            if run.prefill is None or len(run.prefill.kept) != len(call.hidden):
                raise UnsupportedError(
                    f"{type(policy).__name__} chooses keys for generated tokens by what it saw in their prefill: "
                    "decode in the block of that prefill, with the same rows"
                )
            with overhead():
                hidden = policy.hidden_keys(call.index, run.prefill)
            if hidden is not None:
                call = without_keys(call, hidden, layer)
        return call

    def _prefill_layer(self, call: LayerCall, prefill: Prefill) -> Any:
        if call.index == 0 and call.cache is not None:
            check_cache(call.cache)
            restore_layers(call.cache)
            call.cache.dyvte_policies = [copy.copy(policy) for policy, _, _ in self.policies]
        prefill.hidden = call.hidden
        with overhead():
            for policy, _, _ in self.policies:
                policy.before_layer(call.index, prefill)
        selections = prefill.selections()
        prefill.count_layer()
        hidden, attention = prefill.hidden, self.mllm.attentions[call.index]
        if selections is None:
            knowing: AbstractContextManager[None] = nullcontext()
            if self._start is not None:
                at = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
                knowing = running_at(attention, at, at, None, hidden.shape[1], self._start)
            with prefill.running_on(None), knowing:
                return call.run(hidden)
        if runs_together(attention):
            return self._all_rows(call, prefill)
        layer = None if call.cache is None else self._kept_layer(call)
        result, output, sharing = hidden.clone(), None, PrefillSharing(call)
        for selection in selections:
            key_bias = prefill.key_bias
            if key_bias is not None:
                key_bias = selection.remembered("key bias", key_bias, functools.partial(selection.pack, key_bias))
            storing = nullcontext() if layer is None else layer.prefilling(selection, key_bias)
            at = selection.index
            start = None if self._start is None else self._start[selection.rows]
            with (
                prefill.running_on(selection),
                storing,
                running_at(attention, at, at, selection.valid, hidden.shape[1], start),
            ):
                packed = call.packed(selection, key_bias, prefill.places(selection)) | sharing.on(selection)
                output = call.run(selection.pack(hidden), **packed)
            selection.put_back(result, output_states(output))
        if layer is not None:
            layer.finish_prefill(hidden.shape[1])
        return with_states(output, result)

    def _all_rows(self, call: LayerCall, prefill: Prefill) -> Any:
        """A layer that `runs_together`: all rows at once, so that it fills its layer of the cache itself."""
        if prefill.key_bias is not None and self.mllm.attentions[call.index] is not None:
            raise UnsupportedError(
                f"decoder layer {call.index} pools the keys of its tokens and takes no bias for those that were merged"
            )
        selection, result = prefill.selection_behind_padding(), prefill.hidden.clone()
        assert selection is not None
        with prefill.running_on(selection):
            packed = packed_arguments(call, selection, prefill.places(selection))
            output = call.run(selection.pack(prefill.hidden), **packed)
        selection.put_back(result, output_states(output))
        return with_states(output, result)

    def _kept_layer(self, call: LayerCall) -> KeptLayer | BorrowingLayer:
        """The layer of the KV cache for a decoder layer that leaves positions out."""
        engines, model = self._engines, weakref.ref(self.mllm.model)

        def under_policy() -> bool:
            return (alive := model()) is not None and alive in engines

        borrows = borrows_keys(self.mllm.attentions[call.index])
        return kept_layer(call.cache, self._cache_index(call.index), borrows, under_policy)

    def _cache_index(self, layer: int) -> int:
        return getattr(self.mllm.attentions[layer], "layer_idx", layer)
