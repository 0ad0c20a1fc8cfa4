"""Masks that are looked at element by element, one block at a time: dense, block-sparse, functions."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from meshwright.parallel.blockwise.diagonals import EMPTY, FULL
from meshwright.parallel.blockwise.mask import Frame, Mask, Sketch, places
from meshwright.parallel.errors import WrapError

__all__ = ["Blocks", "Dense", "Function", "MaskFunction"]

MaskFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Dense(Mask):
    """[batch, heads, queries, keys], any of them of size 1."""

    def __init__(self, allowed: Tensor) -> None:
        self._allowed = allowed
        self.rows = allowed.shape[0]
        self._row: dict[int, Mask] = {}

    def row(self, number: int) -> Mask:
        """The mask of one sample."""
        if self.rows == 1:
            return self
        return self._row.setdefault(number, type(self)(self._allowed[number : number + 1]))

    def check(self, batch: range, heads: range, *, queries: int, keys: int) -> None:
        """Every size is 1 or covers what is asked for; heads may be all of the model's."""
        rows, kinds, high, wide = self._allowed.shape
        fits = rows in (1, len(batch)) and (kinds in (1, len(heads)) or kinds >= heads.stop)
        if not fits or 1 != high < queries or 1 != wide < keys:
            raise WrapError(
                f"a dense mask {list(self._allowed.shape)} does not broadcast to {len(batch)} samples, {len(heads)} "
                f"heads, queries up to position {queries - 1} and keys up to {keys - 1}"
            )

    def sketch(self, queries: range, keys: range) -> Sketch:
        """Nothing is known."""
        return None if queries and keys else EMPTY

    def pairs(self, queries: range, keys: range, frame: Frame) -> Tensor:
        """A slice."""
        sizes = zip(self._allowed.shape[2:], (queries, keys), strict=True)
        high, wide = (slice(None) if size == 1 else slice(at.start, at.stop, at.step) for size, at in sizes)
        kinds = slice(None)
        if len(frame.heads) < self._allowed.shape[1]:
            kinds = slice(frame.heads.start, frame.heads.stop)
        return self._allowed[:, kinds, high, wide].to(frame.device)


class Blocks(Dense):
    """[batch, heads, query blocks, key blocks]."""

    def __init__(self, pattern: Tensor, block_size: int) -> None:
        super().__init__(pattern)
        self._pattern = pattern.cpu()
        self._size = block_size

    def row(self, number: int) -> Mask:
        """The mask of one sample."""
        if self.rows == 1:
            return self
        return self._row.setdefault(number, Blocks(self._pattern[number : number + 1], self._size))

    def check(self, batch: range, heads: range, *, queries: int, keys: int) -> None:
        """As a dense mask of blocks."""
        rows, kinds, high, wide = self._pattern.shape
        fits = rows in (1, len(batch)) and kinds in (1, len(heads))
        if not fits or high * self._size < queries or wide * self._size < keys:
            raise WrapError(
                f"a pattern {list(self._pattern.shape)} of blocks of {self._size} tokens does not cover {len(batch)} "
                f"samples, {len(heads)} heads, queries up to position {queries - 1} and keys up to {keys - 1}"
            )

    def sketch(self, queries: range, keys: range) -> Sketch:
        """From the blocks that the ranges touch."""
        if not queries or not keys:
            return EMPTY
        high, wide = (slice(each[0] // self._size, each[-1] // self._size + 1) for each in (queries, keys))
        part = self._pattern[:, :, high, wide]
        if not bool(part.any()):
            return EMPTY
        return FULL if bool(part.all()) else None

    def pairs(self, queries: range, keys: range, frame: Frame) -> Tensor:
        """Each block as large as it is."""
        part = self._pattern.index_select(2, places(queries) // self._size)
        return part.index_select(3, places(keys) // self._size).to(frame.device)


class Function(Mask):
    """Whatever a function says."""

    def __init__(self, allows: MaskFunction) -> None:
        self._allows = allows

    def sketch(self, queries: range, keys: range) -> Sketch:
        """Nothing is known."""
        return None if queries and keys else EMPTY

    def pairs(self, queries: range, keys: range, frame: Frame) -> Tensor:
        """Calls the function with numbers that broadcast."""
        numbers = (frame.batch, frame.heads, queries, keys)
        shapes = [[-1 if dim == own else 1 for dim in range(4)] for own in range(4)]
        indices = [places(each, frame.device).reshape(shape) for each, shape in zip(numbers, shapes, strict=True)]
        wanted = tuple(map(len, numbers))
        try:
            found = self._allows(*indices)
            ends = zip(found.shape[::-1], wanted[::-1], strict=False)
            sized = found.dtype is torch.bool and found.dim() <= 4 and all(size in (1, full) for size, full in ends)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise WrapError(
                "a mask function must take index tensors (batch, head, query, key) that broadcast and return bool, "
                f"without looking at single values; this one failed: {error}"
            ) from error
        if not sized:
            raise WrapError(f"a mask function gave {found.dtype} {list(found.shape)}, not bool within {list(wanted)}")
        return found.reshape(*(1,) * (4 - found.dim()), *found.shape)
