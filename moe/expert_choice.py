"""Each expert takes its best tokens (Zhou et al., arXiv 2202.09368): balanced without any loss.

An expert's choice looks at all tokens of a batch, later ones too, so a causal model trained so sees its future.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.moe.capacity import Capacity
from meshwright.moe.errors import RoutingError
from meshwright.moe.routing import Routing, first_largest, usable_logits

__all__ = ["ExpertChoice"]


@dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """A router whose experts choose.

    Args:
        num_experts: of all ranks.
        factor: experts of a token on average; an expert takes ceil(factor T / E) tokens.

    Raises:
        RoutingError: for a factor that takes no tokens, or no experts.

    >>> logits = torch.tensor([[3.0, 2.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    >>> routing = ExpertChoice(num_experts=2, factor=1.0).route(logits)
    >>> routing.loads().tolist(), routing.kept.sum(1).tolist()
    ([2, 2], [1, 1, 1, 1])
    """

    num_experts: int
    factor: float

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise RoutingError(f"{self.num_experts} experts cannot choose; use at least 1")
        Capacity(factor=self.factor)

    def route(self, logits: Tensor, *, real: Tensor | None = None) -> Routing:
        """Decides; k is the largest number of experts that took the same token.

        Args:
            logits: [tokens, num_experts]; weights are their softmax over experts.
            real: bool [tokens], False for padding, which no expert takes.

        Raises:
            RoutingError: for logits that do not fit or are not finite.
        """
        logits = usable_logits(logits, self.num_experts, real=real)
        scores = logits.softmax(-1)
        taken = self._taken(scores.detach(), real)
        k = max(1, int(taken.sum(1).max())) if len(taken) else 1
        experts = first_largest(torch.where(taken, scores.detach(), -1.0), k)
        asked = taken.gather(1, experts)
        return Routing(
            experts=experts,
            weights=torch.where(asked, scores.gather(1, experts), 0.0),
            asked=asked,
            kept=asked,
            num_experts=self.num_experts,
            scores=scores,
            real=real,
        )

    def _taken(self, scores: Tensor, real: Tensor | None) -> Tensor:
        """bool [tokens, num_experts]"""
        number = len(scores) if real is None else int(real.sum())
        slots = Capacity(factor=self.factor).slots(num_choices=number, num_experts=self.num_experts)
        ranking = scores.T if real is None else scores.T.masked_fill(~real, -torch.inf)
        best = first_largest(ranking, min(slots, number)) if number else scores.new_zeros(self.num_experts, 0).long()
        return torch.zeros_like(ranking, dtype=torch.bool).scatter_(1, best, True).T
