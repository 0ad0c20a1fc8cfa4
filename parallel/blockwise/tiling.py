"""Feed-forward networks and the loss of a wrapped model by blocks, as its options ask."""

from collections import Counter
from collections.abc import Iterable

from torch import nn

from meshwright.parallel.blockwise.feed_forward import tile_feed_forward
from meshwright.parallel.blockwise.loss import tile_loss
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import Axis
from meshwright.parallel.tensor_plan import starred

__all__ = ["tile_heads", "tile_networks"]


def tile_networks(model: nn.Module, sizes: Blockwise | None) -> list[str]:
    """Makes feed-forward networks run by blocks, on the whole model; returns what a report says.

    Raises:
        WrapError: where `ffn_block` is asked for and none can.
    """
    if sizes is None or sizes.ffn_block is None:
        return []
    paths = tile_feed_forward(model, sizes.ffn_block)
    if not paths:
        raise WrapError(
            "blockwise: ffn_block needs feed-forward networks that are modules of their own in the model's blocks; "
            "there are none, so leave it out"
        )
    return [f"feed-forward in blocks of {sizes.ffn_block:,} positions: {_named(paths)}"]


def tile_heads(model: nn.Module, sizes: Blockwise | None, rows: Axis | None = None) -> list[str]:
    """Makes heads give scores whose loss is computed by blocks, after `tp` was dealt; returns what a report says.

    Args:
        model: changed in place.
        sizes: of blocks.
        rows: ranks on which what stands around blocks runs alike, and which share the rows of a loss.

    Raises:
        WrapError: where `loss_block` is asked for and no head is found.
    """
    if sizes is None or sizes.loss_block is None:
        return []
    paths = list(tile_loss(model, sizes.loss_block, in_advance=sizes.loss_in_advance, rows=rows))
    if not paths:
        raise WrapError(
            "blockwise: loss_block needs a head, one matrix from the stream to scores; none is found, so leave it out"
        )
    said = f"cross entropy in blocks of {sizes.loss_block:,} rows of scores: {_named(paths)}"
    said += "" if rows is None else f", each of {rows.size} ranks its share of the rows"
    return [said + (", gradients with it" if sizes.loss_in_advance else "")]


def _named(paths: Iterable[str]) -> str:
    patterns = Counter(starred(path) for path in paths)
    return ", ".join(pattern if number == 1 else f"{number} x {pattern}" for pattern, number in patterns.items())
