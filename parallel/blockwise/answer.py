"""What `attend` makes of a call that arrived."""

from torch import Tensor

from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.positions import Positions
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.dropout import first_dropped_head

__all__ = ["attend_to"]


def attend_to(asked: AttentionCall, sizes: Blockwise, *, query_positions: Positions | None = None) -> Tensor:
    """Computes a call by blocks; what is dropped does not depend on who holds which heads.

    Args:
        asked: the call.
        sizes: of blocks.
        query_positions: of its queries, where they are not the first ones.

    Returns:
        [b, heads, s_q, d_v].
    """
    scores = (*asked.query.shape[:3], asked.key.shape[2])
    return attend(
        asked.query,
        asked.key,
        asked.value,
        mask=asked.mask,
        bias=asked.bias,
        scale=asked.scale,
        softcap=asked.softcap,
        sinks=asked.sinks,
        dropout_p=asked.dropout_p,
        first_head=first_dropped_head(asked.query, scores) if asked.dropout_p else 0,
        query_block=sizes.query_block,
        kv_block=sizes.kv_block,
        query_positions=query_positions,
    )
