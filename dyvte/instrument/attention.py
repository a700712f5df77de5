"""Attention statistics of every decoder layer while a model runs, without keeping attention maps.

The model computes its attention as always, bit for bit; the probe looks at the queries and keys that go into it and
reduces them to sums over token roles (`dyvte.instrument.role_attention`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dyvte.errors import UnsupportedError
from dyvte.instrument.attention_calls import AttentionCall, watch_attention
from dyvte.instrument.contributions import OutputProjection, RoleKeys, ValueMixtures
from dyvte.instrument.role_attention import (
    ENTROPIES,
    QUESTION,
    Geometry,
    Groups,
    RoleSums,
    allowed_pairs,
    entropy_queries,
    role_sums,
    stack_heads,
    stack_layers,
)
from dyvte.instrument.running_state import over_all_layers
from dyvte.layout import INSTRUCTION, ROLES, VISUAL, TokenLayout
from dyvte.mllm import MLLM, as_mllm
from dyvte.model_parts import VISUAL_MARKS, cache_among, inner_models

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("mass", "mean_score", "enrichment", "mass_no_sink", "mean_score_no_sink", "enrichment_no_sink")
"""The measures between two roles; definitions at `AttentionStats`."""

CURVES = ("cross", "visual", "text")
"""The three curves of the DyVTE paper (arXiv 2411.19628, Fig. 2)."""

ALL_TEXT = len(ROLES)
"""Key group of every position that is neither visual nor padding, behind the four roles."""


@dataclass(frozen=True)
class AttentionStats:
    """Attention of one prefill: B samples, L layers, H heads, N positions, on the CPU in float32.

    Between roles, [B, L, H, 4, 4] (query role, key role; order `dyvte.ROLES`), NaN where a role is absent, and all of a
    layer that does not attend (see `MLLM.attention_layers`):

    - `mass`: mean over queries of the probability summed over the keys of a role.
    - `mean_score`: total probability over the pairs that the mask allows, divided by their number (NaN if 0).
    - `enrichment`: mass divided by the mass that attention spread evenly over all allowed keys would give.
    - `..._no_sink`: without the first token that is not padding as a key, as a ratio of sums over queries: probability
      on the keys of a role over what is not on the sink, so that a query with 99% on the sink counts a hundredth of one
      with nothing on it. Over heads likewise (`mean_over_heads`). Queries that see nothing else are left out.

    Of the question, [B, L, H], mean over the instruction queries after the last image, in nats:

    - `text_entropy`: entropy of the attention restricted to text keys and renormalised; `text_entropy_normalised` is
      divided by the log of the number of allowed text keys; `..._no_sink` without the sink.
    - `total_entropy`: entropy over all keys.

    Per key, [B, L, H, N]: `received_last` from the last prompt token, `received_instruction` the instruction's mean.

    Layers may differ in their heads: H is the most that one has, and the others' missing heads are NaN.

    The papers do not define their averages further than this; these are our reading.

    Attributes:
        layout: role of every position.
        cross_queries: the six measures for the queries of the question only, [B, L, H, 6, 5] in the order of `MEASURES`
            (with one image the same as the instruction's rows); the fifth key group is all text.
        not_on_sink: attention that the queries of each role, and of the question, do not give the sink, summed,
            [B, L, H, 5]: the weights of the heads in means without the sink.
        maps: [B, L, N, N] attention averaged over heads, None unless the probe was told to keep it.
        contribution_norm: [B, L, 4, 4] (query role, key role): what the keys of a role write into the residual stream
            through attention, its norm over that of the stream that enters the layer, mean over queries. None unless
            the probe was told to measure it, like the next (`dyvte.instrument.contributions`).
        contribution_share: [B, L, 4, 4] the part of what attention writes that comes from a role; shares add to 1 over
            key roles.

    Example:
        >>> with dyvte.AttentionProbe(mllm) as probe:
        ...     logits = mllm(**batch).logits
        >>> probe.stats.mass.shape  # [B, L, H, query role, key role]
        torch.Size([2, 12, 5, 4, 4])
    """

    layout: TokenLayout
    mass: Tensor
    mean_score: Tensor
    enrichment: Tensor
    mass_no_sink: Tensor
    mean_score_no_sink: Tensor
    enrichment_no_sink: Tensor
    cross_queries: Tensor
    not_on_sink: Tensor
    total_entropy: Tensor
    text_entropy: Tensor
    text_entropy_normalised: Tensor
    text_entropy_no_sink: Tensor
    text_entropy_normalised_no_sink: Tensor
    received_last: Tensor
    received_instruction: Tensor
    maps: Tensor | None
    contribution_norm: Tensor | None = None
    contribution_share: Tensor | None = None

    def curve(self, name: str, measure: str = "mass") -> Tensor:
        """One of the paper's curves, [B, L, H].

        Args:
            name: "cross" (question to visual), "visual" (visual to visual) or "text" (question to text).
            measure: one of `MEASURES`.
        """
        if name not in CURVES or measure not in MEASURES:
            raise ValueError(f"unknown curve {name!r} or measure {measure!r}; curves {CURVES}, measures {MEASURES}")
        if name == "visual":
            return getattr(self, measure)[..., VISUAL, VISUAL]
        return self.cross_queries[..., MEASURES.index(measure), VISUAL if name == "cross" else ALL_TEXT]

    def mean_over_heads(self, values: Tensor, measure: str, query: int) -> Tensor:
        """Mean [...] over heads of a measure [..., H], of which those without the sink are ratios of sums.

        Args:
            values: [B, L, H].
            measure: one of `MEASURES`.
            query: role of the queries, or `QUESTION`.
        """
        if not measure.endswith("_no_sink"):
            return values.nanmean(-1)
        weights = self.not_on_sink[..., query].nan_to_num()
        return (values.nan_to_num() * weights).sum(-1).where(values.isfinite().any(-1), torch.nan) / weights.sum(-1)

    def mean_curve(self, name: str, measure: str = "mass") -> Tensor:
        """Like `curve`, over all heads: [B, L]."""
        query = VISUAL if name == "visual" else QUESTION
        return self.mean_over_heads(self.curve(name, measure), measure, query)

    def to_frame(self, by_head: bool = False) -> pd.DataFrame:
        """A row per sample and layer (and head), mean over heads otherwise.

        Columns: `sample`, `layer`, (`head`,) `{cross,visual,text}_{measure}`, `{measure}_{query role}_{key role}` and
        the entropies.
        """
        import pandas as pd

        curve = self.curve if by_head else self.mean_curve
        values = {f"{name}_{measure}": curve(name, measure) for measure in MEASURES for name in CURVES}
        pairs = {f"{ROLES[q]}_{ROLES[k]}": (q, k) for q in range(len(ROLES)) for k in range(len(ROLES))}
        for measure in MEASURES:
            for roles, (query, key) in pairs.items():
                value = getattr(self, measure)[..., query, key]
                values[f"{measure}_{roles}"] = value if by_head else self.mean_over_heads(value, measure, query)
        for name in ("contribution_norm", "contribution_share"):
            if (table := getattr(self, name)) is not None:
                every = table[:, :, None].expand(-1, -1, self.mass.shape[2], -1, -1) if by_head else table
                values |= {f"{name}_{roles}": every[..., query, key] for roles, (query, key) in pairs.items()}
        entropies = {name: getattr(self, name) for name in ENTROPIES}
        values |= entropies if by_head else {name: value.nanmean(-1) for name, value in entropies.items()}
        axes = ["sample", "layer", "head"] if by_head else ["sample", "layer"]
        index = pd.MultiIndex.from_product([range(size) for size in values["cross_mass"].shape], names=axes)
        return pd.DataFrame({name: value.flatten().numpy() for name, value in values.items()}, index).reset_index()


def _with_all_text(by_key_role: Tensor) -> Tensor:
    """Append to the key roles [..., R] their sum (or "any") over the text roles: [..., R + 1]."""
    of_text = by_key_role[..., [role for role in range(len(ROLES)) if role != VISUAL]]
    return torch.cat([by_key_role, of_text.sum(-1, keepdim=True).to(by_key_role.dtype)], dim=-1)


def _assemble(layout: TokenLayout, sums: list[RoleSums], geometries: list[Geometry]) -> AttentionStats:
    """Turn the sums of all layers into statistics."""
    groups = geometries[0].groups
    queries = groups.queries.sum(-1)
    versions = {
        "": ([each.probability for each in sums], [each.counts for each in geometries], groups.merge_sink(groups.keys)),
        "_no_sink": (
            [each.probability_no_sink for each in sums],
            [each.counts_no_sink for each in geometries],
            groups.keys[..., 1:],
        ),
    }
    measures: dict[str, Tensor] = {}
    for suffix, (probabilities, counts, keys) in versions.items():
        has_key = _with_all_text(keys).sum(1) > 0
        absent = ~((queries > 0)[:, :, None] & has_key[:, None]).cpu()[:, None, None]
        sums_over_queries = stack_heads(probabilities)
        if suffix:  # what the queries would give if none of it went to the sink
            not_on_sink = sums_over_queries.sum(-1)
            seen = stack_layers(each.queries for each in counts)[:, :, None] / not_on_sink.clamp_min(1e-30)
            sums_over_queries = sums_over_queries * seen[..., None]
        total = _with_all_text(sums_over_queries).masked_fill(absent, torch.nan)  # [B, L, H, 5, 5]
        divisors = {
            "mass": stack_layers(each.queries[..., None] for each in counts),
            "mean_score": _with_all_text(stack_layers(each.pairs for each in counts)),
            "enrichment": _with_all_text(stack_layers(each.uniform for each in counts)),
        }
        measures |= {name + suffix: total / divisor[:, :, None] for name, divisor in divisors.items()}

    entropy = stack_heads(each.entropy for each in sums)
    entropy /= stack_layers(entropy_queries(each).sum(-1) for each in geometries)[:, :, None]
    received = stack_heads(each.received for each in sums)
    maps = [each.mean_map for each in sums if each.mean_map is not None]
    return AttentionStats(
        layout=layout.to("cpu"),
        not_on_sink=not_on_sink,
        cross_queries=torch.stack([measures[name][..., QUESTION, :] for name in MEASURES], dim=-2),
        received_last=received[..., 0, :],
        received_instruction=received[..., 1, :] / queries[:, INSTRUCTION].cpu()[:, None, None, None],
        maps=stack_layers(maps) if maps else None,
        **{name: measures[name][..., : len(ROLES), : len(ROLES)] for name in MEASURES},
        **{name: entropy[..., index] for index, name in enumerate(ENTROPIES)},
    )


class _Pass:
    """One forward call of the model while it runs."""

    def __init__(self, layout: TokenLayout, num_heads: int) -> None:
        self.layout = layout
        self.num_heads = num_heads
        self.sums: dict[int, RoleSums] = {}
        self.residuals: dict[int, Tensor] = {}
        self.mixtures: dict[int, ValueMixtures] = {}
        self.contributions: dict[int, tuple[Tensor, Tensor]] = {}
        self.geometries: dict[int, Geometry] = {}
        self._groups: dict[torch.device, Groups] = {}
        self._known: dict[tuple[Any, ...], tuple[Any, Geometry]] = {}
        self._role_keys: dict[int, RoleKeys] = {}

    def geometry(self, call: AttentionCall) -> Geometry:
        """What the mask of a call allows; layers that share a mask (and a device) share the result."""
        device = call.query.device
        name = (id(call.mask), call.causal, call.sliding_window, device)
        if name not in self._known:
            if device not in self._groups:
                self._groups[device] = Groups.of(self.layout.to(device))
            length = self.layout.roles.shape[1]
            allowed, bias = allowed_pairs(call.mask, length, call.causal, call.sliding_window, device)
            geometry = Geometry.of(self._groups[device], allowed, bias, self.num_heads)
            self._known[name] = (call.mask, geometry)  # holding the mask keeps its id taken
        return self._known[name][1]

    def role_keys(self, geometry: Geometry) -> RoleKeys:
        """Where the roles' keys are, for one of this pass's geometries."""
        if id(geometry) not in self._role_keys:
            self._role_keys[id(geometry)] = RoleKeys.of(geometry)
        return self._role_keys[id(geometry)]


class AttentionProbe:
    """Measure the attention between token roles while the model runs.

        with AttentionProbe(mllm) as probe:
            mllm.model(**batch)
        probe.stats.mass[..., 2, 1]      # instruction -> visual, [samples, layers, heads]

    Outputs of the model do not change by a bit. Probes nest, and leave nothing behind however the block is left. Roles
    are found from the `input_ids` of each prefill; calls that continue a KV cache are not measured.

    Attributes:
        history: statistics of every prefill seen, in order.

    Example:
        >>> with dyvte.AttentionProbe(mllm) as probe:
        ...     logits = mllm(**batch).logits
        >>> probe.stats.mass[..., 2, 1].shape  # instruction -> visual, [B, L, H]
        torch.Size([2, 12, 5])
    """

    def __init__(
        self,
        model: MLLM | nn.Module,
        layout: TokenLayout | None = None,
        maps: bool = False,
        contributions: bool = False,
    ) -> None:
        """Prepare a probe.

        Args:
            model: an `MLLM`, or a transformers model (compiled, of PEFT, or plain).
            layout: roles of the positions, to tell a teacher-forced answer from the instruction; by default found from
                the ids of each call.
            maps: also keep attention maps averaged over heads, [B, L, N, N].
            contributions: also measure what every role writes into the residual stream (`contribution_norm`,
                `contribution_share`).
        """
        self.mllm = as_mllm(model)
        self.history: list[AttentionStats] = []
        self._layout = layout
        self._maps = maps
        self._contributions = contributions
        self._projections: dict[int, OutputProjection] = {}
        self._pass: _Pass | None = None
        self._skip = False
        self._running: nn.Module | None = None
        self._exit: ExitStack | None = None

    @property
    def stats(self) -> AttentionStats:
        """Statistics of the last prefill."""
        if not self.history:
            raise RuntimeError("the probe has seen no prefill yet: run the model inside its `with` block")
        return self.history[-1]

    def __enter__(self) -> AttentionProbe:
        if self._exit is not None:
            raise RuntimeError("this probe is active already; make a second one to nest")
        watched = [self.mllm.model, *inner_models(self.mllm.model)]

        # Nothing is done on a deep copy of the model, nor when a wrapper calls its inner model.
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(module is each for each in watched) and (self._running is None or module is watched[0]):
                self._begin(args, kwargs)
                self._running = module

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is self._running:
                self._running = None
                self._end()

        with ExitStack() as stack:
            stack.enter_context(watch_attention(self.mllm, self._see))
            for module in watched:
                stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(end).remove)
            if self._contributions:
                self._watch_contributions(stack)
            self._exit = stack.pop_all()
        return self

    def _watch_contributions(self, stack: ExitStack) -> None:
        """Note what enters every layer, and wait for the projection that its heads go through."""

        def note(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if self._pass is not None and module is self.mllm.layers[index]:
                    self._pass.residuals[index] = args[0] if args else kwargs["hidden_states"]

            return hook

        def projected(index: int) -> Callable[[nn.Module, Tensor], None]:
            return lambda projection, output: self._project(index, projection, output)

        self._projections = {}
        for index in self.mllm.attention_layers:
            stack.callback(self.mllm.layers[index].register_forward_pre_hook(note(index), with_kwargs=True).remove)
            self._projections[index] = OutputProjection(self.mllm.attention_of(index), projected(index))
            stack.callback(self._projections[index].remove)

    @torch.no_grad()
    def _project(self, index: int, projection: nn.Module, output: Tensor) -> None:
        current = self._pass
        assert current is not None
        mixtures, residual = current.mixtures.pop(index), current.residuals.pop(index)
        current.contributions[index] = mixtures.through(projection, output, residual)

    def __exit__(self, *_: object) -> None:
        stack, self._exit, self._pass, self._running = self._exit, None, None, None
        if stack is not None:
            stack.close()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = inspect.signature(type(self.mllm.model).forward).parameters
        inputs = dict(zip(list(names)[1:], args, strict=False)) | kwargs
        cache = cache_among(inputs)
        self._skip = cache is not None and cache.get_seq_length() > 0
        self._pass = None
        if self._skip:
            return
        if inputs.get("input_ids") is None:
            raise UnsupportedError(
                "AttentionProbe finds the visual tokens by their ids: pass input_ids, not inputs_embeds alone"
            )
        layout = self._layout
        if layout is None:
            layout = self.mllm.layout(inputs["input_ids"], inputs.get("attention_mask"), inputs.get(VISUAL_MARKS))
        elif layout.roles.shape != (shape := inputs["input_ids"].shape):
            raise ValueError(
                f"the probe's layout is for inputs of shape {tuple(layout.roles.shape)}, the model got {tuple(shape)}"
            )
        self._pass = _Pass(layout, self.mllm.num_heads)

    def _end(self) -> None:
        current, self._pass, skipped, self._skip = self._pass, None, self._skip, False
        if current is None or skipped:
            return
        order = self.mllm.attention_layers
        if silent := [index for index in order if index not in current.sums]:
            module: Any = self.mllm.attentions[silent[0]]
            raise UnsupportedError(
                f"AttentionProbe saw nothing of decoder layer {silent[0]} ({type(module).__name__}, attention "
                f"{module.config._attn_implementation!r}): its attention does not go through transformers' attention "
                "functions"
            )
        sums, geometries = [current.sums[index] for index in order], [current.geometries[index] for index in order]
        stats = _assemble(current.layout, sums, geometries)
        for index, projection in self._projections.items():
            projection.check(type(self.mllm.attentions[index]).__name__)
        if self._contributions:
            norms, shares = zip(*(current.contributions[index] for index in order), strict=True)
            stats = replace(stats, contribution_norm=stack_layers(norms), contribution_share=stack_layers(shares))
        self.history.append(over_all_layers(stats, order, self.mllm.num_layers))

    @torch.no_grad()
    def _see(self, index: int, call: AttentionCall) -> None:
        if self._skip:
            return
        current = self._pass
        if current is None:
            raise UnsupportedError(
                f"decoder layer {index} was called outside of {type(self.mllm.model).__name__}.forward; AttentionProbe "
                "needs the ids of the whole model's forward call"
            )
        length = current.layout.roles.shape[1]
        if (
            call.query.shape[0] != current.layout.roles.shape[0]
            or call.query.shape[2] != length
            or index in current.sums
        ):
            raise UnsupportedError(
                f"AttentionProbe saw decoder layer {index} run on {call.query.shape[2]} of {length} positions: it "
                "cannot look into a model whose layers a policy or a sweep drives"
            )
        geometry = current.geometry(call)
        current.geometries[index] = geometry
        num_heads = call.query.shape[1]
        mixtures = None
        if self._contributions:
            mixtures = ValueMixtures(call.value[:, :, :length], current.role_keys(geometry), num_heads)
        also = None if mixtures is None else mixtures.add
        current.sums[index] = role_sums(call.rows(geometry), geometry, num_heads, self._maps, also)
        if mixtures is not None:
            current.mixtures[index] = mixtures
            self._projections[index].expect(call.output)
