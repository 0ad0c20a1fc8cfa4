"""The experts of one rank: feed-forward networks in a row of matrices, for rows that lie by expert.

  plain     down(act(up(x)))
  gated     down(act(gate(x)) * up(x)), with the gate's columns first in one matrix (GLU variants, arXiv 2002.05202)

Gradients of a rank's experts hold the tokens that all ranks of `ep` sent. Where the losses of ranks add up to the
global one, they are the plain run's as they are: neither summed nor divided over `ep`, and summed over `edp` only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from meshwright.moe.errors import DispatchError
from meshwright.moe.grouped import grouped_product
from meshwright.moe.routing import Routing
from meshwright.moe.transport import Transport

__all__ = ["FeedForward", "gated", "mix"]

Pointwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class FeedForward:
    """Experts of one rank, callable as transports want them.

    Args:
        up: [experts, d, hidden]; of gated ones, gate and up side by side.
        down: [experts, inner, d]
        act: [rows, hidden] -> [rows, inner]; `gated(...)` halves the width.
        up_bias: [experts, hidden], or None.
        down_bias: [experts, d], or None.

    Raises:
        DispatchError: for matrices of different numbers of experts.

    >>> import torch
    >>> experts = FeedForward(up=torch.ones(2, 3, 4), down=torch.ones(2, 4, 3), act=torch.relu)
    >>> experts(torch.ones(1, 3), torch.tensor([0, 1])).tolist()
    [[12.0, 12.0, 12.0]]
    """

    up: Tensor
    down: Tensor
    act: Pointwise
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        given = {"up": self.up, "down": self.down, "up_bias": self.up_bias, "down_bias": self.down_bias}
        numbers = {name: len(each) for name, each in given.items() if each is not None}
        if len(set(numbers.values())) > 1:
            raise DispatchError(f"experts with {numbers}: all have one first dim, the experts of this rank")

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        """What the experts make of their rows.

        Args:
            rows: [rows, d], by expert.
            counts: int64 [experts], rows of each.

        Raises:
            DispatchError: for shapes that do not fit.
        """
        inner = self.act(_shifted(grouped_product(rows, self.up, counts), self.up_bias, counts))
        return _shifted(grouped_product(inner, self.down, counts), self.down_bias, counts)


def gated(act: Pointwise) -> Pointwise:
    """The activation of gated experts: act(first half) * second half of the width.

    >>> import torch
    >>> gated(torch.relu)(torch.tensor([[2.0, -1.0, 5.0, 7.0]])).tolist()
    [[10.0, 0.0]]
    """

    def halved(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return act(gate) * up

    return halved


def mix(
    tokens: Tensor,
    routing: Routing,
    *,
    transport: Transport,
    experts: Callable[[Tensor, Tensor], Tensor],
    shared: Pointwise | None = None,
    shared_weight: Tensor | None = None,
) -> Tensor:
    """A mixture of experts: routed ones, and shared ones that every token visits where it is.

    Shared ones compute while rows are on their way to routed ones, forward and backward.

    Args:
        tokens: [tokens, d]
        routing: of these tokens.
        transport: to the ranks of the experts.
        experts: of this rank.
        shared: [tokens, d] -> [tokens, d]; None where there are none.
        shared_weight: [tokens, 1], such as the sigmoid of a gate (Qwen2-MoE); 1 where None.
    """
    if shared is None:
        return transport.carry(tokens, routing, experts)
    beside: list[Tensor] = []
    routed = transport.carry(tokens, routing, experts, meanwhile=lambda: beside.append(shared(tokens)))
    return routed + (beside[0] if shared_weight is None else shared_weight * beside[0])


def _shifted(rows: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    if bias is None:
        return rows
    return rows + bias.repeat_interleave(counts, 0, output_size=len(rows)).to(rows.dtype)
