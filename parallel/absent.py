"""Tensors of another rank: shape, dtype and device without values.

A pipeline's rank runs a model's own code between blocks that it does not hold. What those blocks would give is absent
there, and so is everything made from it; asking for a value is an error, never a wrong number.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from meshwright.parallel.errors import WrapError

__all__ = ["Absent"]


class Absent(Tensor):
    """A tensor whose values are elsewhere.

    >>> absent = Absent.of(torch.Size([2, 3]), torch.float32, torch.device("cpu"))
    >>> (absent @ torch.ones(3, 4)).shape
    torch.Size([2, 4])
    """

    stand_in: Tensor
    value: Tensor | None = None
    """What it is, once this rank has received it; the model's code then computes with that."""

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> "Absent":
        """One of this shape."""
        return cls.making(shape, dtype, device)()

    @classmethod
    def making(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Callable[[], "Absent"]:
        """What makes many of this shape."""
        shared = _stand_in(shape, dtype, device)  # that it goes through operations as
        made = partial(Tensor._make_wrapper_subclass, cls, shape, dtype=dtype, device=device)

        def make() -> Absent:
            absent: Absent = made()
            absent.stand_in = shared
            return absent

        return make

    @classmethod
    def _around(cls, stand_in: Tensor) -> "Absent":
        absent: Absent = Tensor._make_wrapper_subclass(
            cls, stand_in.shape, strides=stand_in.stride(), dtype=stand_in.dtype, device=stand_in.device
        )
        absent.stand_in = stand_in
        return absent

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Absent({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Puts values in the place of tensors that have been received."""
        del types
        given_args, given_keywords = tree_map(_received, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*given_args, **given_keywords)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Works out shapes.

        Raises:
            WrapError: when values are asked for, or put into a tensor that has some.
        """
        keywords = kwargs or {}
        _refuse_writes(func, args)
        if torch.Tag.nondeterministic_seeded in func.tags:  # draws as many numbers as the rank that has the values
            args_with_memory, keywords_with_memory = tree_map(_with_memory, (args, keywords))
            func(*args_with_memory, **keywords_with_memory)
        given = [each for each in tree_flatten((args, keywords))[0] if isinstance(each, Absent)]
        if torch.Tag.inplace_view in func.tags:  # changes shapes, which others share
            with _fakes():
                given[0].stand_in = given[0].stand_in.clone()
        held = {id(each.stand_in): each for each in reversed(given)}  # what is changed in place comes first
        bare_args, bare_keywords = tree_map(_bare, (args, keywords))
        try:
            with _fakes():
                made = func(*bare_args, **bare_keywords)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise WrapError(
                f"between its blocks the model asks for a value ({func}) that another rank of the pipeline holds; "
                "pipelines take models that decide such things inside blocks, or from the batch alone"
            ) from error

        def wrapped(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            return held[id(each)] if id(each) in held else cls._around(each)

        return tree_map(wrapped, made)


def _bare(value: Any) -> Any:
    return value.stand_in if isinstance(value, Absent) else value


def _received(value: Any) -> Any:
    return value.value if isinstance(value, Absent) and value.value is not None else value


def _with_memory(value: Any) -> Any:
    if not isinstance(value, Absent):
        return value
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device)


def _refuse_writes(func: Any, args: Any) -> None:
    for argument, given in zip(func._schema.arguments, args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(given, Tensor) and not isinstance(given, Absent):
            raise WrapError(
                f"between its blocks the model writes what another rank of the pipeline holds into a tensor ({func}); "
                "pipelines carry values to blocks through the blocks' inputs only"
            )


def _stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without values, shared by all that are like it: to make one takes 0.1 ms."""
    return _made(shape, dtype, device=device, fakes=_fakes())


@lru_cache(maxsize=256)
def _made(shape: torch.Size, dtype: torch.dtype, *, device: torch.device, fakes: FakeTensorMode) -> Tensor:
    with _disable_current_modes(), fakes:  # nothing that counts memory sees it
        return torch.empty(shape, dtype=dtype, device=device)


def _fakes() -> FakeTensorMode:
    """The one that runs, in which nothing has values; else our own."""
    running = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return running if isinstance(running, FakeTensorMode) else _own()


@cache
def _own() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)
