"""A model's own forward as a coroutine that stops before every call of a block.

Blocks get a class whose `__call__` hands control back to whoever runs the flow, so that neither the model's code nor
hooks on the blocks notice: the block itself runs inside the coroutine when the flow is resumed. State that torch keeps
for the thread (gradient mode, autocast, function modes, random generators) belongs to the flow and is exchanged
whenever it stops.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Flow", "captured"]

_FLOWS: dict[greenlet, "Flow"] = {}


class Flow:
    """One forward pass.

    Attributes:
        waits: name of the block whose call is next; None before the start and at the end.
        ended: whether the pass is over.
        result: what it returned.
        borders: (name, sequence number) where each piece of the autograd graph begins: blocks by their name, what lies
            between them by "". A node belongs to the last piece that began at or before its number.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.waits: str | None = None
        self.ended = False
        self.result: Any = None
        self.borders: list[tuple[str, int]] = []
        self.origins: Any = WeakTensorKeyDictionary()
        self._state = _ThreadState()
        self._coroutine = greenlet(self._run)
        self._work = run

    def resume(self) -> None:
        """Runs to the next call of a block, or to the end."""
        outside = _ThreadState()
        self._state.enter()
        self._begin("" if self.waits is None else self.waits)
        try:
            self._coroutine.switch()
        finally:
            self._state = _ThreadState()
            outside.enter()

    def close(self) -> None:
        """Ends a pass that is not wanted any more."""
        if not self._coroutine.dead:
            self._coroutine.throw()

    def pause(self, block: str) -> None:
        """Called inside: stops before a block."""
        self.waits = block
        assert self._coroutine.parent is not None, block
        self._coroutine.parent.switch()

    def cut(self, values: Any) -> Any:
        """The same values, those with a history as new leaves whose origin is remembered; the same one stays the same."""
        made: dict[int, Tensor] = {}

        def change(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.grad_fn is None or not torch.is_grad_enabled():
                return value
            if id(value) not in made:
                leaf = value.detach().requires_grad_()
                self.origins[leaf] = get_gradient_edge(value)
                made[id(value)] = _Fresh.apply(leaf)
            return made[id(value)]

        return tree_map(change, values)

    def leave(self) -> None:
        """Called inside: a block is done, what lies between blocks goes on."""
        self._begin("")

    def _begin(self, name: str) -> None:
        self.borders.append((name, torch._C._autograd._get_sequence_nr()))

    def _run(self) -> None:
        _FLOWS[getcurrent()] = self
        try:
            self.result = self._work()
        finally:
            del _FLOWS[getcurrent()]
            self.ended, self.waits = True, None


class _ThreadState:
    """What torch keeps for a thread, taken off now."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._random = torch.get_rng_state()
        self._autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        self._functions = [torch._C._get_function_stack_at(each) for each in range(torch._C._len_torch_function_stack())]

    def enter(self) -> None:
        """Puts it back."""
        torch.set_grad_enabled(self._grad)
        torch.set_rng_state(self._random)
        enabled, dtype, cache = self._autocast
        torch.set_autocast_enabled("cpu", enabled)
        torch.set_autocast_dtype("cpu", dtype)
        torch.set_autocast_cache_enabled(cache)
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        for mode in self._functions:
            torch._C._push_on_torch_function_stack(mode)


@contextmanager
def captured(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Makes calls of blocks stop the flow they happen in; calls outside any flow are ordinary ones."""
    before = {name: type(block) for name, block in blocks.items()}
    for name, block in blocks.items():
        block.__class__ = _stopping(type(block), name)
    try:
        yield
    finally:
        for name, block in blocks.items():
            block.__class__ = before[name]


def _stopping(kind: type[nn.Module], name: str) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        flow = _FLOWS.get(getcurrent())
        if flow is None:
            return kind.__call__(self, *args, **kwargs)
        flow.pause(name)
        args, kwargs = flow.cut((args, kwargs))
        output = kind.__call__(self, *args, **kwargs)
        flow.leave()
        return flow.cut(output)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


class _Fresh(Function):
    """A leaf's value as a tensor that may be changed in place."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        return inputs[0].detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
