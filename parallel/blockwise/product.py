"""Scores from the rows a head is given: its matrix product, and what the model does with each score afterwards."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.parallel.following import Call

__all__ = ["Product", "narrow_dtype"]


@dataclass(frozen=True)
class Product:
    """How scores come from rows.

    Args:
        transposed: whether the weight is [inputs, classes] and not [classes, inputs].
        narrow: the dtype that autocast multiplies in, None outside of it.
        steps: what is done with each score.

    >>> Product().then(Call(torch.tanh, (), {}))(torch.zeros(2, 3), torch.ones(5, 3), None).shape
    torch.Size([2, 5])
    """

    transposed: bool = False
    narrow: torch.dtype | None = None
    steps: tuple[Call, ...] = ()

    def then(self, step: Call) -> "Product":
        """The same with one more step."""
        return replace(self, steps=(*self.steps, step))

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """All scores [..., classes] of rows [..., inputs] at once, with their history."""
        with _without_autocast(hidden.device):
            scores = functional.linear(
                self.narrowed(hidden), self.matrix(weight), None if bias is None else self.narrowed(bias)
            )
            return self.finished(scores)

    def finished(self, scores: Tensor) -> Tensor:
        """What the steps make of the product, which stays."""
        for step in self.steps:
            name = step.func.__name__
            in_place = name.endswith("_") and not name.endswith("__")
            scores = step.on(scores.clone() if in_place else scores)
        return scores

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as [classes, inputs], as it is multiplied."""
        return self.narrowed(weight.T if self.transposed else weight)

    def narrowed(self, tensor: Tensor) -> Tensor:
        """A tensor as it is multiplied."""
        return tensor if self.narrow is None or tensor.dtype is torch.float64 else tensor.to(self.narrow)


def narrow_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast multiplies in on a device here and now; None where it is off."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if narrow_dtype(device) is None else torch.autocast(device.type, enabled=False)
