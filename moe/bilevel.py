"""Bi-level routing (SMILE, arXiv 2212.05191): a gate chooses nodes, then a gate chooses experts inside of them.

  p = softmax(inter logits) over n nodes            q = softmax(intra logits) over the m experts of a node
  weight of expert (i, j) = p_i q_j                 id = i m + j, so the experts of a node are neighbours

The intra gate is one for all nodes (logits [tokens, m]) or one for each (logits [tokens, n, m], weight p_i q_{j|i}).
With one for all and one choice at each level this is a flat softmax router whose logits are the outer sum a_i + b_j:
same experts, same weights, same gradients. Gates have d (n + m) parameters then, instead of d n m.

Both gates are read where a token comes from, so their values do not depend on how tokens travel.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from meshwright.moe.capacity import Capacity, Peers
from meshwright.moe.errors import RoutingError
from meshwright.moe.routing import Routing, asked_of, first_largest, usable_logits
from meshwright.moe.top_k import check_k

__all__ = ["BiLevel", "BiLevelRouting"]


@dataclass(frozen=True, eq=False, kw_only=True)
class BiLevelRouting(Routing):
    """A routing that also knows its two levels; transports need not.

    Args:
        node_scores: [tokens, n], the p above.
        local_scores: [tokens, m] of one intra gate for all nodes, or [tokens, n, m] of one for each; the q above.
        k_local: choices of a token in each of its nodes, which stand together in `experts`.
    """

    node_scores: Tensor
    local_scores: Tensor
    k_local: int

    @property
    def num_nodes(self) -> int:
        """The n above."""
        return self.node_scores.shape[-1]

    @property
    def num_local(self) -> int:
        """The m above."""
        return self.local_scores.shape[-1]


@dataclass(frozen=True, kw_only=True)
class BiLevel:
    """A router with two gates.

    A token's choices are `k_local` experts in each of its `k_nodes` nodes, best node first.

    Args:
        num_nodes: the n above.
        num_local: experts in each node, the m above.
        k_nodes: nodes of each token.
        k_local: experts of each token in each of its nodes.
        renormalise: divide the weights of a token by their sum.
        scale: of all weights.
        node_capacity: tokens that a node takes, each once however many experts it visits there.
        capacity: of experts, for what nodes have taken; its factor too is relative to all choices, spread evenly.

    Raises:
        RoutingError: for numbers that do not fit.

    >>> router = BiLevel(num_nodes=2, num_local=2)
    >>> routing = router.route(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    >>> routing.experts.tolist(), round(routing.weights.item(), 3)  # 0.731 squared
    ([[2]], 0.534)
    """

    num_nodes: int
    num_local: int
    k_nodes: int = 1
    k_local: int = 1
    renormalise: bool = False
    scale: float = 1.0
    node_capacity: Capacity | None = None
    capacity: Capacity | None = None

    def __post_init__(self) -> None:
        check_k(self.k_nodes, self.num_nodes, of="nodes")
        check_k(self.k_local, self.num_local, of="experts of a node")
        if not 0 < self.scale < float("inf"):
            raise RoutingError(f"weights scaled by {self.scale}: use a number above 0, such as 1.0")

    def route(
        self, inter: Tensor, intra: Tensor, *, real: Tensor | None = None, peers: Peers | None = None
    ) -> BiLevelRouting:
        """Decides.

        Args:
            inter: logits [tokens, n].
            intra: logits [tokens, m] of one gate for all nodes, or [tokens, n, m] of one for each.
            real: bool [tokens], False for padding, which goes nowhere and counts nowhere.
            peers: ranks that share the slots of nodes and experts.

        Raises:
            RoutingError: for logits that do not fit or are not finite.
        """
        p, q = self._log_scores(inter, intra, real=real)
        nodes = first_largest(p, self.k_nodes)
        tokens, n, m = len(p), self.num_nodes, self.num_local
        each = q if q.dim() == 3 else q[:, None].expand(tokens, n, m)
        of_nodes = each.gather(1, nodes[..., None].expand(tokens, self.k_nodes, m))
        inside = first_largest(of_nodes, self.k_local, within=nodes)
        logs = (p.gather(1, nodes)[..., None] + of_nodes.gather(2, inside)).flatten(1)
        asked = asked_of(nodes.repeat_interleave(self.k_local, dim=1), real)
        routing = BiLevelRouting(
            experts=(nodes[..., None] * m + inside).flatten(1),
            weights=torch.where(asked, self._weights(logs), 0.0),
            asked=asked,
            kept=asked,
            num_experts=n * m,
            scores=(p[..., None] + each).flatten(1).exp(),
            real=real,
            node_scores=p.exp(),
            local_scores=q.exp(),
            k_local=self.k_local,
        )
        return self._limited(routing, nodes, peers)

    def _weights(self, logs: Tensor) -> Tensor:
        return self.scale * (logs.softmax(-1) if self.renormalise else logs.exp())

    def _log_scores(self, inter: Tensor, intra: Tensor, *, real: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, n, m = len(inter), self.num_nodes, self.num_local
        if inter.dim() != 2 or tuple(intra.shape) not in {(tokens, m), (tokens, n, m)}:
            raise RoutingError(
                f"logits {list(inter.shape)} and {list(intra.shape)} of a router for {n} nodes of {m} experts; inter "
                f"is [tokens, {n}], intra is [tokens, {m}] of one gate for all nodes, or [tokens, {n}, {m}] of one for "
                "each"
            )
        p = usable_logits(inter, n, real=real, name="inter logits").log_softmax(-1)
        return p, usable_logits(intra, m, real=real, name="intra logits").log_softmax(-1)

    def _limited(self, routing: BiLevelRouting, nodes: Tensor, peers: Peers | None) -> BiLevelRouting:
        if self.node_capacity is not None:
            kept = self._kept_by_nodes(routing, nodes, peers)
            routing = replace(routing, kept=kept, weights=torch.where(kept, routing.weights, 0.0))
        if self.capacity is None:
            return routing
        limited = self.capacity.limit(routing, peers)
        return replace(routing, **{field.name: getattr(limited, field.name) for field in fields(Routing)})

    def _kept_by_nodes(self, routing: BiLevelRouting, nodes: Tensor, peers: Peers | None) -> Tensor:
        """bool [tokens, k]; a node's queue has each token once, by the sum of its weights there."""
        weights = routing.weights.detach().view(*nodes.shape, self.k_local).sum(-1)
        asked = routing.asked[:, :: self.k_local]
        of_nodes = Routing(
            experts=nodes, weights=weights, asked=asked, kept=asked, num_experts=self.num_nodes, real=routing.real
        )
        assert self.node_capacity is not None
        return self.node_capacity.limit(of_nodes, peers).kept.repeat_interleave(self.k_local, dim=1)
