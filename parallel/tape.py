"""Construction of a model on tensors without memory, and the values of any one of them afterwards.

Every operation of a constructor runs on fake tensors and is written down. The values of one tensor are had by running
again the operations that its values depend on, and no others; operations that draw random numbers do so from a key
of their own, so that the values do not depend on who asks, for what, and in which order (the idea of deferred
initialisation in torchdistX; there the draws depend on the order).
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from meshwright.parallel.errors import WrapError
from meshwright.parallel.randomness import keyed

__all__ = ["Tape", "View"]

_ATEN = torch.ops.aten
_OVERWRITES = {_ATEN.normal_, _ATEN.uniform_, _ATEN.zero_, _ATEN.fill_, _ATEN.copy_}
_QUESTIONS = {_ATEN._local_scalar_dense, _ATEN.equal, _ATEN.is_nonzero}


@dataclass(frozen=True)
class View:
    """A fake tensor as a window on its memory, which a number stands for."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def covers(self) -> bool:
        """Whether it is the whole memory, each element once."""
        elements = torch.Size(self.shape).numel()
        return self.offset == 0 and elements * self.dtype.itemsize == self.num_bytes and 0 not in self.stride


@dataclass(frozen=True)
class _Known:
    """A tensor that had values while the constructor ran."""

    tensor: Tensor
    version: int


@dataclass(frozen=True)
class _Entry:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Any, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    overwritten: int | None
    default_dtype: torch.dtype


class Tape(TorchDispatchMode):
    """What a constructor did, to be replayed for one tensor at a time.

    Args:
        seed: first part of the key of every random draw.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._entries: list[_Entry] = []
        self._storages: dict[int, Any] = {}  # held, so that no other storage gets the same number
        self._writers: dict[int, list[int]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, new tensors are fake and operations on them are written down."""
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # a deepcopy asks, once
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(self)
            yield

    def view(self, tensor: Tensor) -> View:
        """The window that a fake tensor is."""
        storage = tensor.untyped_storage()
        number = storage._cdata
        self._storages.setdefault(number, storage)
        return View(
            number,
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
            storage.nbytes(),
        )

    def values(self, view: View) -> Tensor:
        """A window's values at the end of construction, on CPU; only what they depend on is computed."""
        return self._replay([view], len(self._entries))[0]

    def recipe(self, view: View) -> str:
        """What a window's values depend on, as text: equal texts give equal values."""
        return (
            "\n".join(
                f"{number} {entry.func} {[leaf for leaf in tree_leaves((entry.args, entry.kwargs)) if _is_plain(leaf)]}"
                for number in sorted(self._needed({view.storage}, len(self._entries)))
                for entry in (self._entries[number],)
            )
            + f"\nseed {self._seed}"
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation on fake tensors and writes it down; answers questions about values."""
        del types
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(each, FakeTensor) for each in tensors):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func.overloadpacket in _QUESTIONS:
            return self._run_now(func, args, kwargs)
        written = _written(func, args, kwargs)
        if any(not isinstance(each, FakeTensor) for each in written):
            return self._run_now(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if written:
                raise
            return self._run_now(func, args, kwargs)
        self._write_down(func, (args, kwargs), written=written, result=result)
        return result

    def _run_now(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation with values, because its result decides what the constructor does next."""
        frozen_args, frozen_kwargs = tree_map(self._frozen, (args, kwargs))
        views = [leaf for leaf in tree_leaves((frozen_args, frozen_kwargs)) if isinstance(leaf, View)]
        found = iter(self._replay(views, len(self._entries)))
        real_args, real_kwargs = tree_map(
            lambda leaf: next(found) if isinstance(leaf, FakeTensor) else leaf, (args, kwargs)
        )
        with _disable_current_modes():
            return func(*real_args, **real_kwargs)

    def _write_down(self, func: Any, given: Any, *, written: list[Tensor], result: Any) -> None:
        args, kwargs = tree_map(self._frozen, given)
        sources = {leaf.storage for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, View)}
        outputs = tuple(self.view(leaf) for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor))
        fresh = {each.storage for each in outputs} - sources
        changed = [self.view(each) for each in written]
        writes = fresh | {each.storage for each in changed}
        if not writes:
            return  # a view: its window says all
        whole = [each.storage for each in changed if each.covers and func.overloadpacket in _OVERWRITES]
        reads = frozenset(sources) - frozenset(whole)
        overwritten = whole[0] if len(writes) == 1 and whole else None
        entry = _Entry(
            func,
            args,
            kwargs,
            outputs,
            reads,
            frozenset(writes),
            overwritten,
            torch.get_default_dtype(),
        )
        for storage in writes:
            self._writers.setdefault(storage, []).append(len(self._entries))
        self._entries.append(entry)

    def _frozen(self, leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor):
            return self.view(leaf)
        return _Known(leaf, leaf._version) if isinstance(leaf, Tensor) else leaf

    def _replay(self, views: list[View], end: int) -> list[Tensor]:
        memory: dict[int, Any] = {}
        with _disable_current_modes(), torch.no_grad():
            for number in sorted(self._needed({each.storage for each in views}, end)):
                self._run_again(number, memory)
            return [_window(each, memory) for each in views]

    def _needed(self, storages: set[int], end: int) -> set[int]:
        """Numbers of the entries that the values of some storages depend on, before entry `end`."""
        needed: set[int] = set()
        wanted = [(storage, end) for storage in storages]
        while wanted:
            storage, until = wanted.pop()
            for number in reversed([each for each in self._writers.get(storage, ()) if each < until]):
                entry = self._entries[number]
                if number not in needed:
                    needed.add(number)
                    wanted.extend((each, number) for each in (entry.reads | entry.writes) - {storage})
                if entry.overwritten == storage:
                    break
        return needed

    def _run_again(self, number: int, memory: dict[int, Any]) -> None:
        entry = self._entries[number]
        if entry.overwritten is not None and entry.overwritten not in memory:  # what made it was of no further use
            memory[entry.overwritten] = torch.UntypedStorage(self._storages[entry.overwritten].nbytes())

        def thawed(leaf: Any) -> Any:
            if isinstance(leaf, View):
                return _window(leaf, memory)
            return _unchanged(leaf, entry.func) if isinstance(leaf, _Known) else leaf

        args, kwargs = tree_map(thawed, (entry.args, entry.kwargs))
        kwargs.pop("generator", None)
        before = torch.get_default_dtype()
        torch.set_default_dtype(entry.default_dtype)
        try:
            if torch.Tag.nondeterministic_seeded in entry.func.tags:
                with keyed(self._seed, "weights", number):
                    result = entry.func(*args, **kwargs)
            else:
                result = entry.func(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)
        if "empty" in entry.func.__name__ and isinstance(result, Tensor):
            result.zero_()  # memory that nobody fills is the same on every rank
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for view, tensor in zip(entry.outputs, made, strict=True):
            memory.setdefault(view.storage, tensor.untyped_storage())


def _is_plain(leaf: Any) -> bool:
    return not isinstance(leaf, (View, _Known, torch.Generator))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that an operation changes in place."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _window(view: View, memory: dict[int, Any]) -> Tensor:
    if view.storage not in memory:
        raise WrapError(f"a tensor of shape {view.shape} was not made by the constructor that was recorded")
    window = torch.empty(0, dtype=view.dtype)
    return window.set_(memory[view.storage], view.offset, view.shape, view.stride)


def _unchanged(known: _Known, func: Any) -> Tensor:
    if known.tensor._version != known.version:
        raise WrapError(
            f"a tensor that the constructor gave to {func} was changed later, so the values cannot be made again; "
            "give it a clone"
        )
    return known.tensor
