"""A model's own forward as a coroutine that stops where a stage begins.

Blocks get a class whose `__call__` asks a guide before it runs, so that neither the model's code nor hooks on blocks
notice. Where a stage begins, the pass stops and hands control back to whoever runs it, and its graph is cut: what the
stage takes from earlier ones becomes new leaves. What torch keeps for the thread belongs to the pass and is exchanged
whenever it stops.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from meshwright.parallel.passing import note_passing
from meshwright.parallel.randomness import skip_block
from meshwright.parallel.recompute import Frame
from meshwright.parallel.thread_state import ThreadState

__all__ = ["Arguments", "Flow", "Guide", "captured", "fresh"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block's call."""


class Guide(Protocol):
    """Who decides what happens at the calls of blocks."""

    @property
    def stages(self) -> Mapping[str, int]:
        """Block -> stage."""
        ...

    @property
    def first_stage(self) -> int:
        """The stage to which what comes before all blocks is counted."""
        ...

    def passes_by(self, block: str) -> bool:
        """Whether a call is left out, and `instead` is what it gives."""
        ...

    def instead(self, block: str) -> Any:
        """What a call that is left out gives."""
        ...

    def completed(self, block: str, arguments: Arguments) -> Arguments:
        """What a block takes, in the place of what the model gave it."""
        ...

    def gave(self, block: str, output: Any) -> None:
        """Told what a block gave."""
        ...


_FLOWS: dict[greenlet, "Flow"] = {}


class Flow:
    """One forward pass.

    Args:
        run: the pass; what it returns becomes `result`.
        guide: decides about calls.
        recomputed: names of blocks of which only the inputs are kept.

    Attributes:
        waits: name of the block whose call is next; None before the start and at the end.
        ended: whether the pass is over.
        arguments: of the call that waits.
        borders: (stage, sequence number) where each piece of the autograd graph begins. A node belongs to the last
            piece that began at or before its number.
        origins: leaf made at a border -> the edge of the graph that it continues.
        frames: stage -> calls that are recomputed.
    """

    def __init__(self, run: Callable[[], Any], guide: Guide, recomputed: Container[str] = ()) -> None:
        self.waits: str | None = None
        self.ended = False
        self.result: Any = None
        self.arguments: Arguments = ((), {})
        self.borders: list[tuple[int, int]] = []
        self.origins: Any = WeakTensorKeyDictionary()
        self.frames: dict[int, list[Frame]] = {}
        self._guide = guide
        self._recomputed = recomputed
        self._limit = -1
        self._stage = guide.first_stage
        self._given: list[_Cut] = []
        self._state = ThreadState()
        self._work = run
        self._coroutine = greenlet(self._run)

    def resume(self, limit: int = -1) -> None:
        """Runs the call that waits, and on to the next one of a stage beyond `limit`, or to the end."""
        self._limit = limit
        self._enter(self._coroutine.switch)

    def close(self) -> None:
        """Ends a pass that is not wanted any more."""
        if self._coroutine and not self.ended:
            self._enter(self._coroutine.throw)

    def call(self, name: str, block: nn.Module, kind: type[nn.Module], arguments: Arguments) -> Any:
        """Called inside, for a block whose own class is `kind`."""
        stage = self._guide.stages[name]
        if stage > self._limit:
            self.waits, self.arguments = name, arguments
            assert self._coroutine.parent is not None, name
            self._coroutine.parent.switch()
            self.waits, self.arguments = None, ((), {})
        if self._guide.passes_by(name):
            note_passing(block, *arguments)
            skip_block(name)
            return self._guide.instead(name)
        self._rebase()
        first, self._stage = stage > self._stage, max(stage, self._stage)
        remade = name in self._recomputed and torch.is_grad_enabled()
        if first:
            self._begin()
        args, kwargs = self._guide.completed(name, arguments)
        if remade:
            self._begin()
        if first or remade:
            self._given = []
            args = tuple(self._cut(each) for each in args)
            kwargs = {key: self._cut(each) for key, each in kwargs.items()}
        work = partial(kind.__call__, block)
        output = self._remade(name, work, args, kwargs) if remade else work(*args, **kwargs)
        self._rebase()
        self._guide.gave(name, output)
        return output

    def _remade(self, name: str, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a block of which only the inputs are kept."""
        leaves = {id(each.fresh): each.leaf for each in self._given}
        frame = Frame(f"block {name}", work, args, kwargs, leaves=leaves)
        self.frames.setdefault(self._stage, []).append(frame)
        return frame.run()

    def _enter(self, how: Callable[[], Any]) -> None:
        outside = ThreadState()
        self._coroutine.parent = getcurrent()
        self._state.enter(outside)
        try:
            how()
        finally:
            self._state = ThreadState()
            outside.enter(self._state)

    def _run(self) -> None:
        _FLOWS[getcurrent()] = self
        try:
            self._begin()
            self.result = self._work()
        finally:
            del _FLOWS[getcurrent()]
            self.ended, self.waits = True, None
            self._given = []

    def _begin(self) -> None:
        self.borders.append((self._stage, torch._C._autograd._get_sequence_nr()))

    def _cut(self, value: Any) -> Any:
        """The same value, tensors of earlier pieces as new leaves.

        In lists and dicts they stay, since blocks may add to them; the graph tells what comes from there.
        """
        if isinstance(value, Tensor):
            return self._cut_tensor(value)
        if value is None or isinstance(value, (list, dict, bool, int, str)):
            return value
        return tree_map(self._cut_tensor, value, is_leaf=lambda each: isinstance(each, (list, dict)))

    def _cut_tensor(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.grad_fn is None or not torch.is_grad_enabled():
            return value
        if value.grad_fn._sequence_nr() >= self.borders[-1][1]:
            return value
        for each in self._given:
            if each.value is value:
                return each.fresh
        leaf = value.detach().requires_grad_()
        self.origins[leaf] = get_gradient_edge(value)
        made = fresh(leaf)
        self._given.append(_Cut(value, leaf, made, made._version))
        return made

    def _rebase(self) -> None:
        """Where what a stage was given has been changed, others who hold it go on with the change's history."""
        for each in self._given:
            if each.fresh._version != each.version:
                _Rebased.apply(each.value, each.fresh)  # type: ignore[no-untyped-call]
                each.version = each.fresh._version


@dataclass(eq=False)
class _Cut:
    """A value, the leaf that goes on in its place, and the leaf's value as it is handed on."""

    value: Tensor
    leaf: Tensor
    fresh: Tensor
    version: int


def fresh(leaf: Tensor) -> Tensor:
    """A leaf's value as a tensor that may be changed in place; its gradient goes to the leaf."""
    return torch.ops.aten._unsafe_view.default(leaf, leaf.shape)  # type: ignore[no-any-return]


class _Rebased(Function):
    """A value whose memory was changed elsewhere takes over the history of that change."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.mark_dirty(inputs[0])
        return inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        del ctx
        return None, gradients[0]


@contextmanager
def captured(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Makes calls of blocks stop the flow they happen in; calls outside any flow are ordinary ones."""
    before = {name: type(block) for name, block in blocks.items()}
    for name, block in blocks.items():
        block.__class__ = _stopping(type(block), name)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, block in blocks.items():
            block.__class__ = before[name]


@lru_cache(maxsize=4096)
def _stopping(kind: type[nn.Module], name: str) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        flow = _FLOWS.get(getcurrent())
        if flow is None:
            return kind.__call__(self, *args, **kwargs)
        return flow.call(name, self, kind, (args, kwargs))

    told = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), told)
