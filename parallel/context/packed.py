"""Keys and values of one rank in one piece of memory, so that a hop is one message."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Packed", "Sizes"]


class Sizes(NamedTuple):
    """What is the same on every rank.

    Attributes:
        batch: samples.
        kv_heads: heads of keys and values.
        width: of a key.
        value_width: of a value.
    """

    batch: int
    kv_heads: int
    width: int
    value_width: int

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> "Sizes":
        """Of [batch, kv_heads, positions, d]."""
        return cls(key.shape[0], key.shape[1], key.shape[3], value.shape[3])

    def elements(self, positions: int) -> int:
        """Of keys and values together."""
        return self.batch * self.kv_heads * positions * (self.width + self.value_width)


class Packed(NamedTuple):
    """One piece of memory, and keys and values within it, [batch, kv_heads, positions, d]."""

    memory: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def within(cls, memory: Tensor, sizes: Sizes, positions: int) -> "Packed":
        """Keys and values of so many positions in a piece of memory."""
        shapes = [(sizes.batch, sizes.kv_heads, positions, each) for each in (sizes.width, sizes.value_width)]
        parts = memory.split([prod(shape) for shape in shapes])
        key, value = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return cls(memory, key, value)

    @classmethod
    def empty(cls, like: Tensor, sizes: Sizes, positions: int) -> "Packed":
        """Room for so many positions."""
        return cls.within(like.new_empty(sizes.elements(positions)), sizes, positions)

    @classmethod
    def zeros(cls, like: Tensor, sizes: Sizes, positions: int) -> "Packed":
        """Sums to be added to, in float32 or wider."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return cls.within(like.new_zeros(sizes.elements(positions), dtype=wide), sizes, positions)

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> "Packed":
        """A copy."""
        made = cls.empty(key, Sizes.of(key, value), key.shape[2])
        made.key.copy_(key)
        made.value.copy_(value)
        return made
