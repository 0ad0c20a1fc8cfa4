"""Attention calls of spans, made one call of the whole sequence, and its gradients cut for them again."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from torch import Tensor

from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.errors import WrapError

__all__ = ["Joining", "Pair", "Spans", "put_span"]

Pair: TypeAlias = tuple[Tensor, Tensor]
"""A tensor and its gradient."""

_TENSORS = ("query", "key", "value", "bias", "sinks")


class Spans(list[slice]):
    """Consecutive spans of a sequence.

    Args:
        full: its length.
        most: positions of a span.

    >>> Spans(7, most=3)
    [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    >>> Spans(3, most=2)
    [slice(0, 3, None)]
    """

    def __init__(self, full: int, most: int) -> None:
        number = max(1, min(-(-full // most), full // 2))  # models take one position alone for a step of generation
        share, more = divmod(full, number)
        ends = [(each + 1) * share + min(each + 1, more) for each in range(number)]
        super().__init__(slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False))
        self.full = full


def put_span(whole: Tensor | None, part: Tensor, span: slice, *, full: int, dim: int) -> Tensor:
    """Puts a part where it belongs; makes room for the whole first, ordered in memory as the part is.

    Args:
        whole: so far.
        part: of it.
        span: where, along `dim`.
        full: size of the whole along `dim`.
        dim: counted from the front.
    """
    if whole is None:
        order = sorted(range(part.dim()), key=lambda each: -part.stride()[each])
        shape = [full if each == dim else part.shape[each] for each in order]
        whole = part.new_empty(shape).permute([order.index(each) for each in range(part.dim())])
    whole.narrow(dim, span.start, span.stop - span.start).copy_(part)
    return whole


class Joining:
    """The calls of one attention.

    Args:
        full: length of the sequence.
        dealt: whether keys are spans as queries are; otherwise every call has all of them.
    """

    def __init__(self, full: int, *, dealt: bool) -> None:
        self._full = full
        self._dealt = dealt
        self._first: AttentionCall | None = None
        self._tensors: dict[str, Tensor] = {}
        self._learned: set[str] = set()

    def add(self, asked: AttentionCall, span: slice) -> None:
        """Takes the call of one span.

        Raises:
            WrapError: for one that is not about these positions.
        """
        self._check(asked, span)
        self._first = self._first or asked
        for name, tensor in _tensors_of(asked):
            dim = self._dim(name, tensor, span)
            if tensor.requires_grad:
                self._learned.add(name)
            if dim is None:
                self._tensors.setdefault(name, tensor.detach())
            else:
                whole = self._tensors.get(name)
                self._tensors[name] = put_span(whole, tensor.detach(), span, full=self._full, dim=dim)

    def whole(self) -> tuple[AttentionCall, dict[str, Tensor]]:
        """All of them as one, and which of its tensors want a gradient: they are leaves. It is not kept."""
        assert self._first is not None, "no span attended"
        leaves = {name: self._tensors[name].requires_grad_() for name in _TENSORS if name in self._learned}
        whole = replace(self._first, **self._tensors)  # type: ignore[arg-type]
        self._tensors, self._first = {}, None
        return whole, leaves

    def parts(self, asked: AttentionCall, gradients: Mapping[str, Tensor | None], span: slice) -> list[Pair]:
        """The tensors of one span's call, and their share of the gradients of the whole.

        What all calls hold alike goes back through the first one.
        """
        found: list[Pair] = []
        for name, tensor in _tensors_of(asked):
            gradient, dim = gradients.get(name), self._dim(name, tensor, span)
            if gradient is not None and (dim is not None or span.start == 0):
                share = gradient if dim is None else gradient.narrow(dim, span.start, span.stop - span.start)
                found.append((tensor, share))
        return found

    def _dim(self, name: str, tensor: Tensor, span: slice) -> int | None:
        """The dim of a tensor that is about a span's positions; None where it is about none of them alone."""
        if name == "query" or (name in ("key", "value") and self._dealt):
            return 2
        by_rows = name == "bias" and tensor.dim() > 1 and tensor.shape[-2] == span.stop - span.start
        return tensor.dim() - 2 if by_rows else None

    def _check(self, asked: AttentionCall, span: slice) -> None:
        size = span.stop - span.start
        if asked.query.shape[2] != size or (self._dealt and asked.key.shape[2] != size):
            raise WrapError(
                f"attention of {asked.name} has {asked.query.shape[2]} queries and {asked.key.shape[2]} keys where its "
                f"block was given {size} positions, which it did not with the example; pass an example= like the "
                "batches to come, or leave out layer_block"
            )


def _tensors_of(asked: AttentionCall) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name in _TENSORS if (tensor := getattr(asked, name)) is not None]
