"""The gates of all layers as one module, saved in the layout of the Hugging Face Hub."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dyvte.errors import ModelError
from dyvte.gates.features import GATE_PARTS, QUESTION, width_of
from dyvte.instrument.states import TEXT_STATUS
from dyvte.runs.locks import locked, write_atomic
from dyvte.runs.store import write_json
from dyvte.stored_files import check_safetensors, read_json, reason_of, short

if TYPE_CHECKING:
    from dyvte.mllm import MLLM

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_HUB_SETTINGS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
TESTBED = Path(__file__).parents[1] / "testbed"
SHIPPED_GATES = {
    "llava_shapes": TESTBED / "gates",
    "llava_shapes_waiting": TESTBED / "gates_waiting",
    "llava_smol": TESTBED / "smol" / "gates",
}
"""Gates that come with the package: a model's by its name, others of that model with their recipe's behind it."""


class Gates(nn.Module, PyTorchModelHubMixin, library_name="dyvte", tags=["visual-token-exit", "dyvte"]):
    """One small classifier per decoder layer that looks at the token status after it and says stay (0) or exit (1).

    Per layer `Linear(I -> width) -> GELU -> Linear(width -> 2)`, in DyVTE (arXiv 2411.19628, Section 4, and its
    published code) without biases. Gate i decides after decoder layer i; its exit layer is k = i + 1. A model of L
    layers has L - 1 gates, since after the last layer nothing is left to save.

    Attributes:
        num_layers: L, decoder layers of the model that the gates are for, at least 2.
        hidden_size: d, the model's hidden size.
        status: what the gates look at, of `dyvte.gates.features.GATE_PARTS`; I entries in all, P * d for P statuses.
        width: hidden width of a gate; by default half the hidden size (2048 for 4096, as in the paper).
        threshold: exit where the exit probability is above it. One number, or one a gate.
        facts: how the gates were made (model, data, recipe, validation figures), for the model card; JSON types only.
        bias: whether the first layer has one, 0 at first. Standardised statuses need it: raw ones have entries that
            hardly vary and serve as one.
        shared: one gate for all layers, which differ in the bias alone: a layer code of `width` numbers each.
        cumulative: gate i gives the hazard, the probability that exit k = i + 1 is the first right one given that none
            before was; the probability of exit is that some gate so far has found it.
        shift, scale: [L - 1, I] the status is standardised as `(status - shift) * scale`; 0 and 1 leave it as is.

    Example:
        >>> gates = dyvte.Gates(num_layers=12, hidden_size=256, width=8)
        >>> gates.threshold
        0.5
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        status: Sequence[str] = TEXT_STATUS,
        width: int | None = None,
        bias: bool = False,
        threshold: float | Sequence[float] = 0.5,
        facts: Mapping[str, Any] | None = None,
        shared: bool = False,
        cumulative: bool = False,
    ) -> None:
        """Make untrained gates, Xavier-initialised from torch's generator.

        Raises:
            ModelError: an unknown status part, no layer to exit before, or shared gates without a bias.
        """
        super().__init__()
        unknown = [part for part in status if part not in GATE_PARTS]
        if unknown or not status:
            known = ", ".join(part for part in GATE_PARTS if part != QUESTION)
            raise ModelError(f"gates: status {list(status)} must be parts of {known}")
        if num_layers < 2:
            raise ModelError(f"gates: a model of {num_layers} layer has no layer that visual tokens could leave before")
        if shared and not bias:
            raise ModelError("gates: shared gates need a bias, which is what tells the layers apart")
        self.num_layers, self.hidden_size = num_layers, hidden_size
        self.shared, self.cumulative = shared, cumulative
        self.status = tuple(status)
        self.width = width or hidden_size // 2
        self.threshold: float | list[float] = threshold if isinstance(threshold, (int, float)) else list(threshold)
        self.facts = dict(facts or {})
        inputs = sum(width_of(part, hidden_size) for part in self.status)
        own = 1 if shared else num_layers - 1
        self.inner = nn.Parameter(torch.empty(own, inputs, self.width))
        self.inner_bias = nn.Parameter(torch.zeros(num_layers - 1, 1, self.width)) if bias else None
        self.outer = nn.Parameter(torch.empty(own, self.width, 2))
        for gate in range(own):
            nn.init.xavier_normal_(self.inner[gate])
            nn.init.xavier_normal_(self.outer[gate])
        self.register_buffer("shift", torch.zeros(num_layers - 1, inputs))
        self.register_buffer("scale", torch.ones(num_layers - 1, inputs))
        self.shift: Tensor
        self.scale: Tensor

    def __repr__(self) -> str:
        parts = " + ".join(self.status)
        return f"Gates({len(self)} gates for {self.num_layers} layers of width {self.hidden_size}, {parts})"

    def __len__(self) -> int:
        return self.num_layers - 1

    def forward(self, status: Tensor) -> Tensor:
        """Logits [B, L - 1, 2] (stay, exit) of the statuses [B, L - 1, I] after every layer but the last."""
        return self.decisions(self.logits(status))

    def logits(self, status: Tensor) -> Tensor:
        """What every gate gives by itself, [B, L - 1, 2]: (stay, exit), or (not yet, now) if gates are cumulative."""
        standardised = (status.to(self.inner.dtype) - self.shift) * self.scale
        gates = len(self)
        hidden = torch.bmm(standardised.transpose(0, 1), self.inner.expand(gates, -1, -1))
        if self.inner_bias is not None:
            hidden = hidden + self.inner_bias
        return torch.bmm(F.gelu(hidden), self.outer.expand(gates, -1, -1)).transpose(0, 1)

    def decisions(self, logits: Tensor) -> Tensor:
        """Logits (stay, exit) [B, L - 1, 2] from those of `logits`."""
        if not self.cumulative:
            return logits
        not_yet = logits.log_softmax(-1)[..., 0].cumsum(1)
        found = torch.log(-torch.expm1(not_yet.clamp(max=-torch.finfo(logits.dtype).eps)))
        return torch.stack([not_yet, found], dim=-1)

    def exit_probability(self, status: Tensor, layer: int, before: Tensor | None = None) -> Tensor:
        """[B] probability of exit by the gate after decoder layer `layer` (0-based), from its status [B, I].

        `before` [B] is what the gate one layer before said; cumulative gates need it behind their first.
        """
        own = 0 if self.shared else layer
        standardised = (status.to(self.inner.dtype) - self.shift[layer]) * self.scale[layer]
        if self.inner_bias is None:
            hidden = standardised @ self.inner[own]
        else:
            hidden = torch.addmm(self.inner_bias[layer], standardised, self.inner[own])
        found = (F.gelu(hidden) @ self.outer[own]).softmax(-1)[:, 1]
        return found if before is None or not self.cumulative else 1 - (1 - before) * (1 - found)

    def thresholds(self, threshold: float | Sequence[float] | None = None) -> list[float]:
        """One threshold a gate, from one number, one a gate, or None for the gates' own.

        Raises:
            ValueError: not L - 1 of them.
        """
        chosen = self.threshold if threshold is None else threshold
        listed = [float(chosen)] * len(self) if isinstance(chosen, (int, float)) else [float(each) for each in chosen]
        if len(listed) != len(self):
            raise ValueError(f"threshold: need one number or {len(self)}, one a gate, got {len(listed)}")
        return listed

    def check(self, mllm: MLLM) -> None:
        """Refuse a model that these gates were not made for.

        Raises:
            ModelError: other depth or width.
        """
        if (self.num_layers, self.hidden_size) != (mllm.num_layers, mllm.hidden_size):
            raise ModelError(
                f"these gates are for a model of {self.num_layers} layers of width {self.hidden_size}, this one has "
                f"{mllm.num_layers} of width {mllm.hidden_size}: train gates for it with `python -m dyvte.train`"
            )

    def config(self) -> dict[str, Any]:
        """What `config.json` holds: the arguments of the constructor."""
        names = ("num_layers", "hidden_size", "width", "threshold", "facts", "shared", "cumulative")
        own = {name: getattr(self, name) for name in names}
        return {**own, "status": list(self.status), "bias": self.inner_bias is not None}

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: _compact(tensor.detach().cpu().contiguous()) for name, tensor in self.state_dict().items()}
        write_atomic(save_directory / WEIGHTS, lambda out: out.write(save(weights, metadata={"format": "pt"})))
        write_json(save_directory / CONFIG, self.config())
        card = str(self.generate_model_card())
        write_atomic(save_directory / "README.md", lambda out: out.write(card.encode()))

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> str | None:
        """Write the gates into a folder, or push them to the Hub (see `huggingface_hub.ModelHubMixin`)."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        with locked(Path(save_directory), inside=False):  # or the weights of one could end beside the config of another
            return super().save_pretrained(save_directory, **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **settings: Any) -> Gates:
        """Read gates from a folder or from the Hub.

        Raises:
            ModelError: a file is missing or damaged, or the files do not belong together.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
                raise ModelError(
                    f"no gates in {folder}: {' and '.join(missing)} missing, which `python -m dyvte.train` writes"
                )
            read_json(folder / CONFIG)
        return super().from_pretrained(pretrained_model_name_or_path, **settings)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **settings: Any) -> Gates:
        hub = {name: settings.pop(name) for name in _HUB_SETTINGS}
        file = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            file = Path(hf_hub_download(model_id, WEIGHTS, **hub))
        _check_settings(f"{model_id}/{CONFIG}", settings)
        shapes = {name: shape for name, (_, shape) in check_safetensors(file).items()}
        if shapes.get("shift", [0])[0] != settings["num_layers"] - 1:  # before so many are made
            raise ModelError(
                f"cannot load the gates in {model_id}: {WEIGHTS} and {CONFIG} disagree (weights of "
                f"{shapes.get('shift', [0])[0]} gates, num_layers is {settings['num_layers']})"
            )
        with torch.device("meta"):  # numbers from a file may ask for any amount of memory
            expected = {name: list(tensor.shape) for name, tensor in cls(**settings).state_dict().items()}
        for name in sorted({**expected, **shapes}):
            if expected.get(name) != shapes.get(name):
                raise ModelError(
                    f"cannot load the gates in {model_id}: {WEIGHTS} and {CONFIG} disagree ({name} has shape "
                    f"{shapes.get(name, 'none')}, {CONFIG} asks for {expected.get(name, 'none')})"
                )
        gates = cls(**settings)
        gates.load_state_dict(load_file(file, device=map_location))
        if broken := [name for name, tensor in gates.state_dict().items() if not tensor.isfinite().all()]:
            raise ModelError(
                f"{file} is damaged ({broken[0]} holds numbers that are not finite): train the gates again"
            )
        return gates.to(map_location).eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README of a folder of gates, from `facts`."""
        return ModelCard(model_card(self))


def _check_settings(file: str, settings: Mapping[str, Any]) -> None:
    """Refuse a `config.json` that is not one of gates, by name of the entry."""

    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**20

    layers, width, status = (settings.get(name) for name in ("num_layers", "width", "status"))
    thresholds = settings.get("threshold", 0.5)
    numbers = thresholds if isinstance(thresholds, list) else [thresholds]
    gates = layers - 1 if isinstance(layers, int) else 0
    right = {
        "num_layers": (whole(layers, 2), "a whole number of at least 2"),
        "hidden_size": (whole(settings.get("hidden_size"), 1), "a whole number of at least 1"),
        "width": (width is None or whole(width, 1), "a whole number of at least 1"),
        "status": (
            "status" not in settings or (isinstance(status, list) and all(isinstance(each, str) for each in status)),
            "a list of texts",
        ),
        **{
            name: (isinstance(settings.get(name, False), bool), "true or false")
            for name in ("bias", "shared", "cumulative")
        },
        "threshold": (
            all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers)
            and (thresholds is not numbers or len(numbers) == gates),
            "a number, or one for each layer but the last",
        ),
        "facts": (isinstance(settings.get("facts", {}), dict), "an object"),
    }
    for name, (fits, what) in right.items():
        if not fits:
            found = f"is {short(settings[name])}" if name in settings else "is missing"
            raise ModelError(f"{file} is not one of gates: {name} {found}, should be {what}")


def _compact(tensor: Tensor) -> Tensor:
    """In half precision if that loses nothing; loading gives the same numbers back."""
    half = tensor.half()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


def load_gates(source: str | Path | Gates) -> Gates:
    """Gates from a folder, a Hub id or the name of a shipped model (or as they are)."""
    if isinstance(source, Gates):
        return source
    source = SHIPPED_GATES.get(str(source), source)
    if not Path(source).is_dir() and (str(source).startswith((".", "/", "~")) or str(source).count("/") != 1):
        raise ModelError(f"no gates in {source}: there is no such folder; make gates with `python -m dyvte.train`")
    try:
        return Gates.from_pretrained(str(source))
    except ModelError:
        raise
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"no gates in {source}: its {CONFIG} is damaged ({reason_of(error)})") from error
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ModelError(f"no gates in {source}: neither a folder here nor found on the Hub ({reason})") from None


def model_card(gates: Gates) -> str:
    """A model card in Markdown: what the gates are for, how they were made, what they reached on validation data."""
    facts = gates.facts
    lines = [
        "---",
        "library_name: dyvte",
        "tags:",
        "- visual-token-exit",
        "- model_hub_mixin",
        "- pytorch_model_hub_mixin",
        "---",
        "",
        f"# Visual-token exit gates{' for ' + str(facts['model']) if 'model' in facts else ''}",
        "",
        f"{len(gates)} gates, one after each decoder layer but the last, for a model of {gates.num_layers} layers of "
        f"width {gates.hidden_size}. Each reads the token status ({', '.join(gates.status)}) during prefill and "
        "decides whether the visual tokens leave (DyVTE, arXiv 2411.19628).",
        "",
        "```python",
        "import dyvte",
        "",
        f'mllm = dyvte.load("{facts.get("model", "...")}")',
        'gates = dyvte.Gates.from_pretrained("FOLDER_OR_HUB_ID")',
        "with dyvte.DynamicExit(gates)(mllm):",
        '    print(mllm.generate(mllm.encode([image], ["..."])))',
        "```",
        "",
    ]
    for title, content in facts.items():
        if isinstance(content, Mapping):
            lines += [f"## {title.replace('_', ' ').capitalize()}", "", "| | |", "|---|---|"]
            lines += [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in content.items()]
            lines.append("")
    own = f"{gates.threshold:.4f}" if isinstance(gates.threshold, float) else _cell(gates.threshold)
    return "\n".join([*lines, f"Exit probability above which a gate says exit: {own}.", ""])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(each) for each in value)
    return json.dumps(value) if isinstance(value, (dict, bool)) or value is None else str(value)
