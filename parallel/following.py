"""What models do with scores on the way to the loss, done on what is held of them (see `scores`)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["WORK", "Call"]


class Call(NamedTuple):
    """What a model calls on scores, and with what besides them."""

    func: Any
    args: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def map(self, change: Callable[[Any], Any]) -> "Call":
        """The same call with its arguments changed."""
        args = tuple(change(each) for each in self.args)
        return Call(self.func, args, {key: change(each) for key, each in self.keywords.items()})

    def on(self, tensor: Tensor) -> Any:
        """The call on something else."""
        return self.func(tensor, *self.args, **self.keywords)


def _each_score(scores: Any, call: Call) -> Any:
    """Element by element, with numbers beside the scores; learned ones need the gradient of all scores."""

    def beside(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fits = value.dim() <= scores.held().dim() and not value.requires_grad
        if fits and value.numel() == 1:
            return value
        if fits and value.dim() and value.numel() == value.shape[-1] == scores.vocabulary:
            return scores.own(value.reshape(-1))
        return NotImplemented

    given = call.map(beside)
    if any(each is NotImplemented for each in (*given.args, *given.keywords.values())):
        return NotImplemented
    return scores.each(given)


def _ask_kind(scores: Any, call: Call) -> Any:
    return call.on(scores.kind())


def _ask_history(scores: Any, call: Call) -> Any:
    return call.on(scores.held())


def _shape(scores: Any, call: Call) -> Any:
    return call.on(torch.empty(scores.full_shape(), device="meta"))


def _same_rows(scores: Any, call: Call) -> Any:
    rows = scores.held()
    made = call.on(rows)
    return scores if made is rows else scores.of_rows(made)


def _detach(scores: Any, call: Call) -> Any:
    del call
    return scores.without_history()


def _reshape(scores: Any, call: Call) -> Any:
    args = call.args
    shape = args[0] if args and isinstance(args[0], (tuple, list)) else args
    if call.keywords or not all(isinstance(each, int) for each in shape):
        return NotImplemented
    try:
        full = torch.empty(scores.full_shape(), device="meta").reshape(shape).shape
    except RuntimeError:
        return NotImplemented
    rows = scores.held()
    if not full or full[-1] != scores.vocabulary:
        return NotImplemented
    return scores.of_rows(rows.reshape(*full[:-1], rows.shape[-1]))


def _flatten(scores: Any, call: Call) -> Any:
    full = _shape(scores, call)
    return _reshape(scores, Call(call.func, (tuple(full.shape),), {}))


def _getitem(scores: Any, call: Call) -> Any:
    given = call.args[0]
    index = given if isinstance(given, tuple) else (given,)
    used = [_num_dims(each) for each in index]
    if None in used or not index:
        return NotImplemented
    whole_last = isinstance(index[-1], slice) and index[-1] == slice(None)
    from_behind = any(each is Ellipsis for each in index) and index[-1] is not Ellipsis
    reaches_last = sum(each or 0 for each in used) >= scores.held().dim() or from_behind
    if reaches_last and not whole_last:
        return NotImplemented
    return scores.of_rows(scores.held()[given])


def _num_dims(index: Any) -> int | None:
    """How many dims a part of an index speaks of; None where that cannot be told."""
    if index is None or index is Ellipsis:
        return 0
    if isinstance(index, Tensor):
        return index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
    if isinstance(index, list):
        return 1 if all(isinstance(each, int) for each in index) else None
    return 1 if isinstance(index, (slice, int)) and not isinstance(index, bool) else None


def _cross_entropy(scores: Any, call: Call) -> Any:
    """The calls that models make; others need whole scores."""
    given = {**_ENTROPY_DEFAULTS, **dict(zip(_ENTROPY_DEFAULTS, call.args, strict=False)), **call.keywords}
    target, ignore_index, reduction = (given.pop(name) for name in ("target", "ignore_index", "reduction"))
    odd = any(each is not None and (isinstance(each, Tensor) or each != 0) for each in given.values())
    if odd or target.is_floating_point() or scores.held().dim() != 2 or target.dim() != 1:
        return NotImplemented
    if len(target) != scores.held().shape[0] or reduction not in ("mean", "sum", "none"):
        return NotImplemented  # torch says what is wrong
    return scores.entropy(target, ignore_index, reduction)


_ENTROPY_DEFAULTS: dict[str, Any] = {
    "target": None,
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
    "label_smoothing": 0.0,
}

_EACH = (
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type),
    *(Tensor.tanh, Tensor.neg, torch.tanh),
    *(Tensor.mul, Tensor.div, Tensor.add, Tensor.sub, torch.mul, torch.div, torch.add, torch.sub),
    *(Tensor.__mul__, Tensor.__rmul__, Tensor.__truediv__, Tensor.__add__, Tensor.__radd__, Tensor.__sub__),
    *(Tensor.mul_, Tensor.div_, Tensor.add_, Tensor.sub_, Tensor.tanh_),
)
_GETTERS: Any = Tensor
_SHAPES = (Tensor.size, Tensor.dim, Tensor.numel, _GETTERS.shape.__get__, _GETTERS.ndim.__get__, Tensor.__len__)
_KINDS = (
    *(getattr(_GETTERS, name).__get__ for name in ("dtype", "device", "layout", "is_cuda", "is_meta")),
    Tensor.is_floating_point,
    Tensor.get_device,
)
_HISTORY = (
    *(getattr(_GETTERS, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf", "_base")),
    Tensor.register_hook,  # FSDP2 asks every output when its backward begins
    Tensor.retain_grad,
)

WORK: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_EACH, _each_score),
    **dict.fromkeys(_SHAPES, _shape),
    **dict.fromkeys(_KINDS, _ask_kind),
    **dict.fromkeys(_HISTORY, _ask_history),
    **dict.fromkeys((Tensor.contiguous, Tensor.clone), _same_rows),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    Tensor.detach: _detach,
    Tensor.__getitem__: _getitem,
    functional.cross_entropy: _cross_entropy,
}
"""Function -> what is done instead of a call on scores, which may give NotImplemented."""
