"""Runs without values of models that ask their tensors questions (`if mask.all():`), and of products by groups."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import Function
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["MetaAnswers", "grouped_on_shapes", "is_shape", "unnoticed", "without_values"]

_ANSWERS = {torch.all: True, Tensor.all: True, torch.any: False, Tensor.any: False}


class MetaAnswers(TorchFunctionMode):
    """A context in which `all` of a tensor without values is true and `any` of it false: the ordinary batch.

    >>> with MetaAnswers():
    ...     bool(torch.ones(2, device="meta").all())
    True
    """

    may_draw = False

    def __init__(self) -> None:
        super().__init__()
        self._answers: Any = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers questions about values, passes every other call on."""
        if func in (Tensor.__bool__, Tensor.item) and args[0] in self._answers:
            return self._answers[args[0]]
        if func is torch._grouped_mm:
            return _grouped(*args[:2], **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in _ANSWERS and isinstance(result, Tensor) and is_shape(result):
            self._answers[result] = _ANSWERS[func]
        return result


def _grouped(a: Tensor, b: Tensor, **keywords: Any) -> Any:
    """The product of groups, of which torch knows the shapes for bfloat16 only, and the values of no float64."""
    if is_shape(a) and (a.dim(), b.dim()) == (2, 3):
        return grouped_on_shapes(a, b)
    kind = torch.bfloat16 if is_shape(a) else torch.float32 if a.dtype is torch.float64 else a.dtype
    return torch._grouped_mm(a.to(kind), b.to(kind), **keywords).to(a.dtype)


def is_shape(tensor: Tensor) -> bool:
    """Whether a tensor has no values.

    >>> is_shape(torch.zeros(1)), is_shape(torch.zeros(1, device="meta"))
    (False, True)
    """
    return tensor.is_meta or isinstance(tensor, FakeTensor)


@contextmanager
def unnoticed() -> Iterator[None]:
    """Inside, models and torch's modules go the way that they go with values.

    Models of `transformers` that find their tensors fake make masks whole. Modules that are converted swap their
    tensors if these are fake, which fails where somebody else holds them, also where nothing is to be converted.
    """
    asked = sys.modules.get("transformers.utils.import_utils")
    swap: Any = torch.utils.swap_tensors

    def swapped(one: Tensor, other: Tensor) -> None:
        if one.dtype != other.dtype or one.device != other.device or one.shape != other.shape:
            swap(one, other)

    with ExitStack() as inside:
        if hasattr(asked, "is_fake_tensor"):
            inside.enter_context(patch.object(asked, "is_fake_tensor", lambda _: False))
        inside.enter_context(patch.object(torch.utils, "swap_tensors", swapped))
        yield


def grouped_on_shapes(rows: Tensor, matrices: Tensor, *, told: Callable[[], object] = lambda: None) -> Tensor:
    """What torch's product by groups makes, and keeps, of tensors without values; its own run knows bfloat16 only.

    Args:
        rows: [rows, d_in].
        matrices: [groups, d_in, d_out].
        told: called for each product, forward and backward.

    Returns:
        [rows, d_out]
    """
    return _Grouped.apply(told, rows, matrices)  # type: ignore[no-any-return, no-untyped-call]


class _Grouped(Function):
    @staticmethod
    def forward(ctx: Any, told: Callable[[], object], *given: Tensor) -> Tensor:
        rows, matrices = given
        ctx.save_for_backward(rows, matrices)
        ctx.told = told
        told()
        return rows.new_empty(len(rows), matrices.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *((ctx.told(), torch.empty_like(each))[1] if needed else None for each, needed in wanted)


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
