"""How many tokens an expert takes, and which ones it drops.

An expert has ceil(factor k T / E) slots (Switch, arXiv 2101.03961; GShard, arXiv 2006.16668). Its queue is ordered

  "position"   all first choices, then all second ones, ...; each by the position of its token
  "score"      by weight, largest first; equal ones as by position

and what finds no slot is dropped: weight exactly 0, no gradient. Weights that were renormalised stay as they were.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor

from meshwright.moe.assumed import has_values
from meshwright.moe.errors import RoutingError
from meshwright.moe.routing import Routing, count_choices
from meshwright.parallel.errors import nearest

__all__ = ["Capacity", "Order", "Peers", "queue_starts"]

Order = Literal["position", "score"]


@dataclass(frozen=True, eq=False)
class Peers:
    """Ranks whose tokens stand in the same queues, in the order of their ranks, as if one process had them all.

    Args:
        rank: this one.
        gather: int64 [n] of this rank -> [ranks, n] of all; called once for each capacity.
    """

    rank: int
    gather: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Slots of an expert, relative to what it gets when all get the same.

    Args:
        factor: 1.0 has one slot for each choice of a token, if they were spread evenly.
        order: of the queue, "position" or "score".
        minimum: of slots.

    Raises:
        RoutingError: for a factor or a minimum that leaves no slots, or an unknown order.

    >>> Capacity(factor=1.1).slots(num_choices=80, num_experts=8)
    11
    """

    factor: float
    order: Order = "position"
    minimum: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.factor < float("inf"):
            raise RoutingError(
                f"a capacity factor of {self.factor} leaves no slots; use one above 0, 1.25 is common, or no capacity "
                "to drop nothing"
            )
        if self.minimum < 1:
            raise RoutingError(f"a capacity of at least {self.minimum} slots: use minimum=1 or more")
        if self.order not in get_args(Order):
            raise RoutingError(f"no queue is ordered by {self.order!r}; {nearest(str(self.order), get_args(Order))}")

    def slots(self, *, num_choices: int, num_experts: int) -> int:
        """Slots of each expert; may be more than there are choices.

        The factor is taken as the decimal that it is written as: 1.1 times 10 is 11, not the next float's 12.
        """
        return max(ceil(Fraction(repr(float(self.factor))) * num_choices / num_experts), self.minimum)

    def limit(self, routing: Routing, peers: Peers | None = None) -> Routing:
        """Drops what finds no slot.

        Args:
            routing: whose `kept` choices queue; those of padding need no slots and make none.
            peers: that share slots; each rank has slots of its own where None.

        Raises:
            RoutingError: for a shared queue by score, which no rank can know from counts.

        >>> from meshwright.moe.top_k import TopK
        >>> routing = TopK(num_experts=2, k=1).route(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]))
        >>> Capacity(factor=1.0).limit(routing).kept.flatten().tolist()
        [True, True, True, False]
        """
        if peers is not None and self.order == "score":
            raise RoutingError("ranks cannot share queues ordered by score; use order='position'")
        starts, num_tokens = _starts(routing, peers)
        slots = self.slots(num_choices=num_tokens * routing.k, num_experts=routing.num_experts)
        kept = routing.kept & (self._places(routing, starts) < slots)
        return replace(routing, kept=kept, weights=torch.where(kept, routing.weights, 0.0))

    def _places(self, routing: Routing, starts: Tensor) -> Tensor:
        """int64 [tokens, k]: how many stand before each choice that is kept so far."""
        # choices as they queue: [k, tokens], so that first choices come first; what does not queue goes to a last place
        number, k = routing.num_experts, routing.k
        experts = torch.where(routing.kept, routing.experts, number).T
        if self.order == "score" and has_values(routing.weights):  # all are equal that are not known
            by_score = routing.weights.detach().T.flatten().argsort(descending=True, stable=True)
            return _ranked(experts.flatten(), number + 1, by_score).view(k, -1).T
        level = torch.arange(k, device=experts.device)[:, None] * (number + 1)
        in_level = _ranked((experts + level).flatten(), k * (number + 1)).view(k, -1)
        padded = torch.nn.functional.pad(starts, (0, 1))
        return (in_level + padded.gather(1, experts)).T


def queue_starts(counts: Tensor) -> Tensor:
    """Where the choices of each rank begin in queues that ranks share, as one process with all tokens would queue them.

    Args:
        counts: int64 [ranks, k, num_experts], `Routing.counts` of each rank, in the order of their tokens.

    Returns:
        int64 of the same shape: choices of lower levels, and of the same level on ranks before.

    >>> queue_starts(torch.tensor([[[2], [1]], [[3], [4]]])).tolist()
    [[[0], [5]], [[2], [6]]]
    """
    ranks, k, num_experts = counts.shape
    by_level = counts.transpose(0, 1).reshape(k * ranks, num_experts)
    return (by_level.cumsum(0) - by_level).view(k, ranks, num_experts).transpose(0, 1)


def _starts(routing: Routing, peers: Peers | None) -> tuple[Tensor, int]:
    """Where this rank's choices begin, int64 [k, num_experts], and the tokens of all ranks."""
    counts = count_choices(routing.experts, routing.kept, num_experts=routing.num_experts)
    if peers is None:
        return queue_starts(counts)[0], int(routing.num_real())
    found = peers.gather(torch.cat([counts.flatten(), routing.num_real()[None]]))
    return queue_starts(found[:, :-1].unflatten(1, counts.shape[1:]))[peers.rank], int(found[:, -1].sum())


def _ranked(keys: Tensor, num_keys: int, first: Tensor | None = None) -> Tensor:
    """How many equal keys stand before each one, in their order or in that of the permutation `first`."""
    order = (keys if first is None else keys[first]).argsort(stable=True)
    order = order if first is None else first[order]
    sizes = keys.new_zeros(num_keys).index_add_(0, keys, torch.ones_like(keys))
    starts = (sizes.cumsum(0) - sizes)[keys[order]]
    return torch.empty_like(keys).scatter_(0, order, torch.arange(len(keys), device=keys.device) - starts)
