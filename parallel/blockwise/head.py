"""A head's scores and their gradients, one block of rows after the other, in memory of one block."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from meshwright.parallel.blockwise.dealt_rows import DealtRows
from meshwright.parallel.blockwise.product import Product

__all__ = ["Gradients", "Head", "unwatched"]


class Head:
    """Scores block by block, without history of rows and weights.

    Args:
        product: how scores come from rows.
        inputs: rows [rows, inputs], weight and bias of the head.
        block: rows at a time.
    """

    def __init__(self, product: Product, inputs: Sequence[Tensor | None], block: int) -> None:
        hidden, weight, bias = inputs
        assert hidden is not None, "a head without rows"
        assert weight is not None, "a head without a weight"
        self.transposed = product.transposed
        self.matrix = product.matrix(weight.detach())
        self._product = product
        self._hidden = hidden.detach()
        self._bias = None if bias is None else product.narrowed(bias.detach())
        self._room: Tensor | None = None
        self.blocks = [slice(start, start + block) for start in range(0, len(hidden), block)]

    def rows(self, block: slice) -> Tensor:
        """[block, inputs], as they are multiplied."""
        return self._product.narrowed(self._hidden[block])

    def scores(self, block: slice, *, goes_back: bool) -> tuple[Tensor, Tensor]:
        """The product and the scores after all steps, [block, classes] each; overwritten by those of the next block."""
        rows = self.rows(block)
        if self._room is None:
            self._room = rows.new_empty(len(rows), len(self.matrix))
        made = self._room[: len(rows)]
        if self._bias is None:
            torch.mm(rows, self.matrix.T, out=made)
        else:
            torch.addmm(self._bias, rows, self.matrix.T, out=made)
        if not self._product.steps:
            return made, made
        with torch.set_grad_enabled(goes_back), unwatched():
            product = made.detach().requires_grad_(goes_back)
            return product, self._product.finished(product)

    @staticmethod
    def gradient(product: Tensor, scores: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the product from that of the scores."""
        if product is scores:
            return gradient.to(product.dtype)
        with unwatched():
            return torch.autograd.grad(scores, product, gradient.to(scores.dtype))[0]


class Gradients:
    """Gradients of rows, weight and bias, those of the parameters added up over blocks in float32 or wider.

    Products of narrow floats (bfloat16) come rounded, once a block, so the error of a weight's gradient is about 1.3
    times that of one product over all rows (measured), for any number of blocks; adding in bfloat16 it would grow.

    Args:
        head: gives rows and matrix.
        inputs: what gradients are like: rows, weight, bias.
        needed: which are needed.
    """

    def __init__(self, head: Head, inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> None:
        self._head = head
        self._inputs = inputs
        self._transposed = head.transposed
        hidden, weight, bias = (each if need else None for each, need in zip(inputs, needed, strict=True))
        self._rows = None if hidden is None else torch.empty_like(hidden, memory_format=torch.contiguous_format)
        self._weight, self._bias = (None if each is None else _wide_zeros(each) for each in (weight, bias))

    def add(self, block: slice, gradient: Tensor) -> None:
        """Adds what the gradient of a block's product [block, classes] brings."""
        if self._rows is not None:
            self._rows[block] = gradient @ self._head.matrix
        if self._weight is not None:
            total = self._weight.T if self._transposed else self._weight
            _add_product(total, gradient, self._head.rows(block))
        if self._bias is not None:
            self._bias += gradient.sum(0, dtype=self._bias.dtype)

    def found(self, dealt: DealtRows) -> list[Tensor | None]:
        """The gradients of all rows, and those of weight and bias from all rows; None for what is not needed."""
        totals = zip((dealt.joined, dealt.summed, dealt.summed), (self._rows, self._weight, self._bias), strict=True)
        whole = [None if total is None else of_all(total) for of_all, total in totals]
        pairs = zip(whole, self._inputs, strict=True)
        return [None if total is None or like is None else total.to(like.dtype) for total, like in pairs]


def _wide_zeros(parameter: Tensor) -> Tensor:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=wide, device=parameter.device)


def _add_product(total: Tensor, gradient: Tensor, rows: Tensor) -> None:
    """Adds gradient^T rows to `total` [classes, inputs]; narrow products pass through memory of a block of scores."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.T, rows)
        return
    some = max(1, gradient.numel() // rows.shape[1])
    for start in range(0, len(total), some):
        total[start : start + some] += gradient[:, start : start + some].T @ rows


def unwatched() -> AbstractContextManager[Any]:
    """Inside, autograd keeps what it saves as it is, whatever hooks on saved tensors stand around."""
    return saved_tensors_hooks(Tensor.detach, _same)  # a graph that holds its own results would never be let go


def _same(tensor: Tensor) -> Tensor:
    return tensor
