"""Masks that follow from one number per token: packed documents and padding.

Numbers are kept as runs of equal ones, on the CPU, so that planning looks at no element and waits for no device.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from meshwright.parallel.blockwise.diagonals import EMPTY, FULL
from meshwright.parallel.blockwise.mask import Frame, Mask, Sketch
from meshwright.parallel.errors import WrapError

__all__ = ["Documents", "Padding", "Tokens"]


class Tokens(Mask):
    """A mask that follows from one number per token and sample; one sample has its runs."""

    def __init__(self, tokens: Tensor) -> None:
        self._all = tokens
        self.rows = tokens.shape[0]
        self._row: dict[int, Mask] = {}
        if self.rows == 1:
            kinds, counts = torch.unique_consecutive(tokens[0].cpu(), return_counts=True)
            self._kinds: list[int] = kinds.tolist()
            self._starts: list[int] = [0, *counts.cumsum(0).tolist()]

    @classmethod
    def of(cls, tokens: Tensor, kind: "type[Tokens]") -> "Tokens":
        """One row where all samples are alike."""
        tokens = tokens.cpu()
        if tokens.shape[0] and bool((tokens == tokens[:1]).all()):
            tokens = tokens[:1]
        return kind(tokens.clone())

    def row(self, number: int) -> Mask:
        """The mask of one sample."""
        if self.rows == 1:
            return self
        if number not in self._row:
            self._row[number] = type(self)(self._all[number : number + 1])
        return self._row[number]

    def cuts(self, positions: range, *, of_keys: bool) -> Sequence[int]:
        """Where runs begin."""
        del of_keys
        if self.rows > 1 or not positions:
            return ()
        first, last = bisect_right(self._starts, positions[0]), bisect_right(self._starts, positions[-1])
        found = (-((positions.start - start) // positions.step) for start in self._starts[first:last])
        return sorted({place for place in found if 0 < place < len(positions)})

    def check(self, batch: range, heads: range, *, queries: int, keys: int) -> None:
        """The samples and positions that the tokens cover."""
        del heads
        if self.rows not in (1, len(batch)) or self._all.shape[1] < max(queries, keys):
            raise WrapError(
                f"a mask over {self._all.shape[0]} samples of {self._all.shape[1]} tokens was given for {len(batch)} "
                f"samples with positions up to {max(queries, keys) - 1}; it must cover the whole sequence"
            )

    def sketch(self, queries: range, keys: range) -> Sketch:
        """Common to all samples, or not known."""
        if self.rows == 1:
            return self._sketch(queries, keys)
        found = {self.row(number).sketch(queries, keys) for number in range(self.rows)}
        return found.pop() if len(found) == 1 else None

    def _sketch(self, queries: range, keys: range) -> Sketch:
        raise NotImplementedError

    def _kinds_in(self, positions: range) -> list[int]:
        """Numbers of the tokens there, and perhaps of some between them."""
        if not positions:
            return []
        first, last = bisect_right(self._starts, positions[0]) - 1, bisect_right(self._starts, positions[-1])
        return self._kinds[first:last]

    def _at(self, positions: range, device: torch.device | str) -> Tensor:
        """[samples, positions]"""
        return self._all[:, positions.start : positions.stop : positions.step].to(device)


class Documents(Tokens):
    """Equal numbers attend to each other."""

    def _sketch(self, queries: range, keys: range) -> Sketch:
        mine, theirs = set(self._kinds_in(queries)), set(self._kinds_in(keys))
        common = {each for each in mine & theirs if each >= 0}
        if not common:
            return EMPTY
        return FULL if len(mine) == len(theirs) == 1 else None

    def pairs(self, queries: range, keys: range, frame: Frame) -> Tensor:
        """Compares the numbers."""
        mine, theirs = self._at(queries, frame.device), self._at(keys, frame.device)
        return ((mine[:, :, None] == theirs[:, None, :]) & (mine >= 0)[:, :, None])[:, None]

    def span(self, queries: range) -> range | None:
        """From the first token of the documents of `queries` to the last."""
        if self.rows > 1:
            return None
        wanted = {each for each in self._kinds_in(queries) if each >= 0}
        ends = [self._ends()[each] for each in wanted]
        return range(min(start for start, _ in ends), max(stop for _, stop in ends)) if ends else range(0)

    def _ends(self) -> dict[int, tuple[int, int]]:
        if not hasattr(self, "_known_ends"):
            self._known_ends: dict[int, tuple[int, int]] = {}
            for kind, (start, stop) in zip(self._kinds, pairwise(self._starts), strict=True):
                self._known_ends[kind] = (self._known_ends.get(kind, (start, stop))[0], stop)
        return self._known_ends


class Padding(Tokens):
    """Numbers other than 0 are attended."""

    def check(self, batch: range, heads: range, *, queries: int, keys: int) -> None:
        """The positions of keys are covered; there may be more queries, of another sequence."""
        del queries
        super().check(batch, heads, queries=0, keys=keys)

    def _sketch(self, queries: range, keys: range) -> Sketch:
        kinds = set(self._kinds_in(keys)) if queries else set()
        if 1 not in kinds:
            return EMPTY
        return None if 0 in kinds else FULL

    def cuts(self, positions: range, *, of_keys: bool) -> Sequence[int]:
        """Queries are all alike."""
        return super().cuts(positions, of_keys=True) if of_keys else ()

    def pairs(self, queries: range, keys: range, frame: Frame) -> Tensor:
        """The keys alone."""
        del queries
        return (self._at(keys, frame.device) != 0)[:, None, None]

    def span(self, queries: range) -> range | None:
        """From the first valid key to the last."""
        del queries
        if self.rows > 1:
            return None
        valid = [run for run, kind in enumerate(self._kinds) if kind]
        return range(self._starts[valid[0]], self._starts[valid[-1] + 1]) if valid else range(0)
