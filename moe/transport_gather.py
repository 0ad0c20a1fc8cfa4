"""Every token to every rank: each computes its own experts' part of all sums, which are then summed and scattered.

What is sent does not depend on the routing, so few ranks, or tokens that visit most ranks anyway, travel best like this
(the all-gather dispatcher of Megatron-Core). Shares are padded to the largest one while they travel.
"""

from dataclasses import dataclass

from torch import Tensor

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.dispatch import combine, depart, sort_choices
from meshwright.moe.folding import own_experts
from meshwright.moe.routing import Routing
from meshwright.moe.transport import Experts, Transport, Way, computed, widened
from meshwright.moe.travel import gather_rows, scatter_rows

__all__ = ["Gathering"]


@dataclass(frozen=True)
class Gathering(Transport):
    """All tokens travel to all ranks.

    Args:
        axes: the ranks.
    """

    axes: ExpertAxes

    def travel(self, tokens: Tensor, routing: Routing, experts: Experts) -> Way:
        """See `Transport`; nothing is on its way when it stops."""
        ep = self.axes.ep
        own = own_experts(routing.num_experts, ranks=ep.size, rank=ep.rank)
        shapes = ep.gather_each(routing.experts.new_tensor([routing.num_tokens, routing.k]))
        sizes, routing = shapes[:, 0].tolist(), widened(routing, int(shapes[:, 1].max()))
        rows, weights, chosen, kept = gather_rows(
            ep, sizes, tokens, routing.weights, routing.experts, routing.kept.byte()
        )
        yield
        kept = kept.bool()
        everyone = Routing(experts=chosen, weights=weights, asked=kept, kept=kept, num_experts=routing.num_experts)
        leaving = sort_choices(everyone, own=own)
        part = combine(computed(experts, depart(rows, leaving), leaving.counts), leaving, weights)
        (sums,) = scatter_rows(ep, sizes, part)
        return sums
