"""The vocabulary dealt over `tp`: embeddings and heads by rows, cross entropy without the full scores.

A head returns `DealtScores`: this rank's columns of the scores, in the shape of all of them. What models do with scores
on the way to the loss (casts, slices of positions, scaling, soft caps, reshapes) works on the columns; cross entropy is
computed from them with two small sums (Megatron-LM, arXiv 1909.08053, section 3); anything else joins them first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import Function
from torch.nn import functional

from meshwright.parallel.exchange import Axis, enter, join, leave
from meshwright.parallel.layout import Split

__all__ = ["DealtScores", "deal_head", "deal_lookup"]


def deal_lookup(table: nn.Module, split: Split, axis: Axis) -> None:
    """Makes an embedding look up the rows this rank holds and sum over ranks; the module's own forward still runs."""
    forward = table.forward
    ((start, stop),) = split.held[axis.rank]
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        table.padding_idx = padding - start if start <= padding < stop else None  # type: ignore[assignment]

    def look_up(ids: Tensor) -> Tensor:
        outside = (ids < start) | (ids >= stop)
        found = forward((ids - start).masked_fill(outside, 0))
        return leave(found.masked_fill(outside.unsqueeze(-1), 0.0), axis)

    table.forward = look_up


def deal_head(head: nn.Module, split: Split, axis: Axis) -> None:
    """Makes a head compute the scores of the rows this rank holds."""

    def score(hidden: Tensor) -> Tensor:
        weight, bias = head.weight, head.bias
        assert isinstance(weight, Tensor), type(weight)
        assert not isinstance(bias, nn.Module), type(bias)
        return DealtScores.of(functional.linear(enter(hidden, axis), weight, bias), axis, split.size)

    head.forward = score


class DealtScores(Tensor):
    """Columns of scores [..., vocabulary] on one rank, in the shape of all of them."""

    axis: Axis
    vocabulary: int

    @classmethod
    def of(cls, columns: Tensor, axis: Axis, vocabulary: int) -> "DealtScores":
        """Wraps a rank's columns."""
        if isinstance(columns, FakeTensor):  # a subclass already, which torch makes no other one of
            scores: DealtScores = columns.view_as(columns)  # type: ignore[assignment]
            scores.__class__ = _FakeScores
        else:
            scores = columns.as_subclass(cls)
        scores.axis, scores.vocabulary = axis, vocabulary
        return scores

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Works on the columns where that is the same, and on the joined scores elsewhere."""
        keywords = kwargs or {}
        scores = next((each for each in args[:1] if isinstance(each, DealtScores)), keywords.get("input"))
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(func, OpOverload):  # below the functions that a model calls
                return func(*args, **keywords)
            work = _WORK.get(func)
            if work is not None and isinstance(scores, DealtScores) and not _others(args[1:], keywords):
                done = work(scores, func, args[1:], {key: each for key, each in keywords.items() if key != "input"})
                if done is not NotImplemented:
                    return done
            return func(*[_joined(each) for each in args], **{key: _joined(each) for key, each in keywords.items()})

    def columns(self) -> Tensor:
        """This rank's columns as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def full_shape(self) -> torch.Size:
        """The shape of all scores."""
        return torch.Size([*self.columns().shape[:-1], self.vocabulary])


class _FakeScores(DealtScores, FakeTensor):
    """Columns of scores without values."""


def _others(args: Any, keywords: dict[str, Any]) -> bool:
    return any(
        isinstance(each, DealtScores) for each in (*args, *(keywords[key] for key in keywords if key != "input"))
    )


def _joined(value: Any) -> Any:
    if isinstance(value, DealtScores):
        columns = value.columns()
        return join(columns, value.axis, columns.dim() - 1, value.vocabulary)
    if type(value) in (list, tuple):
        return type(value)(_joined(each) for each in value)
    return value


def _same(scores: DealtScores, columns: Tensor) -> DealtScores:
    return DealtScores.of(columns, scores.axis, scores.vocabulary)


def _each_score(scores: DealtScores, func: Any, args: Any, keywords: Any) -> Any:
    """Element by element, with numbers beside the scores at most; a learned one needs the gradient of all scores."""
    beside = [each for each in (*args, *keywords.values()) if isinstance(each, Tensor)]
    if any(each.numel() > 1 or each.requires_grad for each in beside):
        return NotImplemented
    return _same(scores, func(scores.columns(), *args, **keywords))


def _ask(scores: DealtScores, func: Any, args: Any, keywords: Any) -> Any:
    return func(scores.columns(), *args, **keywords)


def _shape(scores: DealtScores, func: Any, args: Any, keywords: Any) -> Any:
    return func(torch.empty(scores.full_shape(), device="meta"), *args, **keywords)


def _reshape(scores: DealtScores, func: Any, args: Any, keywords: Any) -> Any:
    shape = args[0] if args and isinstance(args[0], (tuple, list)) else args
    if keywords or not all(isinstance(each, int) for each in shape):
        return NotImplemented
    try:
        full = torch.empty(scores.full_shape(), device="meta").reshape(shape).shape
    except RuntimeError:
        return NotImplemented
    columns = scores.columns()
    if not full or full[-1] != scores.vocabulary:
        return NotImplemented
    return _same(scores, columns.reshape(*full[:-1], columns.shape[-1]))


