"""Which samples a step reads: a function of (seed, step) alone.

Samples are numbered without end; number n is element n mod size of epoch n div size. Each epoch is a permutation
computed index by index (a Feistel network with cycle walking: Black and Rogaway, CT-RSA 2002), so that nothing has to
be stored, and a resumed run or another number of ranks reads the same batches.

Batches of like lengths come from windows of these numbers, sorted by length, cut, and shuffled batch by batch: partial
sorting (arXiv 2308.08153).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from typing import TypeVar

__all__ = ["Permutation", "SortedOrder", "batch_samples", "share"]

_ROUNDS = 6
_MASK = (1 << 64) - 1
Item = TypeVar("Item")


@dataclass(frozen=True)
class Permutation:
    """A permutation of `range(size)` in constant memory.

    >>> order = Permutation.of(5, 0, "epoch", 0)
    >>> sorted(order[index] for index in range(5))
    [0, 1, 2, 3, 4]
    """

    size: int
    half_bits: int
    keys: tuple[int, ...]

    @classmethod
    def of(cls, size: int, *key: int | str) -> "Permutation":
        """Builds the permutation of `range(size)` that belongs to a key."""
        assert size >= 1, size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        return cls(size, half_bits, tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(_ROUNDS)))

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        index = self._shuffle(index)
        while index >= self.size:
            index = self._shuffle(index)
        return index

    def _shuffle(self, value: int) -> int:
        low_mask = (1 << self.half_bits) - 1
        high, low = value >> self.half_bits, value & low_mask
        for key in self.keys:
            high, low = low, high ^ (_mix(low ^ key) & low_mask)
        return (high << self.half_bits) | low


def batch_samples(num_samples: int, *, seed: int, step: int, batch_size: int) -> list[int]:
    """Indices of the samples of one global batch, steps counted from 0.

    >>> first, second = (batch_samples(4, seed=0, step=step, batch_size=2) for step in (0, 1))
    >>> sorted(first + second)
    [0, 1, 2, 3]
    """
    found: list[int] = []
    position = step * batch_size
    while len(found) < batch_size:
        epoch, start = divmod(position + len(found), num_samples)
        order = Permutation.of(num_samples, seed, "epoch", epoch)
        end = min(num_samples, start + batch_size - len(found))
        found += [order[index] for index in range(start, end)]
    return found


@dataclass
class SortedOrder:
    """Global batches of samples sorted by length in windows of `window` batches.

    A window holds the numbers that `window` unsorted batches would. Where an epoch is no whole number of windows, its
    end is sorted together with the beginning of the next.

    Args:
        lengths: of all samples, in tokens.
        seed: of the epochs, and of the order of a window's batches.
        batch_size: samples of a batch; with `by_tokens` their mean in a window.
        window: batches that are sorted together: 1 leaves them as `batch_samples` has them, None takes an epoch.
        by_tokens: a window's batches hold about equally many tokens, instead of equally many samples.
    """

    lengths: Sequence[int]
    seed: int
    batch_size: int
    window: int | None = 1
    by_tokens: bool = False
    _number: int = field(default=-1, init=False)
    _batches: list[list[int]] = field(default_factory=list, init=False)

    def batch(self, step: int) -> list[int]:
        """Samples of a step's global batch in ascending order of length, steps counted from 0.

        >>> order = SortedOrder([9, 1, 8, 2], seed=0, batch_size=2, window=None)
        >>> sorted(order.batch(step) for step in (0, 1))
        [[1, 3], [2, 0]]
        """
        epoch = -(-len(self.lengths) // self.batch_size)
        window = epoch if self.window is None else min(self.window, epoch)
        number, place = divmod(step, window)
        if number != self._number:
            self._number, self._batches = number, self._sorted(number, window)
        return self._batches[Permutation.of(window, self.seed, "window", number)[place]]

    def _sorted(self, number: int, window: int) -> list[list[int]]:
        samples = batch_samples(len(self.lengths), seed=self.seed, step=number, batch_size=window * self.batch_size)
        samples.sort(key=self.lengths.__getitem__)
        if not self.by_tokens:
            return [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]
        ends = list(accumulate(self.lengths[sample] for sample in samples))
        borders = [0]
        for part in range(
            1, window
        ):  # no batch is empty: a sample over two borders has few, and longer ones, behind it
            fair = bisect_left(ends, ends[-1] * part // window) + 1
            borders.append(min(fair, len(samples) - (window - part)))
        return [samples[start:end] for start, end in zip(borders, [*borders[1:], len(samples)], strict=True)]


def share(items: Sequence[Item], index: int, parts: int) -> Sequence[Item]:
    """Part `index` of `parts`, the first ones an item larger where it does not divide (as `tensor_split`).

    >>> [share([1, 2, 3, 4, 5], part, 2) for part in range(2)]
    [[1, 2, 3], [4, 5]]
    """
    size, larger = divmod(len(items), parts)
    start = index * size + min(index, larger)
    return items[start : start + size + (index < larger)]


def _mix(value: int) -> int:
    """Scrambles 64 bits (the finalizer of splitmix64: Steele, Lea and Flood, OOPSLA 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
