"""Attention of a sequence that is dealt over the ranks of one mesh axis: exact, for every kind, dealing and length.

There are two ways to share the work, and both at once: consecutive ranks exchange positions for heads (`swap`), and
across their groups keys are brought to queries (`ring`, `gathered`). With one group nothing is left for the second.
"""

from dataclasses import dataclass, replace
from typing import Any, Required, TypeAlias, Unpack

from torch import Tensor

from meshwright.parallel.blockwise.attention import (
    AttendKeywords,
    attend,
    cast_tensors,
    check_sinks,
    check_tensors,
    without_autocast,
)
from meshwright.parallel.blockwise.scoring import BiasFunction, Scoring, ScoringKeywords
from meshwright.parallel.context.axis import ContextAxis
from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.gathered import GatheredSupply
from meshwright.parallel.context.heads import deal_heads
from meshwright.parallel.context.join import Joined, join_pieces
from meshwright.parallel.context.kinds import GatherKV, Kind, ulysses_degree
from meshwright.parallel.context.ring import RingSupply
from meshwright.parallel.context.routes import route_for
from meshwright.parallel.context.supply import Supply, Wanted, attend_supplied
from meshwright.parallel.context.swap import Swap, to_heads, to_positions
from meshwright.parallel.errors import WrapError, nearest

__all__ = ["DealtKeywords", "attend_dealt"]

_Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor]


class DealtKeywords(ScoringKeywords, total=False):
    """Keyword arguments of `attend_dealt`; the first four must be given."""

    axis: Required[ContextAxis]
    dealing: Required[Dealing]
    length: Required[int]
    kind: Required[Kind]
    bias: Tensor | BiasFunction | None
    sinks: Tensor | None
    dropout_seed: int | None


def attend_dealt(query: Tensor, key: Tensor, value: Tensor, **options: Unpack[DealtKeywords]) -> Tensor:
    """What `attend` gives for the whole sequence, for the positions of this rank.

    Every rank of the axis must call it, with the same mask and seed, and go back through it. Gradients of what all
    ranks hold alike (sinks, a bias without rows) are each rank's part of the sum.

    Args:
        query: [batch, heads, own positions, d], those of `dealing.pieces(length, axis.rank)`.
        key: [batch, kv_heads, own positions, d].
        value: [batch, kv_heads, own positions, d_v].
        options: `axis`, the ranks, made by `context_axis` with `kind`; `dealing`, which positions each of them has;
            `length` of the whole sequence; `kind`, how keys and queries meet; and those of `attend`. Masks and bias
            functions are about positions in the whole sequence; a bias tensor is broadcastable to [batch, heads, own
            positions, length]; dropout needs a `dropout_seed`.

    Returns:
        [batch, heads, own positions, d_v]

    Raises:
        WrapError: for shapes, options, or numbers of heads that do not fit.
    """
    tensors = cast_tensors(query, key, value)
    check_tensors(*tensors)
    check_sinks(options.get("sinks"), query.shape[1])
    call = _Call(options, heads=query.shape[1])
    call.check(tensors)
    with without_autocast(query.device.type):
        return call.attend(tensors)