def _flatten(scores: DealtScores, func: Any, args: Any, keywords: Any) -> Any:
    full = func(torch.empty(scores.full_shape(), device="meta"), *args, **keywords)
    return _reshape(scores, func, (tuple(full.shape),), {})


def _getitem(scores: DealtScores, func: Any, args: Any, keywords: Any) -> Any:
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    columns = scores.columns()
    plain = all(each is None or each is Ellipsis or isinstance(each, (slice, int)) for each in index)
    used = sum(each is not None and each is not Ellipsis for each in index)
    whole_last = bool(index) and isinstance(index[-1], slice) and index[-1] == slice(None)
    reaches_last = used >= columns.dim() or (Ellipsis in index and index[-1] is not Ellipsis) if plain else True
    if not plain or (reaches_last and not whole_last):
        return NotImplemented
    return _same(scores, columns[args[0]])


def _cross_entropy(scores: DealtScores, func: Any, args: Any, keywords: Any) -> Any:
    """From the columns, for the calls that models make; the others join the scores first."""
    del func
    given = {**_ENTROPY_DEFAULTS, **dict(zip(_ENTROPY_DEFAULTS, args, strict=False)), **keywords}
    target, ignore_index, reduction = (given.pop(name) for name in ("target", "ignore_index", "reduction"))
    columns = scores.columns()
    odd = any(each is not None and each != 0 for each in given.values())
    if odd or target.is_floating_point() or columns.dim() != 2 or target.dim() != 1:
        return NotImplemented
    return _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        columns, target, scores.axis, scores.vocabulary, ignore_index, reduction
    )


_ENTROPY_DEFAULTS: dict[str, Any] = {
    "target": None,
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
    "label_smoothing": 0.0,
}


class _CrossEntropy(Function):
    """Cross entropy of scores [rows, vocabulary] dealt by columns.

    `items` is the number of targets that count, under the name that `loss.items_of_graph` asks for.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        columns, target, axis, vocabulary, ignore_index, reduction = inputs
        split = Split.even(1, vocabulary, axis.size)
        ((start, stop),) = split.held[axis.rank]
        counted = target != ignore_index
        largest = axis.largest(columns.detach().amax(-1))
        powers = (columns - largest.unsqueeze(-1)).exp_()
        mine = counted & (target >= start) & (target < stop)
        place = (target - start).masked_fill(~mine, 0)
        own = columns.gather(1, place.unsqueeze(1)).squeeze(1)
        sums = axis.sum(torch.stack([powers.sum(-1), (own - largest).masked_fill(~mine, 0.0)]))
        losses = (sums[0].log() - sums[1]).masked_fill(~counted, 0.0)
        ctx.items = counted.sum(dtype=torch.float64)
        ctx.reduction, ctx.mine, ctx.place, ctx.counted = reduction, mine, place, counted
        ctx.save_for_backward(powers.div_(sums[0].unsqueeze(-1)))
        if reduction != "none":
            losses = losses.sum()
        result: Tensor = losses / ctx.items.to(losses.dtype) if reduction == "mean" else losses
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (shares,) = ctx.saved_tensors
        (gradient,) = gradients
        if ctx.reduction == "mean":
            gradient = gradient / ctx.items.to(gradient.dtype)
        rows = torch.where(ctx.counted, gradient, torch.zeros_like(gradient)).to(shares.dtype)
        result = shares * rows.unsqueeze(-1)
        result.scatter_add_(1, ctx.place.unsqueeze(1), -(rows * ctx.mine).unsqueeze(1))
        return result, None, None, None, None, None


_EACH = (
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.to,
    Tensor.type,
    Tensor.contiguous,
    Tensor.clone,
    Tensor.detach,
    Tensor.tanh,
    Tensor.neg,
    Tensor.mul,
    Tensor.div,
    Tensor.__mul__,
    Tensor.__rmul__,
    Tensor.__truediv__,
    Tensor.mul_,
    Tensor.div_,
    torch.tanh,
    torch.mul,
    torch.div,
)
_GETTERS: Any = Tensor
_SHAPES = (Tensor.size, Tensor.dim, Tensor.numel, _GETTERS.shape.__get__, _GETTERS.ndim.__get__, Tensor.__len__)
_QUESTIONS = (
    *(getattr(_GETTERS, name).__get__ for name in ("dtype", "device", "layout", "is_cuda", "is_meta")),
    *(getattr(_GETTERS, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf", "_base")),
    Tensor.is_floating_point,
    Tensor.register_hook,  # FSDP2 asks every output when its backward begins
    Tensor.retain_grad,
    Tensor.__repr__,
    Tensor.__hash__,
)

_WORK: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_EACH, _each_score),
    **dict.fromkeys(_SHAPES, _shape),
    **dict.fromkeys(_QUESTIONS, _ask),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    Tensor.__getitem__: _getitem,
    functional.cross_entropy: _cross_entropy,
}
