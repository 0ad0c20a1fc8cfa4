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

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.moe.axes import ExpertAxes, RowAxis
from meshwright.moe.dispatch import combine, depart, sort_choices
from meshwright.moe.errors import DispatchError
from meshwright.moe.flight import Flight
from meshwright.moe.folding import own_experts
from meshwright.moe.journey import Hops, plan_journey
from meshwright.moe.routing import Routing
from meshwright.moe.travel import Splits

__all__ = ["Experts", "Hopping", "Transport", "Way", "computed", "flown", "nothing", "widened"]

Experts = Callable[[Tensor, Tensor], Tensor]
"""Rows [rows, d] of this rank's experts, in their order, and int64 [own experts] rows of each -> [rows, d]."""


Way: TypeAlias = Generator[None, None, Tensor]
"""Rows on their way: stops while they are, and ends with what came back."""


def nothing() -> None:
    """What is done meanwhile where there is nothing to do."""


class Transport(ABC):
    """Brings tokens to experts and results back; all ranks of `ep` must call the same of its methods."""

    @abstractmethod
    def travel(self, tokens: Tensor, routing: Routing, experts: Experts) -> Way:
        """What `carry` does, which stops at least once before experts compute, and equally often on all ranks."""

    def carry(
        self, tokens: Tensor, routing: Routing, experts: Experts, *, meanwhile: Callable[[], object] = nothing
    ) -> Tensor:
        """The weighted sum of what its experts make of each token.

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
        way = self.travel(tokens, routing, experts)
        next(way)
        meanwhile()
        return _in_turn([way])[0]

    def carry_halves(self, tokens: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """The same in two halves of the tokens: while experts compute one, the other is on its way, there or back.

        So it is in backward. Experts add up their gradients in another order; a token's result is the same.
        """
        half = (len(tokens) + 1) // 2
        halves = (slice(0, half), slice(half, len(tokens)))
        return torch.cat(_in_turn([self.travel(tokens[each], routing.rows(each), experts) for each in halves]))


def _in_turn(ways: list[Way]) -> list[Tensor]:
    """Goes on with one after the other, as long as they stop."""
    ended: dict[int, Tensor] = {}
    while len(ended) < len(ways):
        for number, way in enumerate(ways):
            try:
                next(way)
            except StopIteration as end:
                ended[number] = end.value
    return [ended[number] for number in range(len(ways))]


@dataclass(frozen=True)
class Hopping(Transport):
    """Rows travel in one hop or two.

    Args:
        axes: the ranks.
        hops: "one", "inter_first" or "intra_first".
    """

    axes: ExpertAxes
    hops: Hops = "one"

    def travel(self, tokens: Tensor, routing: Routing, experts: Experts) -> Way:
        """See `Transport`."""
        ep = self.axes.ep
        own_experts(routing.num_experts, ranks=ep.size, rank=ep.rank)
        leaving = sort_choices(routing)
        counts = self._of_all(leaving.counts)
        journey = plan_journey(leaving, counts, rank=ep.rank, num_nodes=self.axes.num_nodes, hops=self.hops)
        rows = depart(tokens, journey.departure)
        if not journey.hops:
            yield
        for hop in journey.hops:
            rows = hop.ordered((yield from flown(self.axes.named(hop.axis), Splits(hop.sent, hop.received), rows))[0])
        rows = computed(experts, rows, journey.counts)
        for hop in reversed(journey.hops):
            back = Splits(hop.received, hop.sent)
            (rows,) = yield from flown(self.axes.named(hop.axis), back, hop.restored(rows))
        return combine(rows, journey.departure, routing.weights)

    def _of_all(self, counts: Tensor) -> Tensor:
        """Counts of all ranks, which travel as rows do: where rows take two hops, nobody talks to more ranks."""
        if self.hops == "one":
            return self.axes.ep.gather_each(counts)
        return self.axes.node.gather_each(self.axes.local.gather_each(counts)).flatten(0, 1)


def flown(axis: RowAxis, splits: Splits, *tensors: Tensor) -> Generator[None, None, tuple[Tensor, ...]]:
    """An exchange that stops while rows are on their way."""
    flight = Flight(axis, splits)
    flight.leave(*tensors)
    yield
    return flight.arrive()


def widened(routing: Routing, k: int) -> Routing:
    """The same with k places for each token, so that ranks agree on the width of what they exchange.

    Expert choice makes as many places as its most wanted token needs, which differs from rank to rank.

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
