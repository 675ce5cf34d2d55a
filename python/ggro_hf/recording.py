"""A function of tensors at fixed addresses, run again on a CPU as the ops it is made of, without Python in between.

Of a small model's decode step on a CPU nearly all the time is Python that decides what to run, and decides the same
for every token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ggro_hf.products import product_into
from ggro_kernels.library import NAMESPACE
from ggro_kernels.native import observing

R = TypeVar("R")

_Run = Callable[[], object]

_FAST = {
    f"aten::{name}": getattr(module, name.partition(".")[0])
    for module, names in {
        torch: "abs add.Scalar add.Tensor addmm bitwise_and.Tensor bmm cat cos cumsum div.Scalar div.Tensor eq.Scalar "
        "eq.Tensor exp ge.Scalar ge.Tensor gt.Scalar gt.Tensor index_select le.Scalar le.Tensor log logical_and "
        "logical_not lt.Scalar lt.Tensor maximum mean.dim minimum mm mul.Scalar mul.Tensor neg pow.Tensor_Scalar "
        "reciprocal rsqrt sigmoid sin sqrt sub.Tensor sum.dim_IntList tanh where.self",
        torch._C._nn: "gelu silu",
    }.items()
    for name in names.split()
}
"""What takes `out=` through torch's own argument parser, which costs half of what the overload's call does."""

_FAST_IN_PLACE = frozenset(
    {"add_", "copy_", "div_", "fill_", "index_copy_", "masked_fill_", "mul_", "neg_", "sub_", "zero_"}
)
_COPIES = frozenset({"clone", "_to_copy"})
_UNINITIALISED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_FRESH = "lift_fresh"
_OURS = frozenset({NAMESPACE, "ggro_hf"})


class CaptureError(RuntimeError):
    """Why a function cannot be captured."""


class Recording(Generic[R]):
    """A function of which one run's ops are kept, each with its operands; what they return is written where it was.

    The function is called once here and never again, so what Python does in it happens only here. Ops whose results
    depend on no tensor are not run again, nor are views. Results that are not in `outputs` share memory where one is
    dead before the other is made. Raises CaptureError where the function takes values to the host or draws random
    numbers, and whatever it raises itself.
    """

    asynchronous = False

    def __init__(self, function: Callable[[], R], device: torch.device) -> None:
        log = _Log()
        random = torch.random.get_rng_state()
        with _Unread(), log:
            self.outputs = function()
        if not torch.equal(torch.random.get_rng_state(), random):
            raise CaptureError("it draws random numbers")
        log.keep(leaf for leaf in tree_leaves(self.outputs) if isinstance(leaf, Tensor))
        # Leaving it is cheaper than autograd's look at every op, and tensors of either kind may be written.
        with torch.inference_mode():
            self._runs = tuple(_compiled(log))
        # What kernels have the address of.
        self._kept = log.kept

    @torch.inference_mode()
    def replay(self) -> None:
        """Run again."""
        for run in self._runs:
            run()


@dataclass(frozen=True, slots=True)
class _Operand:
    """Where a tensor lies."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def on(self, storages: dict[int, torch.UntypedStorage]) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storages[self.storage], self.offset, self.shape, self.strides)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An op that ran, its tensors described; or a call of the extension, which has addresses only."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[_Operand, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    kernel: _Run | None = None

    @property
    def name(self) -> str:
        return self.op._schema.name.partition("::")[2]


class _Log(TorchDispatchMode):
    """Takes down what is run."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[_Entry] = []
        self.kept: dict[int, torch.UntypedStorage] = {}
        # Those of results; their numbers are not used again as long as these are here.
        self.made: dict[int, StorageWeakRef] = {}
        self.sizes: dict[int, int] = {}
        # Those that nothing but constants went into, and nothing was written to since.
        self.constant: set[int] = set()

    def keep(self, tensors: Any) -> None:
        """Leave tensors where they are."""
        for tensor in tensors:
            storage = _storage(tensor)
            self.kept[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if _reads_values(func) and not _indexes(func, args):
            raise CaptureError(f"{func} brings values to the host")
        if func.namespace in _OURS:
            return self._run_ours(func, args, kwargs)
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        self._take_down(func, args, kwargs, result)
        return result

    def _run_ours(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One of our ops as the ops and the call of the extension that it is made of, if it makes such a call."""
        before = len(self.entries)
        calls = []

        def observe(kernel: _Run) -> None:
            calls.append(kernel)
            made = frozenset(operand.storage for entry in self.entries[before:] for operand in entry.results)
            given = frozenset(_storage(tensor)._cdata for tensor in _tensors(args))
            self.entries.append(_Entry(func, (), {}, (), given, made, kernel))
            self.constant -= made
            with _disable_current_modes():
                kernel()

        self.keep(_tensors(args))
        self._keeps_all = True
        try:
            with self, observing(observe):
                result = func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            if calls:
                return result
        # In eager torch it may look at values.
        except CaptureError:
            pass
        finally:
            self._keeps_all = False
        del self.entries[before:]
        return self._run(func, args, kwargs)

    _keeps_all = False

    def _take_down(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        given: dict[int, torch.UntypedStorage] = {}

        def describe(tensor: Tensor) -> _Operand:
            storage = _storage(tensor)
            given[storage._cdata] = storage
            return _describe(tensor, storage)

        described = _mapped(args, describe)
        described_kwargs = {name: _mapped(value, describe) for name, value in kwargs.items()}
        for number, storage in given.items():
            if number not in self.made:
                self.kept[number] = storage
        schema = func._schema
        if schema.is_mutable:
            writes = {
                operand.storage
                for argument, value in _named(schema, described, described_kwargs)
                if argument.alias_info is not None and argument.alias_info.is_write
                for operand in _operands(value)
            }
            self.entries.append(_Entry(func, described, described_kwargs, (), frozenset(given), frozenset(writes)))
            self.constant -= writes
            return
        constant = given.keys() <= self.constant
        if schema.name.endswith(_FRESH):
            # A tensor that Python has just made of numbers.
            self.constant.update(given)
        results, made = [], set()
        for tensor in _tensors(result):
            storage = _storage(tensor)
            number = storage._cdata
            results.append(_describe(tensor, storage))
            if number in given:
                continue
            made.add(number)
            self.made[number] = StorageWeakRef(storage)
            self.sizes[number] = storage.nbytes()
            if constant:
                self.constant.add(number)
            if constant or self._keeps_all:
                self.kept[number] = storage
        if made:
            self.entries.append(
                _Entry(func, described, described_kwargs, tuple(results), frozenset(given), frozenset(made))
            )


class _Unread(TorchFunctionMode):
    """Refuses what takes values to the host past the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise CaptureError(f"{func.__name__} brings values to the host")
        return func(*args, **(kwargs or {}))


def _compiled(log: _Log) -> Iterator[_Run]:
    """What a replay calls, in order."""
    entries = [
        entry
        for entry in log.entries
        if not (entry.results and (entry.writes <= log.constant or entry.name in _UNINITIALISED))
    ]
    storages = _shared(entries, log)
    for entry in entries:
        if entry.kernel is not None:
            yield entry.kernel
            continue

        def place(operand: _Operand) -> Tensor:
            return operand.on(storages)

        args = _mapped(entry.args, place)
        kwargs = {name: _mapped(value, place) for name, value in entry.kwargs.items()}
        yield _run_of(entry, args, kwargs, [place(operand) for operand in entry.results])


def _shared(entries: list[_Entry], log: _Log) -> dict[int, torch.UntypedStorage]:
    """Storages by number: those that are kept, and for others such as are free from their first use to their last."""
    last = {number: place for place, entry in enumerate(entries) for number in entry.reads | entry.writes}
    storages = dict(log.kept)
    free: dict[int, list[torch.UntypedStorage]] = {}
    for place, entry in enumerate(entries):
        numbers = entry.reads | entry.writes
        for number in numbers - storages.keys():
            size = log.sizes[number]
            unused = free.get(size)
            storages[number] = unused.pop() if unused else torch.empty(size, dtype=torch.uint8).untyped_storage()
        for number in numbers - log.kept.keys():
            if last[number] == place:
                free.setdefault(log.sizes[number], []).append(storages[number])
    return storages


def _run_of(entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> _Run:
    if not results:
        if entry.name in _FAST_IN_PLACE:
            return partial(getattr(args[0], entry.name), *args[1:], **kwargs)
        return partial(entry.op, *args, **kwargs)
    if entry.name in _COPIES:
        return partial(results[0].copy_, args[0])
    product = product_into(entry.op, args, kwargs, results[0])
    if product is not None:
        return product
    fast = _FAST.get(entry.op.name())
    if fast is not None:
        return partial(fast, *args, **kwargs, out=results[0])
    into = _out_overload(entry.op)
    if into is not None and len(into[1]) == len(results):
        overload, names = into
        inputs = {name: value for name, value in kwargs.items() if name not in _options(entry.op)}
        return partial(overload, *args, **inputs, **dict(zip(names, results, strict=True)))

    def copy() -> None:
        for target, source in zip(results, _tensors(entry.op(*args, **kwargs)), strict=True):
            target.copy_(source)

    return copy


@cache
def _out_overload(op: Any) -> tuple[Any, list[str]] | None:
    """The overload that writes where it is told, and the names of what it writes to; None where there is none."""
    packet = op._overloadpacket
    options = _options(op)
    expected = [(x.name, str(x.type)) for x in op._schema.arguments if x.name not in options]
    for name in packet.overloads():
        overload = getattr(packet, name)
        arguments = overload._schema.arguments
        inputs = [(argument.name, str(argument.type)) for argument in arguments if not argument.is_out]
        outputs = [argument.name for argument in arguments if argument.is_out]
        if inputs == expected and outputs:
            return overload, outputs
    return None


@cache
def _options(op: Any) -> frozenset[str]:
    """Arguments of a factory that are attributes of its result."""
    options = frozenset({"dtype", "layout", "device", "pin_memory"})
    return options if options <= {argument.name for argument in op._schema.arguments} else frozenset()


@cache
def _reads_values(op: Any) -> bool:
    return torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags


def _indexes(op: Any, args: Any) -> bool:
    """Whether the op takes elements by their numbers, so that the shape of its result depends on shapes only."""
    return op is torch.ops.aten.index.Tensor and not any(
        x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1])
    )


@cache
def _is_composite(op: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), DispatchKey.CompositeImplicitAutograd))


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_conj():
        raise CaptureError(f"it computes with a {type(tensor).__name__} of layout {tensor.layout}")
    return tensor.untyped_storage()


def _describe(tensor: Tensor, storage: torch.UntypedStorage) -> _Operand:
    offset = int(tensor.storage_offset())
    return _Operand(storage._cdata, tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Arguments with something else for every tensor, or the other way."""
    if isinstance(value, Tensor | _Operand):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, function) for item in value)
    return value


def _tensors(value: Any) -> list[Tensor]:
    return _leaves(value, Tensor)


def _operands(value: Any) -> list[_Operand]:
    return _leaves(value, _Operand)


def _leaves(value: Any, kind: type[Any]) -> list[Any]:
    if isinstance(value, kind):
        return [value]
    return [leaf for item in value for leaf in _leaves(item, kind)] if isinstance(value, tuple | list) else []


def _named(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for place, argument in enumerate(schema.arguments):
        yield argument, args[place] if place < len(args) else kwargs.get(argument.name)
