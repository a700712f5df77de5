"""What a GPU waits for, counted on any machine: operators dispatched, bytes that kernels write, reads by the host.

On a GPU a decoding step takes as long as its operators take to be launched, and every value that the host reads makes
it wait for the queue of kernels. Both are the same on every machine, and the same in every run.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from dyvte.mllm import MLLM


@dataclass
class Work:
    """What some part of a program dispatched.

    Attributes:
        operators: calls of ATen operators, those that make views included.
        kernels: those of them that compute or copy something.
        output_bytes: of what the kernels wrote.
        synchronisations: how often the host waited for values, or sent some: `item`, `tolist`, `nonzero`, indexing by a
            boolean tensor, tensors made of Python numbers.
    """

    operators: int = 0
    kernels: int = 0
    output_bytes: int = 0
    synchronisations: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Work) -> Work:
        return Work(*map(operator.sub, astuple(self), astuple(other)))


@dataclass
class LayerWork:
    """The work of a forward pass: of every decoder layer (with what a policy does before it), and of the rest."""

    layers: list[Work]
    rest: Work = field(default_factory=Work)

    @property
    def total(self) -> Work:
        """Of everything."""
        return sum(self.layers, self.rest)


class OperatorCounter(TorchDispatchMode):
    """Count what is dispatched within the block.

        with OperatorCounter() as counter:
            mllm.model(**batch)
        counter.work.operators

    Attributes:
        work: what was counted so far; give another object to count into that one.
        by_name: operators by their name.

    Example:
        >>> with OperatorCounter() as counter:
        ...     positive = int((torch.ones(3) > 0).sum())
        >>> counter.work.operators, counter.work.synchronisations
        (4, 1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.by_name: Counter[str] = Counter()
        self._reads = _HostReads(self)

    def __enter__(self) -> OperatorCounter:
        super().__enter__()
        self._reads.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reads.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator and run it."""
        result = func(*args, **(kwargs or {}))
        work, name = self.work, func.overloadpacket.__name__
        work.operators += 1
        self.by_name[name] += 1
        work.synchronisations += _synchronises(name, args, result)
        if name in _ALLOCATIONS:
            return result
        held = {_storage(each) for each in _tensors((args, kwargs)) if not func._schema.is_mutable}
        written = [each for each in _tensors(result) if _storage(each) not in held]
        work.kernels += bool(written) or name == "_local_scalar_dense"
        work.output_bytes += sum(each.nbytes for each in written)
        return result


class _HostReads(TorchFunctionMode):
    """Sees the methods that hand values to Python without an operator, on a CPU."""

    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a read and call the function."""
        if getattr(func, "__name__", "") in _READING_METHODS:
            self._counter.work.synchronisations += 1
        return func(*args, **(kwargs or {}))


_READING_METHODS = {"tolist", "numpy", "cpu", "__array__"}
_READING_OPERATORS = {
    "_local_scalar_dense",  # item, and every use as a Python number
    *("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
    *("equal", "is_nonzero", "bincount"),
}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}


def _synchronises(name: str, args: Any, result: Any) -> bool:
    if name in _READING_OPERATORS:
        return True
    if name == "lift_fresh":  # torch.tensor(numbers), sent from memory that is not pinned; one number may be filled in
        return result.ndim > 0 and result.numel() > 0
    if name in ("index_put", "index_put_", "_index_put_impl_") and args[2].numel() == 1:
        return False  # filled in by the mask
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return isinstance(args[-1], Tensor)
    if name in ("_to_copy", "copy_"):
        devices = {each.device.type for each in (*_tensors(args), *_tensors(result))}
        return len(devices) > 1
    return False


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def count_layers(mllm: MLLM) -> Iterator[LayerWork]:
    """Within the block: the work of every decoder layer, and of what runs outside of them. Not reentrant.

    Enter it inside of a policy's block to count what the policy does before a layer as that layer's.

    Example:
        >>> with dyvte.FixedExit(layer=3)(mllm), count_layers(mllm) as work:
        ...     logits = mllm(**batch).logits
        >>> work.layers[3].operators > work.layers[2].operators  # where the image leaves, what stays is packed
        True
    """
    found = LayerWork([Work() for _ in mllm.layers])

    def count_into(work: Work) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counter.work = work

        return hook

    with ExitStack() as stack:
        for layer, work in zip(mllm.layers, found.layers, strict=True):
            stack.enter_context(layer.register_forward_pre_hook(count_into(work)))
            stack.enter_context(layer.register_forward_hook(count_into(found.rest)))
        counter = stack.enter_context(OperatorCounter())
        counter.work = found.rest
        yield found
