"""Transports: how tokens get to the ranks of their experts and back. Any router goes with any of them.

  transport      sends                                                             results differ from one hop by
  one_hop        rows to the ranks of their experts, and back
  inter_first    rows between nodes among equal local ranks, then inside of nodes  nothing
  intra_first    the other way round                                               nothing
  once           tokens once to each node, then rows inside; sums go back          rounding
  all_gather     every token to every rank; partial sums are summed and scattered  rounding

With one node, or one rank on each, two hops are one. A rank's part in the gradients of its experts holds the tokens of
all ranks of `ep`, so nothing is left to be reduced over `ep` where losses of ranks add up to the global one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.dispatch import combine, depart, sort_choices
from meshwright.moe.errors import DispatchError
from meshwright.moe.flight import Flight
from meshwright.moe.folding import own_experts
from meshwright.moe.journey import Hops, Journey, plan_journey
from meshwright.moe.routing import Routing
from meshwright.moe.travel import Splits, exchange

__all__ = ["Experts", "Hopping", "Transport", "computed", "nothing", "widened"]

Experts = Callable[[Tensor, Tensor], Tensor]
"""Rows [rows, d] of this rank's experts, in their order, and int64 [own experts] rows of each -> [rows, d]."""


def nothing() -> None:
    """What is done meanwhile where there is nothing to do."""


class Transport(Protocol):
    """Brings tokens to experts and results back."""

    def carry(
        self, tokens: Tensor, routing: Routing, experts: Experts, *, meanwhile: Callable[[], object] = nothing
    ) -> Tensor:
        """The weighted sum of what its experts make of each token; all ranks of `ep` must call it.

        Args:
            tokens: [tokens, d] of this rank; there may be none.
            routing: of these tokens, among the experts of all ranks.
            experts: this rank's.
            meanwhile: called once, before experts are; where rows go to other ranks first, while they are on their
                way. Backward likewise goes back through what it computed while their gradients are on theirs.

        Returns:
            [tokens, d], with gradients of tokens, weights and experts.

        Raises:
            DispatchError: for tokens, experts and ranks that do not fit each other.
        """
        ...


@dataclass(frozen=True)
class Hopping:
    """Rows travel in one hop or two.

    Args:
        axes: the ranks.
        hops: "one", "inter_first" or "intra_first".
    """

    axes: ExpertAxes
    hops: Hops = "one"

    def carry(
        self, tokens: Tensor, routing: Routing, experts: Experts, *, meanwhile: Callable[[], object] = nothing
    ) -> Tensor:
        """See `Transport`."""
        ep = self.axes.ep
        own_experts(routing.num_experts, ranks=ep.size, rank=ep.rank)
        leaving = sort_choices(routing)
        counts = self._of_all(leaving.counts)
        journey = plan_journey(leaving, counts, rank=ep.rank, num_nodes=self.axes.num_nodes, hops=self.hops)
        there = self._there(depart(tokens, journey.departure), journey, meanwhile)
        rows = self._back(computed(experts, there, journey.counts), journey)
        return combine(rows, journey.departure, routing.weights)

    def _of_all(self, counts: Tensor) -> Tensor:
        """Counts of all ranks, which travel as rows do: where rows take two hops, nobody talks to more ranks."""
        if self.hops == "one":
            return self.axes.ep.gather_each(counts)
        return self.axes.node.gather_each(self.axes.local.gather_each(counts)).flatten(0, 1)

    def _there(self, rows: Tensor, journey: Journey, meanwhile: Callable[[], object]) -> Tensor:
        if not journey.hops:
            meanwhile()
        for number, hop in enumerate(journey.hops):
            flight = Flight(self.axes.named(hop.axis), Splits(hop.sent, hop.received))
            flight.leave(rows)
            if number == 0:
                meanwhile()
            (rows,) = flight.arrive()
            rows = hop.ordered(rows)
        return rows

    def _back(self, rows: Tensor, journey: Journey) -> Tensor:
        for hop in reversed(journey.hops):
            (rows,) = exchange(self.axes.named(hop.axis), Splits(hop.received, hop.sent), hop.restored(rows))
        return rows


def widened(routing: Routing, k: int) -> Routing:
    """The same with k places for each token, so that ranks agree on the width of what they exchange.

    Expert choice makes as many places as its most wanted token needs, which differs from rank to rank.

    >>> import torch
    >>> yes = torch.ones(1, 1, dtype=torch.bool)
    >>> routing = Routing(experts=torch.tensor([[1]]), weights=torch.ones(1, 1), asked=yes, kept=yes, num_experts=2)
    >>> widened(routing, 2).kept.tolist()
    [[True, False]]
    """
    if routing.k == k:
        return routing
    more = (0, k - routing.k)
    return Routing(
        experts=functional.pad(routing.experts, more),
        weights=functional.pad(routing.weights, more),
        asked=functional.pad(routing.asked, more),
        kept=functional.pad(routing.kept, more),
        num_experts=routing.num_experts,
        real=routing.real,
    )


def computed(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """What experts make of rows; attached to them even where there are none, so that all ranks go back alike.

    Raises:
        DispatchError: if there are more or fewer rows afterwards.
    """
    made = experts(rows, counts)
    if len(made) != len(rows):
        raise DispatchError(f"experts made {len(made)} rows of {len(rows)}; they give one for each, in the same order")
    return made if len(rows) else made + rows.sum()
