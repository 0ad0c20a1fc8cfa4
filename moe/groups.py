"""Experts in groups, of which each token may use a few: what keeps its traffic on few devices or nodes.

  form                         group score                             here
  DeepSeek-V2 (2405.04434)     its best score                          Groups(number=D, limit=M, top=1)
  DeepSeek-V3 (2412.19437)     sum of its best k / limit scores        Groups(number=nodes, limit=M)

Groups that are the nodes of `ep` make it node-limited. Groups are scored with the bias of loss-free balancing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.moe.errors import RoutingError
from meshwright.moe.routing import first_largest
from meshwright.parallel.mesh import Mesh

__all__ = ["Groups"]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Equal groups of consecutive experts.

    Args:
        number: of groups.
        limit: how many of them a token may use.
        top: how many of a group's best scores are added to its own; k // limit where None, but at least one.

    Raises:
        RoutingError: for numbers below one, or a limit above the number.

    >>> Groups(number=8, limit=4).scored_by(8)
    2
    """

    number: int
    limit: int
    top: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= self.number:
            raise RoutingError(
                f"{self.limit} of {self.number} groups for each token: use 1 to {max(self.number, 1)} of at least one"
            )
        if self.top is not None and self.top < 1:
            raise RoutingError(f"groups scored by their best {self.top} experts: use 1 (DeepSeek-V2) or more")

    @classmethod
    def by_node(cls, mesh: Mesh, *, limit: int) -> "Groups":
        """One group for each node of `ep`: node-limited routing.

        >>> Groups.by_node(Mesh(dp=8, ep=8, ep_node=4), limit=2)
        Groups(number=4, limit=2, top=None)
        """
        return cls(number=mesh.ep_node, limit=limit)

    def scored_by(self, k: int) -> int:
        """How many experts make the score of their group, for tokens with k choices."""
        return max(1, k // self.limit) if self.top is None else self.top

    def check(self, num_experts: int, k: int) -> None:
        """Whether these groups fit.

        Raises:
            RoutingError: for groups that do not divide the experts or that cannot hold k choices.
        """
        size, rest = divmod(num_experts, self.number)
        if rest:
            legal = ", ".join(str(number) for number in range(1, num_experts + 1) if num_experts % number == 0)
            raise RoutingError(f"{num_experts} experts do not make {self.number} equal groups; choose from: {legal}")
        if self.limit * size < k:
            raise RoutingError(
                f"{self.limit} of {self.number} groups hold {self.limit * size} experts, fewer than k={k}; use limit="
                f"{-(-k // size)} or k={self.limit * size}"
            )
        if self.scored_by(k) > size:
            raise RoutingError(f"groups of {size} experts cannot be scored by {self.scored_by(k)}; use top={size}")

    def masked(self, ranking: Tensor, k: int) -> Tensor:
        """What experts are ranked by, with -inf outside of each token's groups.

        Args:
            ranking: [tokens, num_experts], of any sign: zeros in place of -inf would win over negative ones.
            k: choices of a token.

        >>> Groups(number=2, limit=1).masked(torch.tensor([[-3.0, -9.0, -4.0, -5.0]]), 2).tolist()
        [[-inf, -inf, -4.0, -5.0]]
        """
        tokens, num_experts = ranking.shape
        grouped = ranking.detach().view(tokens, self.number, num_experts // self.number)
        of_groups = grouped.topk(self.scored_by(k), dim=-1).values.sum(-1)
        allowed = torch.zeros_like(of_groups, dtype=torch.bool).scatter_(1, first_largest(of_groups, self.limit), True)
        return grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).view(tokens, num_experts)
