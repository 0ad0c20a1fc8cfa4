"""Values that a block leaves elsewhere than in what it gives: lists it adds to, attributes, hooks that collect.

Ranks that skip the block would miss them without a word, so a pipeline refuses such blocks.
"""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["Leftovers", "watched"]

_WAITS_S = (0.0, 0.01, 0.1, 0.5)


@dataclass
class Leftovers:
    """What was made inside the block that ran last."""

    made: list[Any] = field(default_factory=list)

    def found(self) -> list[Tensor]:
        """Differentiable tensors made inside the block that somebody still holds."""
        for wait_s in _WAITS_S:  # threads of collectives let go of their tensors a moment later
            if not self._alive():
                return []
            time.sleep(wait_s)
            gc.collect()
        return self._alive()

    def _alive(self) -> list[Tensor]:
        alive = [each() for each in self.made]
        return [each for each in alive if each is not None and each.grad_fn is not None]


@contextmanager
def watched(blocks: Mapping[str, nn.Module]) -> Iterator[Leftovers]:
    """Notes what blocks make while they run; what they are given and what they give does not count."""
    leftovers = Leftovers()
    modes: list[ExitStack] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        del module
        leftovers.made.clear()
        modes.append(ExitStack())
        modes[-1].enter_context(_Noting(leftovers.made, {id(each) for each in tree_leaves((args, kwargs))}))
        # nobody goes back through what is run here but the block itself, so the graph need not hold tensors behind it
        saved: list[Tensor] = []
        modes[-1].callback(saved.clear)
        modes[-1].enter_context(saved_tensors_hooks(partial(_keep, saved), saved.__getitem__))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        modes.pop().close()
        given = {id(each) for leaf in tree_leaves(output) for each in (leaf, getattr(leaf, "_base", None))}
        leftovers.made[:] = [each for each in leftovers.made if id(each()) not in given]

    handles = [
        handle
        for block in blocks.values()
        for handle in (
            block.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            block.register_forward_hook(after, always_call=True),
        )
    ]
    try:
        yield leftovers
    finally:
        for handle in handles:
            handle.remove()


def _keep(saved: list[Tensor], tensor: Tensor) -> int:
    saved.append(tensor)
    return len(saved) - 1


class _Noting(TorchFunctionMode):
    def __init__(self, made: list[Any], given: set[int]) -> None:
        super().__init__()
        self._made = made
        self._given = given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # arguments too: what a Function of the user's gave is seen when it is used
        seen = tree_leaves((result, args, kwargs))
        self._made += [ref(each) for each in seen if isinstance(each, Tensor) and id(each) not in self._given]
        return result
