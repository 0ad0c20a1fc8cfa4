"""Each token takes its k best experts: the router of Switch, Mixtral, OLMoE, Qwen-MoE, DeepSeek and gpt-oss.

  score      ranked by              weight                    renormalised over the k chosen
  softmax    P = softmax(logits)    P of the chosen           softmax of the chosen logits
  sigmoid    s = sigmoid(logits)    s of the chosen           s / sum of the chosen s

A bias (loss-free balancing, arXiv 2408.15664) and groups change what is chosen, never a weight. Renormalised weights
are computed from logarithms, so that chosen scores that vanish in float32 do not make 0 / 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from meshwright.moe.capacity import Capacity, Peers
from meshwright.moe.errors import RoutingError
from meshwright.moe.groups import Groups
from meshwright.moe.routing import Routing, asked_of, first_largest, usable_logits
from meshwright.parallel.errors import nearest

__all__ = ["Score", "TopK", "check_k"]

Score = Literal["softmax", "sigmoid"]

_TO_LOG: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda logits: logits, "sigmoid": logsigmoid}


@dataclass(frozen=True, kw_only=True)
class TopK:
    """A router: how logits become a routing.

    Args:
        num_experts: of all ranks.
        k: experts of each token.
        score: "softmax" or "sigmoid".
        renormalise: divide the weights of a token by their sum. With k=1 that makes them 1, and the gate then learns
            from balance losses only.
        scale: of all weights (2.5 in DeepSeek-V3).
        groups: that a token's choice is limited to; all where None.
        capacity: of experts; nothing is dropped where None.

    Raises:
        RoutingError: for numbers that do not fit, or an unknown score.

    >>> router = TopK(num_experts=4, k=2)
    >>> routing = router.route(torch.tensor([[0.0, 2.0, 1.0, 0.0]]))
    >>> routing.experts.tolist(), [round(weight, 3) for weight in routing.weights[0].tolist()]
    ([[1, 2]], [0.61, 0.225])
    """

    num_experts: int
    k: int
    score: Score = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    groups: Groups | None = None
    capacity: Capacity | None = None

    def __post_init__(self) -> None:
        check_k(self.k, self.num_experts)
        if self.score not in _TO_LOG:
            raise RoutingError(f"no router scores by {self.score!r}; {nearest(str(self.score), get_args(Score))}")
        if not 0 < self.scale < float("inf"):
            raise RoutingError(f"weights scaled by {self.scale}: use a number above 0, such as 1.0")
        if self.groups is not None:
            self.groups.check(self.num_experts, self.k)

    def route(
        self, logits: Tensor, *, bias: Tensor | None = None, real: Tensor | None = None, peers: Peers | None = None
    ) -> Routing:
        """Decides.

        Args:
            logits: [tokens, num_experts] from the gate.
            bias: [num_experts], float32 or wider, added to scores where experts are ranked.
            real: bool [tokens], False for padding, which goes nowhere and counts nowhere.
            peers: ranks that share the slots of experts.

        Raises:
            RoutingError: for logits or a bias that do not fit, or that are not finite.
        """
        logits = usable_logits(logits, self.num_experts, real=real)
        logs = _TO_LOG[self.score](logits)
        shares = logs.softmax(-1)
        scores = shares if self.score == "softmax" else logits.sigmoid()
        experts = first_largest(self._ranking(scores, bias), self.k)
        chosen = logs.gather(1, experts).softmax(-1) if self.renormalise else scores.gather(1, experts)
        asked = asked_of(experts, real)
        routing = Routing(
            experts=experts,
            weights=torch.where(asked, chosen * self.scale, 0.0),
            asked=asked,
            kept=asked,
            num_experts=self.num_experts,
            scores=shares,
            real=real,
        )
        return routing if self.capacity is None else self.capacity.limit(routing, peers)

    def _ranking(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        ranking = scores.detach()
        if bias is not None:
            _check_bias(bias, self.num_experts)
            ranking = ranking + bias.detach()
        return ranking if self.groups is None else self.groups.masked(ranking, self.k)


def check_k(k: int, num_experts: int, *, of: str = "experts") -> None:
    """Whether each token can choose k of them.

    Raises:
        RoutingError: if not.
    """
    if num_experts < 1 or not 1 <= k <= num_experts:
        raise RoutingError(f"k={k} of {num_experts} {of} for each token; use 1 to {max(num_experts, 1)}")


def _check_bias(bias: Tensor, num_experts: int) -> None:
    if tuple(bias.shape) != (num_experts,):
        raise RoutingError(f"a bias {list(bias.shape)} does not fit {num_experts} experts; it is [{num_experts}]")
    if torch.promote_types(bias.dtype, torch.float32) != bias.dtype:
        raise RoutingError(
            f"a bias in {bias.dtype} loses updates of 0.001 to rounding; keep it in float32 (LoadBias does)"
        )
    if not bool(bias.isfinite().all()):
        raise RoutingError(f"the bias of expert {int((~bias.isfinite()).nonzero()[0])} is not finite")