class _Call:
    """One call: the axis in its two parts, and who holds which positions and heads."""

    def __init__(self, options: DealtKeywords, *, heads: int) -> None:
        axis, dealing, length, kind = options["axis"], options["dealing"], options["length"], options["kind"]
        if dealing.degree != axis.size:
            raise WrapError(f"a sequence dealt over {dealing.degree} ranks cannot be attended to on {axis.size}")
        unknown = [name for name in options if name not in DealtKeywords.__annotations__]
        if unknown:
            close = nearest(unknown[0], DealtKeywords.__annotations__)
            raise WrapError(f"attend_dealt() has no option {unknown[0]!r}; {close}")
        own: Any = {name: each for name, each in options.items() if name not in DealtKeywords.__required_keys__}
        self._options: AttendKeywords = own
        each = ulysses_degree(kind, axis.size)
        self._inner, self._outer = axis.parts(each)
        self._length, self._kind, self._heads = length, kind, heads
        self._size = dealing.size(length, axis.rank)
        self._groups = [
            join_pieces([dealing.pieces(length, rank) for rank in range(first, first + each)])
            for first in range(0, axis.size, each)
        ]

    @property
    def _here(self) -> Joined:
        return self._groups[self._outer.rank]

    def check(self, tensors: _Tensors) -> None:
        """Refuses what other ranks would wait for, or what would differ between them."""
        options = self._options
        if any(each.shape[2] != self._size for each in tensors):
            raise WrapError(
                f"query {list(tensors[0].shape)} and key {list(tensors[1].shape)} must be [batch, heads, {self._size}, "
                f"d]: this rank has {self._size} of {self._length} positions"
            )
        if options.get("dropout_p", 0.0) > 0.0 and options.get("dropout_seed") is None:
            raise WrapError("dropout of a dealt sequence needs a dropout_seed=, the same on all its ranks")
        bias = options.get("bias")
        if isinstance(bias, Tensor):
            rows, columns = [1, 1, *bias.shape][-2:]
            if rows not in (1, self._size) or columns not in (1, self._length) or bias.dim() > 4:
                raise WrapError(
                    f"a bias {list(bias.shape)} must be broadcastable to [batch, heads, {self._size}, {self._length}]: "
                    "rows of this rank's positions, columns of all"
                )

    def attend(self, tensors: _Tensors) -> Tensor:
        """Exchanges positions for heads where there is a group, and back."""
        if self._inner.size == 1:
            return self._bring(tensors, self._options)
        heads = deal_heads(self._heads, tensors[1].shape[1], self._inner.size)
        swap = Swap(self._inner, self._here, (heads.queries, heads.keys, heads.keys))
        query, key, value = to_heads(swap, *tensors)
        out = self._bring((query, key, value), self._of_heads(swap))
        return to_positions(replace(swap, heads=(heads.queries,)), out)[0]

    def _bring(self, tensors: _Tensors, options: AttendKeywords) -> Tensor:
        """Brings keys to the queries of a group."""
        query, key, value = tensors
        pieces = self._here.pieces
        if self._outer.size == 1:
            placed: AttendKeywords = {**options, "query_positions": pieces, "key_positions": pieces}
            return attend(query, key, value, with_lse=False, **placed)
        given: Any = dict(options)
        bias, sinks, seed = (given.pop(name, None) for name in ("bias", "sinks", "dropout_seed"))
        function = None if isinstance(bias, Tensor) else bias
        scoring = Scoring(**given, bias=function, dropout_seed=seed or 0)
        own = _four_dims(bias) if isinstance(bias, Tensor) else None
        wanted = Wanted(pieces, scoring, self._supply(scoring))
        return attend_supplied(query, key, value, bias=own, sinks=sinks, wanted=wanted)

    def _supply(self, scoring: Scoring) -> Supply:
        positions = tuple(each.pieces for each in self._groups)
        if isinstance(self._kind, GatherKV):
            return GatheredSupply(self._outer, join_pieces(positions))
        return RingSupply(self._outer, positions, route_for(scoring.mask, positions))

    def _of_heads(self, swap: Swap) -> AttendKeywords:
        """What belongs to this rank's heads."""
        options, dealt = self._options, swap.heads[0]
        start, stop = dealt[self._inner.rank]
        found: AttendKeywords = {**options, "first_head": options.get("first_head", 0) + start}
        sinks, bias = options.get("sinks"), options.get("bias")
        if sinks is not None:
            found["sinks"] = sinks[start:stop]
        if isinstance(bias, Tensor):
            bias = _four_dims(bias)
            sizes = self._here.sizes
            if bias.shape[2] == 1 and min(sizes) > 1:
                found["bias"] = bias[:, start:stop] if bias.shape[1] > 1 else bias
            else:  # also where a rank could not tell its only row from none
                kinds = dealt if bias.shape[1] > 1 else ((0, 1),) * self._inner.size
                rows = bias.expand(-1, -1, sizes[self._inner.rank], -1)
                found["bias"] = to_heads(replace(swap, heads=(kinds,)), rows)[0]
        elif bias is not None:
            found["bias"] = _BiasOfHeads(bias, self._heads, slice(start, stop))
        return found


@dataclass(frozen=True)
class _BiasOfHeads:
    """A bias function's scores of some heads."""

    function: BiasFunction
    heads: int
    own: slice

    def __call__(self, queries: range, keys: range) -> Tensor:
        made = self.function(queries, keys)
        return made[..., self.own, :, :] if made.dim() > 2 and made.shape[-3] == self.heads > 1 else made


def _four_dims(bias: Tensor) -> Tensor:
    return bias.reshape(*(1,) * (4 - bias.dim()), *bias.shape)
