"""The balance loss of bi-level routing: one term for each level, and a joint one (SMILE, arXiv 2212.05191).

  alpha n sum_i f_i P_i  +  beta m sum_j g_j Q_j  +  gamma n m sum_ij F_ij (P Q)_ij

f, g and F are the fractions of choices, P, Q and (P Q) the mean scores of nodes, of experts inside of a node, and of
both together. Each sum is 1 / n, 1 / m and 1 / (n m) when all is even, so the loss is then alpha + beta + gamma.

The first two terms can be perfect while half of the experts get nothing: tokens half at (0, 0) and half at (1, 1) are
even over nodes and even over places, and the joint term says 2. The paper has no joint term; gamma is 0 by default.

With one intra gate for all nodes the second term is about all tokens. With one for each node it is about the tokens of
that node, and the nodes' terms are weighted by their shares of the tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.moe.balance import Tally, Total, balance_loss, summed, tally
from meshwright.moe.bilevel import BiLevelRouting
from meshwright.moe.errors import BalanceError
from meshwright.moe.routing import Routing

__all__ = ["LevelTallies", "bilevel_loss", "tally_levels"]


@dataclass(frozen=True, eq=False)
class LevelTallies:
    """What is counted at each level.

    Args:
        nodes: of the inter gate, over n nodes.
        local: of the intra gate, over m experts; with a leading dim of n where each node has its own.
        joint: over all n m experts.
    """

    nodes: Tally
    local: Tally
    joint: Tally

    def __add__(self, other: "LevelTallies") -> "LevelTallies":
        return LevelTallies(self.nodes + other.nodes, self.local + other.local, self.joint + other.joint)

    def summed(self, total: Total) -> "LevelTallies":
        """With counts of all ranks, by one call of `total`; see `balance.summed`."""
        return LevelTallies(*summed([self.nodes, self.local, self.joint], total))


def tally_levels(routing: BiLevelRouting) -> LevelTallies:
    """Counts what was asked, at each level.

    >>> from meshwright.moe.bilevel import BiLevel
    >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> found = tally_levels(BiLevel(num_nodes=2, num_local=2).route(logits, logits))
    >>> found.nodes.counts.tolist(), found.local.counts.tolist(), found.joint.counts.tolist()
    ([[1, 1]], [[1, 1]], [[1, 0, 0, 1]])
    """
    m, each = routing.num_local, routing.k_local
    asked = routing.asked.view(routing.num_tokens, routing.k // each, each)
    nodes = (routing.experts // m).view_as(asked)[..., 0]
    of_nodes = _level(nodes, asked[..., 0], routing.node_scores, real=routing.real)
    if routing.local_scores.dim() == 2:
        inside = routing.experts[:, :each] % m  # the same in all nodes of a token
        local = _level(inside, asked[:, 0], routing.local_scores, real=routing.real)
    else:
        local = _by_node(routing, nodes, asked)
    return LevelTallies(of_nodes, local, tally(routing))


def bilevel_loss(found: LevelTallies, *, nodes: float, local: float, joint: float = 0.0) -> Tensor:
    """The sum of the three terms on top.

    Args:
        found: of this rank alone, or with counts of all ranks (`summed`), which makes the loss this rank's part.
        nodes: alpha.
        local: beta.
        joint: gamma.

    Raises:
        BalanceError: for a negative coefficient, which would push tokens together.

    >>> even = Tally(torch.tensor([[2, 2]]), torch.tensor([2.0, 2.0]), torch.tensor(4))
    >>> bilevel_loss(LevelTallies(even, even, even), nodes=0.25, local=0.5).item()
    0.75
    """
    for name, coefficient in (("nodes", nodes), ("local", local), ("joint", joint)):
        if not 0 <= coefficient < float("inf"):
            raise BalanceError(f"{name}={coefficient}: a coefficient is 0 or above, such as 0.005")
    of_local = balance_loss(found.local)
    if of_local.dim():
        tokens = found.local.num_tokens.to(of_local.dtype)  # integers divide to float32 otherwise
        of_local = (tokens * of_local).sum() / tokens.sum().clamp_min(1)
    return nodes * balance_loss(found.nodes) + local * of_local + joint * balance_loss(found.joint)


def _level(choices: Tensor, asked: Tensor, scores: Tensor, *, real: Tensor | None) -> Tally:
    """One level as a routing of its own, counted as any."""
    return tally(
        Routing(
            experts=choices,
            weights=asked.to(scores.dtype),
            asked=asked,
            kept=asked,
            num_experts=scores.shape[-1],
            scores=scores,
            real=real,
        )
    )


def _by_node(routing: BiLevelRouting, nodes: Tensor, asked: Tensor) -> Tally:
    """Of the tokens of each node, their choices inside of it and their scores there."""
    n, m, each = routing.num_nodes, routing.num_local, routing.k_local
    inside = (routing.experts % m).view_as(asked)
    level = torch.arange(each, device=inside.device)
    place = (nodes[..., None] * each + level) * m + inside
    counts = place.new_zeros(n * each * m).index_add_(0, place.flatten(), asked.flatten().long())
    there = torch.zeros_like(routing.node_scores, dtype=torch.bool).scatter_(1, nodes, asked[..., 0])
    sums = torch.where(there[..., None], routing.local_scores, 0.0).sum(0)
    return Tally(counts.view(n, each, m), sums, there.sum(0))
