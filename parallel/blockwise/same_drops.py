"""Attention dropout of the plain run, where blocks drop: what is dropped is a function of positions there.

A kernel that attends at once draws in an order of its own, so masks could not be compared. The plain run therefore
attends through the same plug, with all scores at once, if and only if its attention drops.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.plugs import plug_in, plugged
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.microbatch import call

__all__ = ["drop_as_blocks_do", "drops"]


def drop_as_blocks_do(model: nn.Module, batch: Any) -> None:
    """Has a plain model drop the attention weights that blocks would drop, if it drops any on `batch`."""
    if drops(model, batch):
        plug_in(model, _attend_at_once)


def drops(model: nn.Module, batch: Any) -> bool:
    """Whether an attention call of a forward pass drops weights; the model is not changed.

    >>> attention, x = nn.MultiheadAttention(4, 2, dropout=0.1), torch.ones(3, 1, 4)
    >>> drops(attention, (x, x, x)), drops(attention.eval(), (x, x, x))
    (True, False)
    """
    shares: list[float] = []

    def note(asked: AttentionCall) -> Tensor:
        shares.append(asked.dropout_p)
        return asked.query.new_zeros(*asked.query.shape[:-1], asked.value.shape[-1])

    copy = deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), plugged(copy, note):
        call(copy, batch)
    return any(shares)


def _attend_at_once(asked: AttentionCall) -> Tensor:
    return attend_to(asked, Blockwise(query_block=asked.query.shape[2], kv_block=asked.key.shape[2]))
