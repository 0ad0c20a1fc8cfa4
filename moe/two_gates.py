"""Bi-level routers in the place of a model's own: a gate for nodes and a gate for the experts inside of them.

A router of the standard interface has one row of weights for each expert, and gives (logits, weights, choices). What
takes its place gives the same, from n + m rows instead of n m:

  logits of expert (i, j)   log p_i + log q_j, whose softmax is p_i q_j: balance losses read them as any router's
  rows at first             those whose outer sum is nearest to the model's own (least squares):
                            inter_i = mean_j W_ij,   intra_j = mean_i W_ij - mean_ij W_ij

so a model that routed by sums already keeps its choices, and others begin near them.
"""

from typing import Any

from torch import Tensor, nn

from meshwright.moe.bilevel import BiLevel
from meshwright.moe.errors import SwapError
from meshwright.moe.recognise import FoundExperts, find_experts

__all__ = ["TwoGates", "replace_routers"]


class TwoGates(nn.Module):
    """A bi-level router for models.

    Args:
        weight: [experts, d] of the router that it replaces.
        router: how logits become choices; its nodes times local experts are the experts.

    Raises:
        SwapError: for other numbers of experts.
    """

    def __init__(self, weight: Tensor, router: BiLevel) -> None:
        super().__init__()
        n, m = router.num_nodes, router.num_local
        if len(weight) != n * m:
            raise SwapError(f"a router of {n} nodes of {m} experts in the place of one of {len(weight)} experts")
        rows = weight.detach().unflatten(0, (n, m))
        inter = rows.mean(1)
        self.inter = nn.Parameter(inter.clone())
        self.intra = nn.Parameter(rows.mean(0) - inter.mean(0))
        self.router = router

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [tokens, experts], weights [tokens, k] and choices int64 [tokens, k].

        Args:
            hidden_states: [..., d]
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).to(self.inter.dtype)
        inter, intra = tokens @ self.inter.mT, tokens @ self.intra.mT
        routing = self.router.route(inter, intra)
        logits = inter.log_softmax(-1)[:, :, None] + intra.log_softmax(-1)[:, None]
        return logits.flatten(1), routing.weights, routing.experts


def replace_routers(model: nn.Module, router: BiLevel) -> list[str]:
    """Puts a bi-level router before all experts of a model, beginning near the router it had.

    The routers' modules stay, with `levels` in the place of their weights: what records their logits finds them.

    Args:
        model: changed in place, before its experts are dealt.
        router: for all of them.

    Returns:
        The paths of the routers.

    Raises:
        SwapError: for a model whose routers are not recognised, or have biases, which two gates do not.
    """
    found = [_router_of(model, each) for each in find_experts(model)]
    gates = [TwoGates(module.weight, router) for _, module in found]
    for (_, module), levels in zip(found, gates, strict=True):
        for name in [name for name, _ in module.named_parameters()]:
            delattr(module, name)
        module.levels = levels
        module.forward = levels.forward
    return [path for path, _ in found]


def _router_of(model: nn.Module, experts: FoundExperts) -> tuple[str, Any]:
    """The module beside experts that has one row of weights for each."""
    parent = experts.path.rpartition(".")[0]
    for name, module in model.get_submodule(parent).named_children():
        weight = getattr(module, "weight", None)
        if name == experts.path.rpartition(".")[2] or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        if len(weight) == experts.num_experts and not any(True for _ in module.children()):
            path = f"{parent}.{name}".lstrip(".")
            _check(path, module)
            return path, module
    raise SwapError(
        f"no router is recognised beside experts {experts.path}: a module with a weight "
        f"[{experts.num_experts}, d] that gives logits, weights and choices"
    )


def _check(path: str, module: nn.Module) -> None:
    for name, extra in [*module.named_parameters(), *module.named_buffers()]:
        if name != "weight" and bool(extra.detach().any()):
            raise SwapError(f"router {path} has a {name} that is not zero, which no pair of gates stands for")
    if isinstance(module, nn.Linear):
        raise SwapError(f"router {path} gives logits only; what chooses by them is in its model's own forward")
