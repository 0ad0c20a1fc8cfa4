"""A mask in the clothes of a tensor: what a model passes on is a `Mask`, and what it computes with is dense.

Models pass masks through layers, ask for their shape, slice them to the length of the keys, and sometimes compute with
them. A tensor [b, 1, s_q, s_k] of bool without memory does for the first three; the first operation that needs values
makes them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from meshwright.parallel.blockwise.masks import Frame, Mask, dense

__all__ = ["MaskTensor", "mask_and_bias"]

_aten = torch.ops.aten


class MaskTensor(Tensor):
    """A tensor [b, 1, s_q, s_k] whose values are made when they are asked for.

    Of bools, True lets a query see a key; of floats, 0 does and the lowest finite number does not.

    Args:
        mask: what it stands for.
        shape: of the tensor.
        device: where values will be.
        dtype: of values.

    >>> from meshwright.parallel.blockwise.masks import causal
    >>> mask = MaskTensor(causal(), (1, 1, 2, 2), torch.device("cpu"))
    >>> mask[:, :, :, :2].mask is mask.mask
    True
    >>> mask.logical_not().tolist()
    [[[[False, True], [False, False]]]]
    """

    _structure: Mask
    _filled: Tensor | None

    @staticmethod
    def __new__(
        cls, mask: Mask, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.bool
    ) -> "MaskTensor":
        """Makes a tensor without memory."""
        made: MaskTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._structure = mask
        made._filled = None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keeps the mask where an operation leaves it as it is, else computes with its values."""
        given, keywords = args[0] if args else None, kwargs or {}
        if isinstance(given, MaskTensor) and given._filled is None and _keeps(func, given, args[1:], keywords):
            shape = _shape_after(func, given, args[1:])
            return MaskTensor(given._structure, shape, given.device, given.dtype)
        return func(*tree_map(_dense, args), **tree_map(_dense, keywords))

    @property
    def mask(self) -> Mask | None:
        """What it stands for; None once a model wrote into its values."""
        return self._structure if self._filled is None or self._filled._version == 0 else None

    def values(self) -> Tensor:
        """The dense mask, made once."""
        if self._filled is None:
            samples, heads, queries, keys = (range(size) for size in self.shape)
            seen = self._structure.pairs(queries, keys, Frame(samples, heads, self.device)).expand(self.shape)
            if self.dtype is torch.bool:
                self._filled = seen.contiguous()
            else:
                hidden = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device)
                self._filled = torch.where(seen, torch.zeros_like(hidden), hidden)
        return self._filled

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are dense."""
        return self.values().__reduce_ex__(protocol)


def mask_and_bias(given: Tensor | None) -> tuple[Mask | None, Tensor | None]:
    """What a model hands to attention, as a mask or as a bias.

    Args:
        given: None, a `MaskTensor`, a tensor of bools (True sees) or floats (to be added), broadcast to
            [b, heads, s_q, s_k].
    """
    if given is None:
        return None, None
    if isinstance(given, MaskTensor):
        if given.mask is not None:
            return given.mask, None
        given = given.values()
    if given.dtype is torch.bool:
        return dense(given), None
    if not given.requires_grad and bool(((given == 0) | (given == float("-inf"))).all()):
        return dense(given == 0), None  # it only hides, so blocks of it may be left out
    return None, given


def _keeps(func: Any, given: MaskTensor, rest: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether a mask stays what it is, or loses keys or queries at its end."""
    if func in (_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default):
        return True
    if func is _aten.slice.Tensor:
        given_so_far: tuple[Any, ...] = (*rest, *(0, None, None, 1)[len(rest) :])
        dim, start, end, step = given_so_far
        whole = end is None or end >= given.shape[dim]
        return step == 1 and start in (0, None) and (whole or (dim in (2, 3, -1, -2) and end >= 0))
    if func is _aten._to_copy.default:
        to_device = keywords.get("device")
        return keywords.get("dtype") in (None, given.dtype) and (to_device is None or to_device == given.device)
    return False


def _shape_after(func: Any, given: MaskTensor, rest: tuple[Any, ...]) -> tuple[int, ...]:
    shape = list(given.shape)
    if func is _aten.slice.Tensor and len(rest) > 2 and rest[2] is not None:
        shape[rest[0]] = min(shape[rest[0]], rest[2])
    return tuple(shape)


def _dense(value: Any) -> Any:
    return value.values() if isinstance(value, MaskTensor) else value
