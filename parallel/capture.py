"""A model's own forward as a coroutine that stops where a stage begins.

Blocks get a class whose `__call__` asks a guide before it runs, so that neither the model's code nor hooks on blocks
notice. Where a stage begins, the pass stops and hands control back to whoever runs it, and its graph is cut: what the
stage takes from earlier ones becomes new leaves. What torch keeps for the thread belongs to the pass and is exchanged
whenever it stops.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, copy_context
from functools import lru_cache, partial, partialmethod
from threading import local
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from meshwright.parallel.cuts import Cuts
from meshwright.parallel.guide import Arguments, Backward, Guide
from meshwright.parallel.passing import note_passing
from meshwright.parallel.randomness import generators_kept, skip_block
from meshwright.parallel.recompute import Frame
from meshwright.parallel.thread_state import ThreadState

__all__ = ["Flow", "captured"]

_NOWHERE: tuple[str | None, Arguments] = None, ((), {})
_FLOWS: dict[greenlet, "Flow"] = {}


class _Outside(local):
    """What a thread keeps outside of its flows: asked once, since they leave it whenever they stop."""

    state: ThreadState | None = None


_OUTSIDE = _Outside()


class Flow:
    """One forward pass.

    Args:
        run: the pass; what it returns becomes `result`.
        guide: decides about calls.
        backward: how it will go back.

    Attributes:
        ended: whether the pass is over.
        cuts: of its graph.
        frames: stage -> calls that are recomputed.
    """

    def __init__(self, run: Callable[[], Any], guide: Guide, backward: Backward) -> None:
        self.ended = False
        self.result: Any = None
        self.cuts = Cuts(guide.first_stage)
        self.frames: dict[int, list[Frame]] = {}
        self._guide: Guide | None = guide  # until the pass ends: it holds its flow, too
        self._backward = backward
        self._until = (-1, False)  # stage, and whether the pass ends there
        self._state: ThreadState | None = None  # of the pass, while it is stopped
        self._work = run
        self._coroutine: greenlet | None = None
        self._context = Context()
        self._waiting = _NOWHERE

    @property
    def waits(self) -> str | None:
        """Name of the block whose call is next; None before the start and at the end."""
        return self._waiting[0]

    @property
    def arguments(self) -> Arguments:
        """Of the call that waits."""
        return self._waiting[1]

    def resume(self, limit: int = -1, *, last: bool = False) -> None:
        """Runs the call that waits, and on to the next one of a stage beyond `limit`, or to the end.

        Where this is the last time, the pass ends at that call, and `arguments` tells of it.
        """
        self._until = limit, last
        if self._coroutine is not None:
            self._enter(self._coroutine.switch)
        elif last:
            self._run_through()
        else:
            self._coroutine = greenlet(self._run)
            self._coroutine.gr_context = self._context = copy_context()
            self._enter(self._coroutine.switch)

    def close(self) -> None:
        """Ends a pass that is not wanted any more, and lets go of what the next block would have got."""
        if self._coroutine is not None and not self.ended:
            self._enter(self._coroutine.throw)
        self._waiting = _NOWHERE
        self._guide = None

    def detach(self) -> None:
        """Lets go of the graph of the result, once it has been gone through: every earlier stage's hangs on it."""
        if self.result is not None:
            self.result = tuple(map(_detached, self.result))

    def within(self, work: Callable[..., None], *args: Any) -> None:
        """Does something with the context variables of the pass: a model's own checkpoints run blocks in backward."""
        self._context.run(work, *args)

    def forget(self) -> None:
        """Lets go of the rest, after backward."""
        self._context = Context()
        self.frames.clear()
        self.cuts.forget()

    def call(self, name: str, block: nn.Module, kind: type[nn.Module], arguments: Arguments) -> Any:
        """Called inside, for a block whose own class is `kind`."""
        guide, cuts = self._guide, self.cuts
        assert guide is not None, f"{name} is called in a flow that was closed"
        stage = guide.stages[name]
        if stage > self._until[0]:
            self._stop(name, arguments)
        instead = guide.skips(name)
        if instead is not None:
            note_passing(block, arguments)
            skip_block(name)
            return instead()
        if cuts.given:
            cuts.check(name)
        remade = name in self._backward.recomputed and torch.is_grad_enabled()
        if remade or stage > cuts.stage or cuts.opening:
            output = self._run_cut(name, partial(kind.__call__, block), arguments, guide=guide, remade=remade)
        else:
            args, kwargs = guide.completed(name, arguments) if guide.lacks else arguments
            output = kind.__call__(block, *args, **kwargs)
        if cuts.given:
            cuts.rebase()
        guide.gave(name, output)
        return output

    def _run_cut(self, name: str, work: partial[Any], arguments: Arguments, *, guide: Guide, remade: bool) -> Any:
        """Runs a block that begins a piece."""
        cuts, stage = self.cuts, max(guide.stages[name], self.cuts.stage)  # one of an earlier stage is called again
        first = stage > cuts.stage or cuts.opening
        if first:
            cuts.begin(stage)
        if guide.lacks:
            arguments = guide.completed(name, arguments)
        if remade:
            cuts.begin(stage)
        args, kwargs = cuts.cut(*arguments) if first or remade else arguments
        return self._remade(name, work, (args, kwargs)) if remade else work(*args, **kwargs)

    def _stop(self, name: str, arguments: Arguments) -> None:
        """Before a call of a later stage: gives control back, or ends the pass."""
        self._waiting = name, arguments
        if self._until[1]:
            raise GreenletExit
        assert self._coroutine is not None, name
        assert self._coroutine.parent is not None, name
        self._coroutine.parent.switch()
        self._waiting = _NOWHERE

    def _remade(self, name: str, work: partial[Any], arguments: Arguments) -> Any:
        """Runs a block of which only the inputs are kept."""
        frame = Frame(f"block {name}", work, arguments, leaves=self.cuts.leaves, buffers=list(work.args[0].buffers()))
        self.frames.setdefault(self.cuts.stage, []).append(frame)
        return frame.run()

    def _run_through(self) -> None:
        """A pass that stops nowhere needs no coroutine; cut short, it must leave the thread as it was."""
        torch.clear_autocast_cache()
        try:
            self._context = copy_context()
            self._context.run(self._run)
        except BaseException as end:
            _outside().enter()
            if not isinstance(end, GreenletExit):
                raise
        else:
            torch.set_grad_enabled(_outside().grad)

    def _enter(self, how: Callable[[], Any]) -> None:
        assert self._coroutine is not None
        outside = _outside()
        self._coroutine.parent = getcurrent()
        if self._state is not None:
            self._state.enter(outside)
        else:
            torch.clear_autocast_cache()
        try:
            how()
        finally:
            self._state = ThreadState(random=not self.ended)
            outside.enter(self._state)

    def _run(self) -> None:
        _FLOWS[getcurrent()] = self
        try:
            self.cuts.begin(self.cuts.stage)
            self.cuts.opening = self._backward.halves
            self.result = self._work()
            if self.cuts.given:
                self.cuts.check("the end")
        finally:
            del _FLOWS[getcurrent()]
            self.ended, self._waiting = True, (None, self.arguments)
            self.cuts.end()


