"""Attention that a model computes by hand, which no plug reaches: found by watching one forward pass.

Scores are a product of two activations, and a softmax of them meets another activation in a product. What is made from
scores by anything else keeps their mark.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["HandWatch"]

_PRODUCTS: frozenset[Any] = frozenset(
    [torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm, torch.einsum]
)
_SOFTMAXES: frozenset[Any] = frozenset([functional.softmax, torch.softmax, Tensor.softmax])


class HandWatch(TorchFunctionMode):
    """A context in which softmaxes of products that enter a product are noticed.

    Args:
        here: names the place where the model is just now.

    Attributes:
        found: names of places, in the order in which they were met.

    >>> x = torch.ones(2, 3, 4)
    >>> with HandWatch(lambda: "here") as watch:
    ...     _ = (x @ x.mT).softmax(-1) @ x
    >>> watch.found
    ['here']
    """

    def __init__(self, here: Callable[[], str]) -> None:
        super().__init__()
        self.found: list[str] = []
        self._here = here
        self._scores: Any = WeakIdKeyDictionary()
        self._shares: Any = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a function and follows scores through it."""
        keywords = kwargs or {}
        result = func(*args, **keywords)
        if isinstance(result, Tensor) and result.dim() > 2:
            given = [each for each in tree_leaves((args, keywords)) if isinstance(each, Tensor)]
            self._follow(func, given, result)
        return result

    def _follow(self, func: Any, given: list[Tensor], result: Tensor) -> None:
        if func in _PRODUCTS:
            self._multiplied([each for each in given if each.dim() > 2 and not isinstance(each, nn.Parameter)], result)
        elif func in _SOFTMAXES and any(each in self._scores for each in given):
            self._shares[result] = True
        else:
            for marks in (self._scores, self._shares):
                if any(each in marks for each in given):
                    marks[result] = True

    def _multiplied(self, factors: list[Tensor], result: Tensor) -> None:
        if not any(each in self._shares for each in factors):
            if len(factors) > 1:
                self._scores[result] = True
            return
        place = self._here()
        if place not in self.found:
            self.found.append(place)
