"""A call whose inside is thrown away and made anew before backward: only what it was given is kept (arXiv 1604.06174).

The graph of the first run stays, with places instead of tensors; a second run fills the places. With
`torch.utils.checkpoint` that run starts when backward asks for the first tensor, and again for each part of backward;
here it is an action of the schedule, done once, while the rank waits for what it goes back with.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from meshwright.parallel.errors import WrapError
from meshwright.parallel.thread_state import ThreadState

__all__ = ["Frame", "is_uncounted", "uncounted"]

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_AGAIN: ContextVar[bool] = ContextVar("again", default=False)


def is_uncounted() -> bool:
    """Whether a forward is none that counts: a second one, of a `Frame` or `torch.utils.checkpoint`, or a plan's.

    >>> is_uncounted()
    False
    """
    return _AGAIN.get() or torch._C._current_graph_task_id() != -1


@contextmanager
def uncounted() -> Iterator[None]:
    """Inside, forward passes are none that count: second ones, or those of plans.

    >>> with uncounted():
    ...     is_uncounted()
    True
    """
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)


@dataclass(frozen=True)
class _Place:
    """Where a saved tensor will be, and what it is like."""

    number: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class _Input:
    """An input with a history: the leaf that stands for it."""

    leaf: Tensor


class Frame:
    """One call.

    Args:
        name: of what is called, for messages.
        work: the call; it must not change what it is given.
        arguments: positional and keyword.
        buffers: of the module that is called, which must not change either.
        leaves: id of an input that has a history -> the leaf that it was made from, whose memory may be given away.

    >>> weight, x = torch.ones(2, requires_grad=True), torch.ones(2)
    >>> frame = Frame("product", lambda value: (value * weight).exp(), ((x,), {}), leaves={})
    >>> output = frame.run()
    >>> frame.recompute()
    >>> output.sum().backward()
    >>> weight.grad
    tensor([2.7183, 2.7183])
    """

    def __init__(
        self,
        name: str,
        work: Callable[..., Any],
        arguments: _Arguments,
        *,
        leaves: Mapping[int, Tensor],
        buffers: Sequence[Tensor] = (),
    ) -> None:
        self._name = name
        self._work = work
        self._call: Any = arguments
        self._given = tree_map(lambda each: _Input(leaves[id(each)]) if id(each) in leaves else each, arguments)
        self._leaves = list(leaves.values())
        self._buffers = list(buffers)
        self._versions: list[tuple[Tensor, int]] = []
        self._state, self._context = ThreadState(), copy_context()
        self._places: list[_Place] = []
        self._found: list[Tensor] | None = None
        self._hosted: list[tuple[Tensor, Tensor]] = []

    def run(self) -> Any:
        """The first run.

        Raises:
            WrapError: when the call changes what it is given.
        """
        args, kwargs = self._call
        self._call = None
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        versions = [each._version for each in (*given, *self._buffers)]
        with saved_tensors_hooks(self._note, self._fill):
            output = self._work(*args, **kwargs)
        if [each._version for each in (*given, *self._buffers)] != versions:
            raise WrapError(
                f"{self._name} changes what it is given in place, or its buffers, so it cannot be run again; leave it "
                "out of recompute="
            )
        kept = [*self._leaves, *(each for each in tree_leaves(self._given) if isinstance(each, Tensor))]
        self._versions = [(each, each._version) for each in kept]
        return output

    def recompute(self) -> None:
        """The second run; does nothing where it has been done.

        Raises:
            WrapError: when it does not do what the first one did.
        """
        if self._found is not None:
            return
        if any(each._version != version for each, version in self._versions):
            raise WrapError(
                f"the model changes in place what {self._name} was given, after it ran, so it cannot be run again; "
                "leave it out of recompute="
            )
        self.fetch()
        found: list[Tensor] = []
        outside = ThreadState()
        self._state.enter()
        try:
            args, kwargs = tree_map(_as_given, self._given)
            with saved_tensors_hooks(lambda tensor: found.append(tensor.detach()), lambda nothing: nothing):
                self._context.run(self._work_again, *args, **kwargs)
        finally:
            outside.enter()
        self._check(found)
        self._found = found

    def _work_again(self, *args: Any, **kwargs: Any) -> None:
        with uncounted():
            self._work(*args, **kwargs)

    def forget(self) -> None:
        """Lets go of everything, after backward."""
        if self._found is not None:
            self._found.clear()  # a cache of the model's may hold the second run's graph, and that this list
        self._found, self._given, self._leaves, self._hosted = [], None, [], []
        self._versions, self._buffers = [], []

    def offload(self) -> None:
        """Moves inputs with a history to host memory."""
        for leaf in self._leaves:
            if torch.empty_like(leaf, device="meta").stride() != leaf.stride():
                continue  # expanded: its memory is another's
            host = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, pin_memory=leaf.is_cuda)
            host.copy_(leaf.detach(), non_blocking=leaf.is_cuda)  # in order with the kernels before and after it
            self._hosted.append((leaf, host))
            leaf.data = leaf.new_empty(()).expand(leaf.shape)

    def fetch(self) -> None:
        """Starts moving them back."""
        for leaf, host in self._hosted:
            leaf.data = host.to(leaf.device, non_blocking=leaf.is_cuda)
        self._hosted = []

    def _note(self, tensor: Tensor) -> _Place:
        place = _Place(len(self._places), tensor.shape, tensor.dtype)
        self._places.append(place)
        return place

    def _fill(self, place: _Place) -> Tensor:
        if self._found is None:
            raise WrapError(
                f"{self._name} goes back before it was recomputed; if it asks for gradients in its own forward "
                "(torch.autograd.grad), leave it out of recompute="
            )
        return self._found[place.number]

    def _check(self, found: Sequence[Tensor]) -> None:
        expected = [(each.shape, each.dtype) for each in self._places]
        if [(each.shape, each.dtype) for each in found] != expected:
            raise WrapError(
                f"{self._name} computed otherwise when it was recomputed ({len(found)} tensors kept, {len(expected)} "
                "before, or of other shapes); what it does must depend on its inputs and parameters alone, or leave it "
                "out of recompute="
            )


def _as_given(value: Any) -> Any:
    return value.leaf.detach().requires_grad_() if isinstance(value, _Input) else value
