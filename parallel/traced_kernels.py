"""Kernels that a run on shapes would not choose: those of a GPU for attention and dropout, and products by groups."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.masks import causal
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.meta import MetaAnswers, grouped_on_shapes, unnoticed
from meshwright.parallel.operations import precision_of
from meshwright.parallel.work import FUSED_BACKWARD, Attention, Product, Sent

__all__ = ["Fetched", "Kernels", "shapes_only"]

Fetched = Callable[[Tensor, Tensor, Tensor], tuple[Sequence[Sent], Sequence[Sent]]]
"""What a rank sends for one attention, from its query, key and value [..., heads, positions, width]."""


_MOST_BLOCKS = 16  # of queries, and of keys, that are gone through one by one


class Kernels(TorchFunctionMode):
    """Inside, attention keeps its inputs, its output and one number a query, and dropout a mask of one byte.

    Args:
        tracer: that counts.
        num_keys: how many times as many keys as it is given attention meets.
        fetched: what is sent for an attention of given query, key and value, forward and backward.
        on_cpu: whether a CPU runs it, where torch fuses no attention that drops and dropout keeps what it drew.
        sizes: of blocks, where attention goes to this library's kernels, which keep no scores anywhere.
    """

    may_draw = False

    def __init__(
        self,
        tracer: Any,
        num_keys: int = 1,
        fetched: "Fetched | None" = None,
        *,
        on_cpu: bool = False,
        sizes: Blockwise | None = None,
    ) -> None:
        super().__init__()
        self._tracer = tracer
        self._num_keys = num_keys
        self._fetched = fetched
        self._on_cpu, self._sizes = on_cpu, sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces the three, and passes every other call on."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            if self._is_own_by_blocks(*args, **kwargs):
                return self._by_blocks(*args, **kwargs)
            if self._is_fused(*args, **kwargs):
                return self._attend(*args, **kwargs)
        if func is functional.dropout and not self._on_cpu:
            return _drop(*args, **kwargs)
        if func is torch._grouped_mm and (args[0].dim(), args[1].dim()) == (2, 3):
            return grouped_on_shapes(args[0], args[1], told=partial(self._count, args[0], args[1]))
        return func(*args, **kwargs)

    def _is_fused(self, *args: Any, **kwargs: Any) -> bool:
        return self._is_own or not (self._on_cpu and _dropped(*args, **kwargs))

    @property
    def _is_own(self) -> bool:
        """Whether this library's kernels attend."""
        return self._sizes is not None or self._fetched is not None

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
        mask, is_causal = given.get("attn_mask"), given.get("is_causal", False)
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in (query, key, value))
        seen = query[..., 0].numel() * key.shape[-2] * self._num_keys * (0.5 if is_causal else 1.0)
        flops = 2 * seen * (query.shape[-1] + value.shape[-1])
        mask_bytes = 0 if mask is None else mask.numel() * mask.itemsize
        masks = [] if mask is None or self._is_own else [_as_scores(mask, query.dtype)]
        sent = self._fetched(query, key, value) if self._fetched is not None else ((), ())
        asked = _Asked(self._tracer, Attention(flops, seen, precision_of(query)), mask_bytes, sent)
        found: Tensor = _Attend.apply(asked, query, key, value, *masks)  # type: ignore[no-untyped-call]
        return found

    def _is_own_by_blocks(self, query: Tensor, *others: Any, **named: Any) -> bool:
        """Whether this library's kernels attend and drop, for which they have no fused one."""
        own = self._sizes is not None and self._fetched is None
        return own and query.dim() == 4 and _dropped(query, *others, **named)

    def _by_blocks(self, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
        """Attention as this library's kernels compute it block by block: run itself, on shapes."""
        assert self._sizes is not None, "goes to torch's kernels"
        given = _given(others, named)
        mask, tally = given.get("attn_mask"), self._tracer.tally()
        if tally is not None and mask is not None:
            tally.moved_bytes += mask.numel() * mask.itemsize
        return attend(
            query,
            key,
            value,
            mask=causal() if given.get("is_causal") else None,
            scale=given.get("scale"),
            dropout_p=given["dropout_p"],
            query_block=max(self._sizes.query_block, -(-query.shape[-2] // _MOST_BLOCKS)),
            kv_block=max(self._sizes.kv_block, -(-key.shape[-2] // _MOST_BLOCKS)),
        )


@dataclass(frozen=True)
class _Asked:
    """One attention: who counts it, what it computes, its mask, and what is sent for it forward and backward."""

    tracer: Any
    attention: Attention
    mask_bytes: int
    sent: tuple[Sequence[Sent], Sequence[Sent]]

    def count(self, *, backward: bool = False) -> None:
        """Counts one direction."""
        tally = self.tracer.tally()
        if tally is None:
            return
        factor = FUSED_BACKWARD if backward else 1.0
        tally.attentions.append(replace(self.attention, flops=factor * self.attention.flops))
        tally.operations += 1
        tally.moved_bytes += self.mask_bytes
        tally.sent += self.sent[backward]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, asked: _Asked, *given: Tensor) -> Tensor:
        query, _, value, *_ = given
        output = _positions_first(query, value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(*given[:3], output, sums, *given[3:])
        ctx.asked = asked
        asked.count()
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.asked.count(backward=True)
        made = [torch.empty_like(each) for each in ctx.saved_tensors[:3]]
        return None, *made, *(None for _ in ctx.saved_tensors[5:])


def _positions_first(query: Tensor, width: int) -> Tensor:
    """An output in the order that kernels write it, [..., queries, heads, width], seen as the inputs are."""
    if query.dim() < 3:
        return query.new_empty((*query.shape[:-1], width))
    *outer, heads, queries, _ = query.shape
    return query.new_empty((*outer, queries, heads, width)).transpose(-3, -2)


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
