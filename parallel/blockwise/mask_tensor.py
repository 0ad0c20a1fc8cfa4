"""A mask in the clothes of a tensor: what a model passes on is a `Mask`, and what it computes with is dense.

Models pass masks through layers, ask for their shape, slice them to the length of the keys, and sometimes compute with
them. A tensor [b, 1, s_q, s_k] of bool without memory does for the first three; the first operation that needs values
makes them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from meshwright.parallel.blockwise.masks import Frame, Mask, dense

__all__ = ["MaskTensor", "mask_and_bias"]

_aten = torch.ops.aten


class _Kind(NamedTuple):
    device: torch.device
    dtype: torch.dtype


class _Values:
    """The values that views of one mask share, once somebody asks for them.

    Attributes:
        mask: what they say.
        made: values, if they were made.
        given_away: whether somebody may write into them.
    """

    def __init__(self, mask: Mask, shape: tuple[int, ...], kind: _Kind) -> None:
        self.mask = mask
        self._shape = shape
        self._kind = kind
        self.made: Tensor | None = None
        self.given_away = False

    def make(self) -> Tensor:
        if self.made is None:
            samples, heads, queries, keys = (range(size) for size in self._shape)
            device, dtype = self._kind
            seen = self.mask.pairs(queries, keys, Frame(samples, heads, device)).expand(self._shape)
            if dtype is torch.bool:
                self.made = seen.clone(memory_format=torch.contiguous_format)
            else:
                lowest = torch.finfo(dtype).min
                self.made = torch.zeros(self._shape, dtype=dtype, device=device).masked_fill(~seen, lowest)
        return self.made

    def note(self, func: Any, result: Any) -> None:
        """Looks whether an operation wrote into the values or gave a view of them."""
        if self.made is not None and not self.given_away:
            place = self.made.untyped_storage().data_ptr()
            views = [each.untyped_storage().data_ptr() == place for each in tree_leaves(result) if _is_plain(each)]
            self.given_away = func._schema.is_mutable or any(views)


class MaskTensor(Tensor):
    """A tensor [b, 1, s_q, s_k] whose values are made when they are asked for.

    Of bools, True lets a query see a key; of floats, 0 does and the lowest finite number does not.

    Args:
        mask: what it stands for.
        shape: of the tensor.
        device: where values will be.
        dtype: of values.

    >>> from meshwright.parallel.blockwise.masks import causal
    >>> mask = MaskTensor(causal(), (1, 1, 2, 2), device=torch.device("cpu"))
    >>> mask[:, :, :, :2].mask is mask.mask
    True
    >>> mask.logical_not().tolist()
    [[[[False, True], [False, False]]]]
    """

    _shared: _Values

    @staticmethod
    def __new__(
        cls, mask: Mask, shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype = torch.bool
    ) -> "MaskTensor":
        """Makes a tensor without memory."""
        kind = _Kind(device, dtype)
        return cls._view(_Values(mask, shape, kind), shape, kind)

    @classmethod
    def _view(cls, shared: _Values, shape: tuple[int, ...], kind: _Kind) -> "MaskTensor":
        made: MaskTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=kind.dtype, device=kind.device)
        made._shared = shared
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keeps the mask where an operation leaves it as it is, else computes with its values."""
        given = args[0] if args else None
        if isinstance(given, MaskTensor) and (shape := _shape_kept(func, given, args[1:])) is not None:
            return cls._view(given._shared, shape, _Kind(given.device, given.dtype))
        result = func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, MaskTensor):
                each._shared.note(func, result)
        return result

    @property
    def mask(self) -> Mask | None:
        """What it stands for; None once a model may have written into its values."""
        return None if self._shared.given_away else self._shared.mask

    def values(self) -> Tensor:
        """The dense mask, made once."""
        return self._shared.make()[:, :, : self.shape[2], : self.shape[3]]

    def __deepcopy__(self, memo: Any) -> Tensor:
        """Copies are dense."""
        del memo
        return self.values().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is sent elsewhere is dense."""
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


def _shape_kept(func: Any, given: MaskTensor, rest: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Shape of what an operation gives, where that is the mask, perhaps without keys or queries at its end."""
    if func in (_aten.detach.default, _aten.alias.default):
        return tuple(given.shape)
    if func is not _aten.slice.Tensor:
        return None
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dim, start, end, step = (*rest, *defaults[len(rest) :])
    if step != 1 or start not in (0, None):
        return None
    shape = list(given.shape)
    if end is None or end >= shape[dim]:
        return tuple(shape)
    if dim < 2 or end < 0:
        return None
    shape[dim] = end
    return tuple(shape)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, MaskTensor)


def _dense(value: Any) -> Any:
    return value.values() if isinstance(value, MaskTensor) else value
