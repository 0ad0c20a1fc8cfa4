"""What a mask is: a value that knows, block by block, which query may attend to which key.

Positions are numbers in the whole sequence, given as ranges: a rank that holds chunks of it, or every n-th token,
asks for what it holds. Structured masks decide most blocks without an element; the others look at one block at a time.

  sketch(queries, keys)   EMPTY, FULL, a band of diagonals, or None: only the elements tell
  pairs(queries, keys)    the elements, bool, broadcastable to [batch, heads, queries, keys], True where attended
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from meshwright.parallel.blockwise.diagonals import EMPTY, FULL, Diagonals, Uniform, diagonals
from meshwright.parallel.errors import WrapError

__all__ = ["Band", "Frame", "Mask", "Sketch", "Verdict", "causal", "places", "window"]

Sketch: TypeAlias = Diagonals | Uniform | None
Verdict: TypeAlias = Uniform | Tensor


@dataclass(frozen=True)
class Frame:
    """Where a block is looked at: numbers of its samples and heads in the whole model, and a device."""

    batch: range = range(1)
    heads: range = range(1)
    device: torch.device | str = "cpu"


class Mask:
    """Which (query, key) pairs may attend; immutable. Combine masks with `&` and `|`.

    `rows` is the number of samples that it tells apart: 1 is a mask for all of them.

    >>> mask = causal() & window(2)
    >>> mask.block(range(0, 2), range(4, 8))
    <Uniform.EMPTY: 'empty'>
    >>> mask.block(range(4, 6), range(2, 6)).int()
    tensor([[1, 1, 1, 0],
            [0, 1, 1, 1]], dtype=torch.int32)
    """

    rows: int = 1

    def __and__(self, other: "Mask") -> "Mask":
        if isinstance(self, Band) and isinstance(other, Band):
            left, right = _tighter(self.left, other.left), _tighter(self.right, other.right)
            if left is None or right is None or -left <= right:
                return Band(left, right)
        return _Both(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return _Either(self, other)

    def block(self, queries: range, keys: range, frame: Frame | None = None) -> Verdict:
        """Looks at one block.

        Args:
            queries: positions of its queries.
            keys: positions of its keys.
            frame: its samples, heads and device; one sample and head on the CPU otherwise.

        Returns:
            EMPTY, FULL, or bool broadcastable to [batch, heads, queries, keys].
        """
        sketch = self.sketch(queries, keys)
        if isinstance(sketch, Uniform):
            return sketch
        frame = frame or Frame()
        if sketch is not None:
            return sketch.tensor(len(queries), len(keys), frame.device)
        pairs = self.pairs(queries, keys, frame)
        if not bool(pairs.any()):
            return EMPTY
        return FULL if bool(pairs.all()) else pairs

    def sketch(self, queries: range, keys: range) -> Sketch:
        """What is known of a block without its elements."""
        raise NotImplementedError

    def pairs(self, queries: range, keys: range, frame: Frame) -> Tensor:
        """The elements of a block."""
        raise NotImplementedError

    def span(self, queries: range) -> range | None:
        """Consecutive positions outside of which no key is attended; None when not known."""
        del queries
        return None

    def cuts(self, positions: range, *, of_keys: bool) -> Sequence[int]:
        """Places in `positions` at which blocks had better begin."""
        del positions, of_keys
        return ()

    def row(self, number: int) -> "Mask":
        """The mask of one sample."""
        del number
        return self

    def check(self, batch: range, heads: range, *, queries: int, keys: int) -> None:
        """Refuses samples, heads or positions (below `queries` and `keys`) that the mask does not cover.

        Raises:
            WrapError: then.
        """


def places(positions: range, device: torch.device | str = "cpu") -> Tensor:
    """Positions as an int64 tensor."""
    return torch.arange(positions.start, positions.stop, positions.step, device=device)


@dataclass(frozen=True)
class Band(Mask):
    """Keys from `left` before a query to `right` after it; None is no limit on that side."""

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        if self.left is not None and self.right is not None and -self.left > self.right:
            raise WrapError(f"a window from {-self.left} to {self.right} around each query holds nothing")

    def sketch(self, queries: range, keys: range) -> Sketch:
        """A band of diagonals wherever queries and keys have the same step."""
        if not queries or not keys:
            return EMPTY
        step = queries.step if len(queries) > 1 else keys.step
        rows, columns = len(queries), len(keys)
        if columns > 1 and keys.step != step:
            return self._hull(queries, keys)
        ahead = keys.start - queries.start
        low = 1 - rows if self.left is None else -((self.left + ahead) // step)
        high = columns - 1 if self.right is None else (self.right - ahead) // step
        return diagonals(low, high, rows=rows, columns=columns)

    def _hull(self, queries: range, keys: range) -> Sketch:
        least, most = keys[0] - queries[-1], keys[-1] - queries[0]
        low = least if self.left is None else -self.left
        high = most if self.right is None else self.right
        if low > most or high < least:
            return EMPTY
        return FULL if low <= least and high >= most else None

    def pairs(self, queries: range, keys: range, frame: Frame) -> Tensor:
        """From the distances."""
        distance = places(keys, frame.device) - places(queries, frame.device).unsqueeze(-1)
        inside = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            inside &= distance >= -self.left
        if self.right is not None:
            inside &= distance <= self.right
        return inside

    def span(self, queries: range) -> range | None:
        """From the first query's first key to the last one's last; a side without a limit is far away."""
        start = 0 if self.left is None else max(queries[0] - self.left, 0)
        stop = _FAR if self.right is None else max(queries[-1] + self.right + 1, start)
        return range(start, stop)


_FAR = 1 << 62


def causal() -> Mask:
    """Keys up to the query's own position.

    >>> causal().block(range(4, 8), range(0, 4))
    <Uniform.FULL: 'full'>
    """
    return Band(None, 0)


def window(left: int | None, right: int | None = 0) -> Mask:
    """Keys from `left` positions before a query to `right` after it (sliding window); None is no limit on that side.

    >>> window(1).block(range(3), range(3)).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)

    Raises:
        WrapError: for a window that holds nothing.
    """
    return Band(left, right)


def _tighter(one: int | None, other: int | None) -> int | None:
    return min((each for each in (one, other) if each is not None), default=None)


class _Pair(Mask):
    """Two masks, sample by sample."""

    def __init__(self, one: Mask, other: Mask) -> None:
        if 1 not in (one.rows, other.rows) and one.rows != other.rows:
            raise WrapError(
                f"masks of {one.rows} and {other.rows} samples cannot be combined; give both one batch size"
            )
        self.one, self.other = one, other
        self.rows = max(one.rows, other.rows)
        self._row: dict[int, Mask] = {}

    def row(self, number: int) -> Mask:
        """Both masks of one sample."""
        if self.rows == 1:
            return self
        if number not in self._row:
            self._row[number] = type(self)(self.one.row(number), self.other.row(number))
        return self._row[number]

    def cuts(self, positions: range, *, of_keys: bool) -> Sequence[int]:
        """The cuts of both."""
        return sorted({*self.one.cuts(positions, of_keys=of_keys), *self.other.cuts(positions, of_keys=of_keys)})

    def check(self, batch: range, heads: range, *, queries: int, keys: int) -> None:
        """Asks both."""
        self.one.check(batch, heads, queries=queries, keys=keys)
        self.other.check(batch, heads, queries=queries, keys=keys)


class _Both(_Pair):
    """Pairs that both masks let attend."""

    def sketch(self, queries: range, keys: range) -> Sketch:
        """Nothing if either has nothing; the common diagonals of two bands."""
        one = self.one.sketch(queries, keys)
        if one is EMPTY:
            return EMPTY
        other = self.other.sketch(queries, keys)
        if one is FULL or other is EMPTY:
            return other
        if other is FULL:
            return one
        if isinstance(one, Diagonals) and isinstance(other, Diagonals):
            low, high = max(one.low, other.low), min(one.high, other.high)
            return diagonals(low, high, rows=len(queries), columns=len(keys))
        return None

    def pairs(self, queries: range, keys: range, frame: Frame) -> Tensor:
        """Both of them."""
        return self.one.pairs(queries, keys, frame) & self.other.pairs(queries, keys, frame)

    def span(self, queries: range) -> range | None:
        """What both spans share."""
        one, other = self.one.span(queries), self.other.span(queries)
        if one is None or other is None:
            return other if one is None else one
        start = max(one.start, other.start)
        return range(start, max(start, min(one.stop, other.stop)))


class _Either(_Pair):
    """Pairs that one of two masks lets attend."""

    def sketch(self, queries: range, keys: range) -> Sketch:
        """Everything if either has it; one's diagonals where the other has nothing."""
        one = self.one.sketch(queries, keys)
        if one is FULL:
            return FULL
        other = self.other.sketch(queries, keys)
        if other is FULL or one is EMPTY:
            return other
        return one if other is EMPTY else None

    def pairs(self, queries: range, keys: range, frame: Frame) -> Tensor:
        """Either of them."""
        return self.one.pairs(queries, keys, frame) | self.other.pairs(queries, keys, frame)

    def span(self, queries: range) -> range | None:
        """From the first of both to the last."""
        one, other = self.one.span(queries), self.other.span(queries)
        if one is None or other is None:
            return None
        if not one or not other:
            return one or other
        return range(min(one.start, other.start), max(one.stop, other.stop))
