"""What the attention of a block that holds its rank's positions only does with the other ranks' keys."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.mask import Band
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.context.plan import Attends, Seen
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import gather, rows
from meshwright.parallel.length import Length
from meshwright.parallel.threads import ThreadAxis

__all__ = ["attend_to_all", "gathered", "has_dealt_keys", "own_rows", "without_drops"]


def has_dealt_keys(asked: AttentionCall, length: Length) -> bool | None:
    """Whether keys are dealt as queries are, or all here; None where queries are not dealt."""
    own = length.axis.dealing.size(length.full, length.axis.rank)
    return None if asked.query.shape[2] != own else asked.key.shape[2] == own


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


def attend_to_all(asked: AttentionCall, length: Length, sizes: Blockwise, *, dealt: bool) -> Tensor:
    """This rank's queries over all keys, joined first where they are `dealt`."""
    axis, full = length.axis, length.full
    key, value = asked.key, asked.value
    if dealt:
        key, value = gather(key, axis, 2, full), gather(value, axis, 2, full)
    whole = replace(asked, key=key, value=value, bias=own_rows(asked.bias, length))
    return attend_to(whole, sizes, query_positions=axis.dealing.pieces(full, axis.rank))


def gathered(
    length: Length, note: Callable[[str, Attends], None], *, joined: Iterable[str]
) -> Callable[[AttentionCall], Tensor]:
    """A handler for proofs, which drops nothing; `note` is told how each module attends, by one rank.

    How keys are fetched here says nothing of how they will be, so it is not among the axis' calls.

    Args:
        length: of the stream.
        note: see above.
        joined: modules that run whole on every rank.

    Raises:
        WrapError: by the handler, for attention along another dim than the dealt one that drops: a rank would draw for
            its share what is drawn for all.
    """
    whole = tuple(f"{path}." for path in joined)
    assert isinstance(length.axis, ThreadAxis), type(length.axis)
    fetching = Length(length.axis.unnoted(), full=length.full, width=length.width)

    def attend(asked: AttentionCall) -> Tensor:
        dealt = has_dealt_keys(asked, length)
        if dealt is None:
            if asked.dropout_p and not f"{asked.name}.".startswith(whole):
                raise WrapError(f"attention of {asked.name} drops, and its queries are not what is dealt")
            return attend_to(without_drops(asked), Blockwise())
        if length.axis.rank == 0:
            note(asked.name, _attends(asked, length.full, dealt=dealt))
        return attend_to_all(without_drops(asked), fetching, Blockwise(), dealt=dealt)

    return attend


def _attends(asked: AttentionCall, full: int, *, dealt: bool) -> Attends:
    query, key, value, mask = asked.query, asked.key, asked.value, asked.mask
    band = Band(None, None) if mask is None else mask
    seen = Seen(
        batch=query.shape[0],
        length=full,
        value_width=value.shape[3],
        window=(band.left, band.right) if isinstance(band, Band) else None,
        biased=asked.bias is not None and asked.bias.shape[-2] > 1,
        learned=any(each.requires_grad for each in (query, key, value)),
    )
    return Attends(dealt, query.shape[1], key.shape[1], key.shape[3], seen)


def without_drops(asked: AttentionCall) -> AttentionCall:
    """The same call without dropout, whose masks depend on samples, heads and positions alone and need no proof."""
    return replace(asked, dropout_p=0.0)
