"""What `attend` makes of a call that arrived."""

from torch import Tensor

from meshwright.parallel.blockwise.attention import AttendKeywords, attend
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.positions import Positions
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.dropout import first_dropped_head

__all__ = ["attend_to", "first_head_of", "keywords_of"]


def attend_to(asked: AttentionCall, sizes: Blockwise, *, query_positions: Positions | None = None) -> Tensor:
    """Computes a call by blocks; what is dropped does not depend on who holds which heads.

    Args:
        asked: the call.
        sizes: of blocks.
        query_positions: of its queries, where they are not the first ones.

    Returns:
        [b, heads, s_q, d_v].
    """
    options = keywords_of(asked, sizes)
    options["query_positions"] = query_positions
    options["first_head"] = first_head_of(asked, asked.key.shape[2])
    return attend(asked.query, asked.key, asked.value, with_lse=False, **options)


def keywords_of(asked: AttentionCall, sizes: Blockwise) -> AttendKeywords:
    """What a call says besides its query, key and value, and besides what it drops."""
    return {
        "mask": asked.mask,
        "bias": asked.bias,
        "scale": asked.scale,
        "softcap": asked.softcap,
        "sinks": asked.sinks,
        "dropout_p": asked.dropout_p,
        "query_block": sizes.query_block,
        "kv_block": sizes.kv_block,
    }


def first_head_of(asked: AttentionCall, keys: int) -> int:
    """Number in the whole model of the first head of a call that drops; 0 where it does not."""
    return first_dropped_head(asked.query, (*asked.query.shape[:3], keys)) if asked.dropout_p else 0
