"""Runs without values of models that ask their tensors questions (`if mask.all():`)."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["MetaAnswers", "without_values"]

_ANSWERS = {torch.all: True, Tensor.all: True, torch.any: False, Tensor.any: False}


class MetaAnswers(TorchFunctionMode):
    """A context in which `all` of a tensor without values is true and `any` of it false: the ordinary batch.

    >>> with MetaAnswers():
    ...     bool(torch.ones(2, device="meta").all())
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self._answers: Any = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers questions about values, passes every other call on."""
        if func in (Tensor.__bool__, Tensor.item) and args[0] in self._answers:
            return self._answers[args[0]]
        result = _narrow(func, *args, **(kwargs or {})) if func is torch._grouped_mm else func(*args, **(kwargs or {}))
        if func in _ANSWERS and isinstance(result, Tensor) and (result.is_meta or isinstance(result, FakeTensor)):
            self._answers[result] = _ANSWERS[func]
        return result


def _narrow(func: Any, a: Tensor, b: Tensor, **keywords: Any) -> Any:
    """The product of groups, of which torch knows the shapes for bfloat16 only, and the values of no float64."""
    absent = a.is_meta or isinstance(a, FakeTensor)
    kind = torch.bfloat16 if absent else torch.float32 if a.dtype is torch.float64 else a.dtype
    return func(a.to(kind), b.to(kind), **keywords).to(a.dtype)


def without_values(
    model: nn.Module, device: torch.device | str = "meta", *, besides: Iterable[Tensor] = ()
) -> nn.Module:
    """A copy of a model whose parameters and buffers have shapes only; those of `device` inside a fake mode.

    Args:
        model: it is not changed.
        device: of the copy.
        besides: what stays as it is, and is shared with the model.

    >>> without_values(nn.Linear(2, 3)).weight
    Parameter containing:
    tensor(..., device='meta', size=(3, 2), requires_grad=True)
    """
    memo: dict[int, Any] = {id(each): each for each in besides}
    for each in model.parameters():
        if id(each) not in memo:
            memo[id(each)] = nn.Parameter(torch.empty_like(each, device=device), requires_grad=each.requires_grad)
    shared = set(memo)
    memo.update({id(each): torch.empty_like(each, device=device) for each in model.buffers() if id(each) not in shared})
    return deepcopy(model, memo)
