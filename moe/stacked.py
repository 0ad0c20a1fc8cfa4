"""Experts and a mixture as modules, shaped like the standard experts interface of `transformers`.

What finds and deals experts of other models (`deal_experts`) finds and deals these too.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from meshwright.moe.dispatch import combine, depart, sort_choices
from meshwright.moe.errors import DispatchError
from meshwright.moe.experts import FeedForward, gated
from meshwright.moe.routing import Routing
from meshwright.moe.top_k import TopK

__all__ = ["Mixture", "StackedExperts"]


class StackedExperts(nn.Module):
    """Feed-forward experts whose matrices are stacked, [experts, out, in] as in `nn.Linear`.

    Args:
        up: [experts, hidden, d]; of gated ones, gate and up one above the other.
        down: [experts, d, inner]
        act: of the gate, or of everything.
        has_gate: whether the upper half of `up` is a gate.
        biases: of up [experts, hidden] and down [experts, d], or None.

    Raises:
        DispatchError: for matrices of different numbers of experts.

    >>> experts = StackedExperts(torch.ones(2, 4, 3), torch.ones(2, 3, 2), torch.relu)
    >>> experts(torch.ones(1, 3), torch.tensor([[1]]), torch.ones(1, 1)).tolist()
    [[18.0, 18.0, 18.0]]
    """

    is_transposed = False

    def __init__(
        self,
        up: Tensor,
        down: Tensor,
        act: Callable[[Tensor], Tensor],
        *,
        has_gate: bool = True,
        biases: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if len(up) != len(down):
            raise DispatchError(f"experts with {len(up)} matrices up and {len(down)} down: one of each for an expert")
        self.num_experts = len(up)
        self.has_gate = has_gate
        self.has_bias = biases is not None
        self.act_fn = act
        self._up = "gate_up_proj" if has_gate else "up_proj"
        self.register_parameter(self._up, nn.Parameter(up))
        self.down_proj = nn.Parameter(down)
        if biases is not None:
            self.register_parameter(f"{self._up}_bias", nn.Parameter(biases[0]))
            self.down_proj_bias = nn.Parameter(biases[1])

    def forward(self, tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what its experts make of each token.

        Args:
            tokens: [tokens, d]
            ids: int64 [tokens, k]
            weights: [tokens, k]
        """
        yes = torch.ones_like(ids, dtype=torch.bool)
        routing = Routing(experts=ids, weights=weights, asked=yes, kept=yes, num_experts=self.num_experts)
        leaving = sort_choices(routing)
        experts = FeedForward(
            up=self.get_parameter(self._up).mT,
            down=self.down_proj.mT,
            act=self._apply_gate if self.has_gate else self.act_fn,
            up_bias=self.get_parameter(f"{self._up}_bias") if self.has_bias else None,
            down_bias=self.down_proj_bias if self.has_bias else None,
        )
        return combine(experts(depart(tokens, leaving), leaving.counts), leaving, weights)

    def _apply_gate(self, both: Tensor) -> Tensor:
        return gated(self.act_fn)(both)


class Mixture(nn.Module):
    """A gate and experts in the place of one feed-forward network.

    Args:
        gate: [num_experts, d]
        experts: called with tokens, ids and weights.
        router: how the gate's logits become choices.
    """

    def __init__(self, gate: Tensor, experts: StackedExperts, router: TopK) -> None:
        super().__init__()
        self.gate = nn.Linear(gate.shape[1], gate.shape[0], bias=False, device=gate.device, dtype=gate.dtype)
        self.gate.weight = nn.Parameter(gate)
        self.experts = experts
        self.router = router

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., d] -> [..., d]; hooks on `gate` see the logits that balance losses are made of."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        routing = self.router.route(self.gate(tokens))
        made: Tensor = self.experts(tokens, routing.experts, routing.weights)
        return made.view_as(inputs)