@contextmanager
def captured(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Makes calls of blocks stop the flow they happen in; calls outside any flow are ordinary ones.

    Flows draw from the generators as they find them, or seed them; they are put back in the end.
    """
    before, register = {name: type(block) for name, block in blocks.items()}, Tensor.register_hook
    outside, _OUTSIDE.state = _OUTSIDE.state, ThreadState(random=False)
    try:
        Tensor.register_hook = partialmethod(_note_hook, register)  # type: ignore[assignment, method-assign]
        for name, block in {id(block): (name, block) for name, block in reversed(list(blocks.items()))}.values():
            kind: Any = type(block)
            object.__setattr__(block, "__class__", _stopping(kind, name))  # a module's own asks a lot first
        with generators_kept():
            yield
    finally:
        _OUTSIDE.state = outside
        Tensor.register_hook = register  # type: ignore[method-assign]
        for name, block in blocks.items():
            object.__setattr__(block, "__class__", before[name])


def _note_hook(tensor: Tensor, register: Callable[..., Any], hook: Callable[[Tensor], Tensor | None]) -> Any:
    """Hooks are called wherever gradients of a node are asked for, which may be more often than the model thinks."""
    flow = _FLOWS.get(getcurrent())
    if flow is not None and tensor.grad_fn is not None:
        flow.cuts.hooked.add(tensor.grad_fn)
    return register(tensor, hook)


def _outside() -> ThreadState:
    assert _OUTSIDE.state is not None, "a flow outside of `captured`"
    return _OUTSIDE.state


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


@lru_cache(maxsize=4096)
def _stopping(kind: type[nn.Module], name: str) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        flow = _FLOWS.get(getcurrent())
        if flow is None:
            return kind.__call__(self, *args, **kwargs)
        return flow.call(name, self, kind, (args, kwargs))

    told = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made = type(kind.__name__, (kind,), told)
    for added in [each for each in vars(made) if each not in told and not each.startswith("__")]:
        delattr(made, added)  # by `__init_subclass__`: a block must be what it was in all but calls
    made.__call__ = call  # type: ignore[method-assign]
    return made
