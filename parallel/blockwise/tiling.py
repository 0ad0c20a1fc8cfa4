"""Feed-forward networks and the loss of a wrapped model by blocks, as its options ask."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from meshwright.parallel.blockwise.feed_forward import tile_feed_forward
from meshwright.parallel.blockwise.loss import tile_loss
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import Axis
from meshwright.parallel.tensor_plan import starred

__all__ = ["coarser", "tile_heads", "tile_networks"]


def coarser(sizes: Blockwise | None, example: Any, *, most: int) -> Blockwise | None:
    """Sizes that leave few enough blocks to go through one by one, in Python.

    Args:
        sizes: as asked for.
        example: one micro-batch, [samples, positions, ...].
        most: blocks.

    >>> import torch
    >>> coarser(Blockwise(layer_block=8, loss_block=64), torch.zeros(4, 100), most=10)
    Blockwise(query_block=1024, kv_block=1024, ffn_block=None, layer_block=10, loss_block=64, loss_in_advance=False)
    """
    if sizes is None:
        return None
    leaves = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    tokens = max((leaf.numel() for leaf in leaves), default=0)
    positions = max((leaf.shape[1] for leaf in leaves if leaf.dim() > 1), default=0)
    at_once = {"ffn_block": tokens, "loss_block": tokens, "layer_block": positions}
    given = {name: size for name in at_once if (size := getattr(sizes, name)) is not None}
    return replace(sizes, **{name: max(size, -(-at_once[name] // most)) for name, size in given.items()})


def tile_networks(model: nn.Module, sizes: Blockwise | None) -> list[str]:
    """Makes feed-forward networks run by blocks, on the whole model; returns what a report says.

    Raises:
        WrapError: where `ffn_block` is asked for and none can.
    """
    if sizes is None or sizes.ffn_block is None:
        return []
    with unset_fake_temporarily():  # it tries a few numbers
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
    with unset_fake_temporarily():  # it tries a few numbers
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
