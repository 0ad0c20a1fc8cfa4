"""Kernels that a run on shapes would not choose: those of a GPU for attention and dropout, and products by groups."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from meshwright.parallel.blockwise.mask import Band
from meshwright.parallel.meta import MetaAnswers, grouped_on_shapes, unnoticed
from meshwright.parallel.operations import precision_of
from meshwright.parallel.traced_attention import attend_fused
from meshwright.parallel.work import Product

__all__ = ["Kernels", "shapes_only"]


class Kernels(TorchFunctionMode):
    """Inside, attention keeps its inputs, its output and one number a query, and dropout a mask of one byte.

    Args:
        tracer: that counts.
        on_cpu: whether a CPU runs it, where torch fuses no attention that drops and dropout keeps what it drew.
    """

    may_draw = False

    def __init__(self, tracer: Any, *, on_cpu: bool = False) -> None:
        super().__init__()
        self._tracer, self._on_cpu = tracer, on_cpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces the three, and passes every other call on."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and not (self._on_cpu and _dropped(*args, **kwargs)):
            return self._attend(*args, **kwargs)
        if func is functional.dropout and not self._on_cpu:
            return _drop(*args, **kwargs)
        if func is torch._grouped_mm and (args[0].dim(), args[1].dim()) == (2, 3):
            return grouped_on_shapes(args[0], args[1], told=partial(self._count, args[0], args[1]))
        return func(*args, **kwargs)

    def _count(self, rows: Tensor, matrices: Tensor) -> None:
        """One product of rows that are spread evenly."""
        tally = self._tracer.tally()
        if tally is not None:
            groups, inner, width = matrices.shape
            each = -(-len(rows) // groups)
            tally.products.append(Product(each, width, inner, groups, precision=precision_of(rows)))
            tally.operations += 1

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
        """Attention [..., heads, queries, width]; a mask that is given has all scores computed."""
        given = _given(others, named)
        mask, band = given.get("attn_mask"), Band(None, 0 if given.get("is_causal") else None)
        scores = None if mask is None else _as_scores(mask, query.dtype)
        return attend_fused(self._tracer, (query, key, value), band=band, mask=scores)


def _as_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as torch's kernels take and keep it: one that says yes or no is made into what is added to scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, 0.0) if mask.dtype is torch.bool else mask


def _dropped(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> bool:
    """Whether attention drops scores, which torch then computes one after the other on a CPU (its `sdp_utils_cpp`)."""
    return float(_given(others, named).get("dropout_p", 0.0)) > 0


def _given(others: Sequence[Any], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments of attention behind query, key and value."""
    return dict(zip(("attn_mask", "dropout_p", "is_causal"), others, strict=False)) | named


def _drop(input: Tensor, p: float = 0.5, training: bool = True, **inplace: bool) -> Tensor:
    del inplace
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, tensors have no values, and models do not notice."""
    with _quiet(), unnoticed(), FakeTensorMode(allow_non_fake_inputs=True), MetaAnswers():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """What goes wrong is said in the error that is raised, not in torch's log besides."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
