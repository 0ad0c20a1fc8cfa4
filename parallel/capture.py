"""A model's own forward as a coroutine that stops before every call of a block.

Blocks get a class whose `__call__` hands control back to whoever runs the flow, so that neither the model's code nor
hooks on the blocks notice: the block itself runs inside the coroutine when the flow is resumed. What torch keeps for
the thread (gradient mode, autocast, function modes, hooks on saved tensors, random generators) belongs to the flow and
is exchanged whenever it stops.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from meshwright.parallel.randomness import skip_block

__all__ = ["Flow", "captured", "fresh"]

_FLOWS: dict[greenlet, "Flow"] = {}


class Flow:
    """One forward pass.

    Args:
        run: the pass; what it returns becomes `result`.

    Attributes:
        waits: name of the block whose call is next; None before the start and at the end.
        ended: whether the pass is over.
        arguments: positional and keyword arguments of the call that waits; what they are replaced by is used.
        output: what the last block that ran gave, as the model goes on with it.
        borders: (block, sequence number) where each piece of the autograd graph begins; what lies between two blocks
            is counted to none (""). A node belongs to the last piece that began at or before its number.
        origins: leaf made at a border -> the edge of the graph that it continues.

    >>> layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    >>> flow = Flow(lambda: layers[1](layers[0](torch.ones(1, 2))).sum())
    >>> with captured({"first": layers[0], "second": layers[1]}):
    ...     flow.resume()
    ...     print(flow.waits)
    ...     flow.resume()
    ...     print(flow.waits)
    ...     flow.resume()
    first
    second
    >>> flow.ended, [block for block, _ in flow.borders]
    (True, ['', 'first', '', 'second', ''])
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.waits: str | None = None
        self.ended = False
        self.result: Any = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.output: Any = None
        self._instead: list[Any] = []
        self.borders: list[tuple[str, int]] = []
        self.origins: Any = WeakTensorKeyDictionary()
        self._state = _ThreadState()
        self._work = run
        self._coroutine = greenlet(self._run)

    def resume(self) -> None:
        """Runs to the next call of a block, or to the end."""
        self._enter(self._coroutine.switch)

    def skip(self, output: Any) -> None:
        """Lets the block that waits give `output` without running it, and goes on."""
        self._instead.append(output)
        self.resume()

    def close(self) -> None:
        """Ends a pass that is not wanted any more."""
        if self._coroutine and not self.ended:
            self._enter(self._coroutine.throw)

    def call(self, block: str, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called inside, for a block: stops, and runs it when resumed."""
        self.waits, self.arguments = block, (args, kwargs)
        assert self._coroutine.parent is not None, block
        self._coroutine.parent.switch()
        args, kwargs = self.arguments
        self.arguments = (), {}
        self._begin(block)
        if self._instead:
            skip_block(block)
            return self._instead.pop()
        given: list[tuple[Tensor, Tensor]] = []
        args = self._cut(args, given, kept=(list, dict))
        kwargs = {name: self._cut(each, given, kept=(list, dict)) for name, each in kwargs.items()}
        versions = [fresh._version for _, fresh in given]
        output = work(*args, **kwargs)
        self._begin("")
        for (value, fresh), version in zip(given, versions, strict=True):
            if fresh._version != version:  # the block changed what it was given, which others may hold too
                _Rebased.apply(value, self._leaf(fresh))  # type: ignore[no-untyped-call]
        self.output = self._cut(output, [])
        return self.output

    def _enter(self, how: Callable[[], Any]) -> None:
        outside = _ThreadState()
        self._coroutine.parent = getcurrent()
        self._state.enter()
        try:
            how()
        finally:
            self._state = _ThreadState()
            outside.enter()

    def _run(self) -> None:
        _FLOWS[getcurrent()] = self
        try:
            self._begin("")
            self.result = self._work()
        finally:
            del _FLOWS[getcurrent()]
            self.ended, self.waits = True, None

    def _begin(self, block: str) -> None:
        self.borders.append((block, torch._C._autograd._get_sequence_nr()))

    def _cut(self, values: Any, made: list[tuple[Tensor, Tensor]], kept: tuple[type, ...] = ()) -> Any:
        """The same values, those with a history as new leaves.

        Args:
            values: of any structure.
            made: pairs of an old and a new value, so that one in two places stays one; grows.
            kept: containers that stay as they are, since a block may add to them; the graph tells what comes from them.
        """

        def change(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.grad_fn is None or not torch.is_grad_enabled():
                return value
            for old, new in made:
                if old is value:
                    return new
            made.append((value, fresh(self._leaf(value))))
            return made[-1][1]

        return tree_map(change, values, is_leaf=lambda value: isinstance(value, kept))

    def _leaf(self, value: Tensor) -> Tensor:
        leaf = value.detach().requires_grad_()
        self.origins[leaf] = get_gradient_edge(value)
        return leaf


def fresh(leaf: Tensor) -> Tensor:
    """A leaf's value as a tensor that may be changed in place; its gradient goes to the leaf."""
    made: Tensor = _Fresh.apply(leaf)  # type: ignore[no-untyped-call]
    return made


class _Fresh(Function):
    """A leaf's value as a tensor that may be changed in place."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        del ctx
        return inputs[0].detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0]


class _Rebased(Function):
    """A value whose memory was changed elsewhere takes over the history of that change, given by a leaf."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.mark_dirty(inputs[0])
        return inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        del ctx
        return None, gradients[0]


class _ThreadState:
    """What torch keeps for a thread, as it is now."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self._autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
        }
        number = torch._C._len_torch_function_stack()
        self._modes = [torch._C._get_function_stack_at(place) for place in range(number)]
        self._hooks = _taken_hooks()
        _put_hooks(self._hooks)

    def enter(self) -> None:
        """Puts it back."""
        torch.set_grad_enabled(self._grad)
        torch.set_rng_state(self._random)
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random)
        for device, (enabled, dtype) in self._autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        for mode in self._modes:
            torch._C._push_on_torch_function_stack(mode)
        _taken_hooks()
        _put_hooks(self._hooks)


def _taken_hooks() -> list[Any]:
    """Takes the hooks on saved tensors (recompute, offload) off, the innermost first."""
    autograd: Any = torch._C._autograd
    hooks = []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    return hooks


def _put_hooks(hooks: list[Any]) -> None:
    for pack, unpack in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


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
        return flow.call(name, lambda *args, **kwargs: kind.__call__(self, *args, **kwargs), args, kwargs)

    told = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), told)
