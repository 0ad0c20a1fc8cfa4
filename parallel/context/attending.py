"""What the attention of a block that holds its rank's positions only does with the other ranks' keys."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.dropout import first_dropped_head
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import gather, rows
from meshwright.parallel.length import Length

__all__ = ["DEALT", "WHOLE", "attend_to_all", "gathered", "kind_of", "own_rows", "without_drops"]

DEALT = "dealt"
WHOLE = "whole"


def kind_of(asked: AttentionCall, length: Length) -> str | None:
    """Whether keys are dealt as queries are, or all here; None where queries are not dealt."""
    own = length.axis.dealing.size(length.full, length.axis.rank)
    if asked.query.shape[2] != own:
        return None
    return DEALT if asked.key.shape[2] == own else WHOLE


def own_rows(bias: Tensor | None, length: Length) -> Tensor | None:
    """The queries of this rank in a bias [..., queries, keys], where it has all of them.

    Raises:
        WrapError: for a bias that was made for a sequence of another length.
    """
    if bias is None or bias.shape[-2] == 1:
        return bias
    if bias.shape[-2] != length.full:
        raise WrapError(
            f"attention gets a bias for {bias.shape[-2]} queries of a sequence of {length.full} dealt over ranks; it "
            "must be made outside of the blocks, for the whole sequence"
        )
    dealing = length.axis.dealing
    return rows(bias, dealing.pieces(length.full, length.axis.rank), bias.dim() - 2)


def attend_to_all(asked: AttentionCall, length: Length, kind: str, sizes: Blockwise) -> Tensor:
    """This rank's queries over all keys, joined first where they are dealt."""
    axis, full = length.axis, length.full
    key, value = asked.key, asked.value
    if kind == DEALT:
        key, value = gather(key, axis, 2, full), gather(value, axis, 2, full)
    whole = replace(asked, key=key, value=value, bias=own_rows(asked.bias, length))
    return attend_to(whole, sizes, query_positions=axis.dealing.pieces(full, axis.rank))


def gathered(length: Length, note: Callable[[str, str], None]) -> Callable[[AttentionCall], Tensor]:
    """A handler for proofs, which drops nothing; `note` is told of each module what its keys are."""

    def attend(asked: AttentionCall) -> Tensor:
        kind = kind_of(asked, length)
        if kind is None:
            return attend_to(without_drops(asked), Blockwise())
        note(asked.name, kind)
        keys = length.full if kind == DEALT else asked.key.shape[2]
        return attend_to_all(without_drops(asked, keys), length, kind, Blockwise())

    return attend


def without_drops(asked: AttentionCall, keys: int | None = None) -> AttentionCall:
    """The same call without dropout, which proofs only count; `keys` is their number over all ranks."""
    if asked.dropout_p:
        first_dropped_head(asked.query, (*asked.query.shape[:3], asked.key.shape[2] if keys is None else keys))
    return replace(asked, dropout_p=0.0)
