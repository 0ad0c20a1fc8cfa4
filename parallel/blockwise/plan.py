"""Plans that are kept: the blocks of a mask, and as much of their elements as is cheap to keep."""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor

from meshwright.parallel.blockwise.bands import Limits
from meshwright.parallel.blockwise.block import Allowed
from meshwright.parallel.blockwise.diagonals import Diagonals, Uniform
from meshwright.parallel.blockwise.mask import Band, Frame, Mask
from meshwright.parallel.blockwise.positions import Pieces
from meshwright.parallel.blockwise.tiles import Tile, tiles_of

__all__ = ["Plan", "plan_for"]

_Key: TypeAlias = tuple[Pieces, Pieces, Limits, Frame]

_KEPT_PLANS = 8  # of one mask
_KEPT_PAIRS = 1 << 24  # of one plan; kernels have them as scores of 4 or 8 bytes
_PLANS: WeakKeyDictionary[Mask, dict[_Key, "Plan"]] = WeakKeyDictionary()


@dataclass(eq=False)
class Plan:
    """Blocks of one mask, and pairs of them that may attend."""

    tiles: tuple[Tile, ...]
    _kept: dict[object, Allowed] = field(default_factory=dict)
    _room: int = _KEPT_PAIRS

    def allowed(self, mask: Mask | None, tile: Tile, frame: Frame) -> Allowed | None:
        """Pairs of a tile; None is all. Diagonals are shared by all tiles of one shape."""
        if mask is None or isinstance(tile.sketch, Uniform):
            return None
        size = (len(tile.queries), len(tile.keys))
        banded = isinstance(tile.sketch, Diagonals)
        name = (*size, tile.sketch) if banded else (tile.sample, tile.queries, tile.keys)
        if name in self._kept:
            return self._kept[name]
        if isinstance(tile.sketch, Diagonals):
            found = Allowed(tile.sketch.tensor(*size, frame.device))
        else:
            found = Allowed(_Looking(mask, frame)(tile.sample, tile.queries, tile.keys))
        if type(found.pairs) is Tensor and not found.pairs.is_inference() and found.pairs.numel() <= self._room:
            self._room -= found.pairs.numel()
            self._kept[name] = found
        return found


def plan_for(mask: Mask | None, queries: Pieces, keys: Pieces, *, limits: Limits, frame: Frame) -> Plan:
    """The blocks to compute; made once for a mask that lives, or that is equal to an earlier one."""
    key = (queries, keys, limits, frame)
    if mask is None or isinstance(mask, Band):
        return _plan_of_band(mask, key)
    plans = _PLANS.setdefault(mask, {})
    if key not in plans:
        if len(plans) >= _KEPT_PLANS:
            plans.pop(next(iter(plans)))
        plans[key] = _made(mask, key)
    return plans[key]


@lru_cache(maxsize=16)
def _plan_of_band(mask: Band | None, key: _Key) -> Plan:
    return _made(mask, key)


def _made(mask: Mask | None, key: _Key) -> Plan:
    queries, keys, limits, frame = key
    return Plan(tuple(tiles_of(mask, queries, keys, limits=limits, look=_Looking(mask, frame))))


@dataclass(frozen=True, eq=False)
class _Looking:
    """Asks a mask for elements."""

    mask: Mask | None
    frame: Frame

    def __call__(self, sample: int | None, queries: range, keys: range) -> Tensor:
        assert self.mask is not None, "without a mask every block is known"
        if sample is None:
            return self.mask.pairs(queries, keys, self.frame)
        frame = replace(self.frame, batch=self.frame.batch[sample : sample + 1])
        return self.mask.row(sample).pairs(queries, keys, frame)
