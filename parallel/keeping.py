"""Modules that keep what backward needs, whatever checkpoints around them say.

A proof runs a part of a model by itself, forward and backward, and draws random numbers of its own. What a part would
run again in backward (`torch.utils.checkpoint`) would draw anew there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

__all__ = ["kept"]


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Inside, what operations and calls of a module's parts save for backward is held as it is.

    Of several hooks on saved tensors torch calls the innermost ones, and a checkpoint's are around these.

    >>> from torch.utils.checkpoint import checkpoint
    >>> calls, block = [], nn.Tanh()
    >>> _ = block.register_forward_hook(lambda *call: calls.append("call"))
    >>> value = nn.Linear(2, 2).weight
    >>> with kept(block):
    ...     made = checkpoint(block, value, use_reentrant=False)
    >>> made.sum().backward()
    >>> calls
    ['call']
    """
    inside: list[saved_tensors_hooks] = []

    def begin(*call: Any) -> None:
        inside.append(_held())
        inside[-1].__enter__()

    def end(*call: Any) -> None:
        inside.pop().__exit__()

    handles: list[Any] = []
    for each in module.modules():
        handles.append(each.register_forward_pre_hook(begin))
        handles.append(each.register_forward_hook(end, always_call=True))
    try:
        with _Operations():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Operations(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, *call: Any) -> Any:
        """One operation."""
        args, kwargs = (*call, (), None)[:2]
        with _held():
            return func(*args, **(kwargs or {}))


def _held() -> saved_tensors_hooks:
    return saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
