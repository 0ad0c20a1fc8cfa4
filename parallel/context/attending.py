"""What the attention of a block that holds its rank's positions only does with the other ranks' keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import gather, rows
from meshwright.parallel.length import Length

__all__ = ["DEALT", "WHOLE", "attend_locally", "gathered", "kind_of", "own_rows", "settings_of"]

DEALT = "dealt"
WHOLE = "whole"


def settings_of(asked: AttentionCall) -> dict[str, Any]:
    """Keyword arguments of `attend` that say what is asked for, but for bias and dropout."""
    return {"mask": asked.mask, "scale": asked.scale, "softcap": asked.softcap, "sinks": asked.sinks}


def attend_locally(asked: AttentionCall, **options: Any) -> Tensor:
    """A call whose queries and keys are all here."""
    return attend(
        asked.query,
        asked.key,
        asked.value,
        bias=asked.bias,
        dropout_p=asked.dropout_p,
        **settings_of(asked),
        **options,
    )


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


@dataclass(frozen=True, eq=False)
class _Gathered:
    length: Length
    note: Callable[[str, str], None]

    def __call__(self, asked: AttentionCall) -> Tensor:
        kind = kind_of(asked, self.length)
        if kind is None:
            return attend_locally(_without_dropout(asked))
        self.note(asked.name, kind)
        axis, full = self.length.axis, self.length.full
        key, value = asked.key, asked.value
        if kind == DEALT:
            key, value = gather(key, axis, 2, full), gather(value, axis, 2, full)
        return attend(
            asked.query,
            key,
            value,
            bias=own_rows(asked.bias, self.length),
            query_positions=axis.dealing.pieces(full, axis.rank),
            **settings_of(asked),
        )


def gathered(length: Length, note: Callable[[str, str], None]) -> Callable[[AttentionCall], Tensor]:
    """A handler for proofs: joins keys and values, drops nothing; `note` is told of each module what its keys are."""
    return _Gathered(length, note)


def _without_dropout(asked: AttentionCall) -> AttentionCall:
    from dataclasses import replace

    return replace(asked, dropout_p=0.0)
