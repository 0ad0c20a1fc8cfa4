"""Bi-level routers in the place of a model's own: a gate for nodes and a gate for the experts inside of them.

A router has one row of weights for each expert, and perhaps a bias. What takes its place has n + m rows for n m:

  logits of expert (i, j)   log p_i + log q_j, whose softmax is p_i q_j: balance losses read them as any router's
  rows at first             those whose outer sum is nearest to the model's own (least squares):
                            inter_i = mean_j W_ij,   intra_j = mean_i W_ij - mean_ij W_ij

so a model that routed by sums already keeps its choices, and others begin near them. Routers of the standard interface
give (logits, weights, choices), and so do their gates. Where a module gives logits only, and its model chooses by them
in a way of its own, experts are handed what the gates choose instead.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.moe.assumed import with_values
from meshwright.moe.bilevel import BiLevel, BiLevelRouting
from meshwright.moe.errors import SwapError
from meshwright.moe.recognise import find_experts, find_router

__all__ = ["TwoGates", "replace_routers"]


class TwoGates(nn.Module):
    """A bi-level router for models.

    Args:
        weight: [experts, d] of the router that it replaces.
        router: how logits become choices; its nodes times local experts are the experts.
        bias: [experts] of the router that it replaces.

    Raises:
        SwapError: for other numbers of experts.
    """

    inter_bias: Tensor | None
    intra_bias: Tensor | None

    def __init__(self, weight: Tensor, router: BiLevel, *, bias: Tensor | None = None) -> None:
        super().__init__()
        n, m = router.num_nodes, router.num_local
        if len(weight) != n * m:
            raise SwapError(f"a router of {n} nodes of {m} experts in the place of one of {len(weight)} experts")
        self.inter, self.intra = _nearest_sum(weight, n, m)
        biases = (None, None) if bias is None else _nearest_sum(bias, n, m)
        self.register_parameter("inter_bias", biases[0])
        self.register_parameter("intra_bias", biases[1])
        self.router = router

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [tokens, experts], weights [tokens, k] and choices int64 [tokens, k].

        Args:
            hidden_states: [..., d]
        """
        levels = self._levels(hidden_states)
        routing = self._routed(*levels)
        return _outer_sum(*levels).flatten(0, -2), routing.weights, routing.experts

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[..., experts] for [..., d]."""
        return _outer_sum(*self._levels(hidden_states))

    def route(self, hidden_states: Tensor) -> BiLevelRouting:
        """What is chosen for [..., d], a row for each token."""
        return self._routed(*self._levels(hidden_states))

    def _routed(self, inter: Tensor, intra: Tensor) -> BiLevelRouting:
        with with_values():
            return self.router.route(inter.flatten(0, -2), intra.flatten(0, -2))

    def _levels(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.to(self.inter.dtype)
        inter = functional.linear(tokens, self.inter, self.inter_bias)
        return inter, functional.linear(tokens, self.intra, self.intra_bias)


def replace_routers(model: nn.Module, router: BiLevel) -> list[str]:
    """Puts a bi-level router before all experts of a model, beginning near the router it had.

    The routers' modules stay, with `levels` in the place of their weights: what records their logits finds them. What
    moved the model's own choices without learning (loss-free balance) stays as it is and moves nothing any more;
    capacity and the scale of weights are those of `router`.

    Args:
        model: changed in place, before its experts are dealt.
        router: for all of them.

    Returns:
        The paths of the routers.

    Raises:
        SwapError: for a model whose routers are not recognised, or have parameters besides a weight and a bias,
            or give anything else than a router does.
    """
    found = [(each, *find_router(model, each)) for each in find_experts(model)]
    for _, path, module in found:
        _check(path, module)
    gates = [TwoGates(module.weight, router, bias=getattr(module, "bias", None)) for _, _, module in found]
    for (experts, path, module), levels in zip(found, gates, strict=True):
        chooses = _chooses(path, module)
        for name in {"weight", "bias"} & set(module._parameters):
            delattr(module, name)
        module.levels = levels
        module.forward = levels.forward if chooses else levels.logits
        if not chooses:
            chosen = _Chosen(levels, inspect.signature(experts.module.forward))
            experts.module.register_forward_pre_hook(chosen, with_kwargs=True)
    return [path for _, path, _ in found]


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Hands to experts what two gates choose, in the form of what their model chose by the logits of these."""

    levels: TwoGates
    signature: inspect.Signature

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        del module
        given = self.signature.bind(*args, **kwargs)
        (_, tokens), (choices, index), (weights, before) = given.arguments.items()
        routing = self.levels.route(tokens)
        with with_values():
            chosen = routing.experts
            if index.dim() > before.dim():  # zeros and ones for each expert
                chosen = functional.one_hot(chosen, routing.num_experts) * routing.kept[..., None]
            given.arguments[choices] = chosen.to(index.dtype)
        given.arguments[weights] = routing.weights.to(before.dtype)
        return given.args, given.kwargs


def _outer_sum(inter: Tensor, intra: Tensor) -> Tensor:
    """Logits [..., experts] of both levels together."""
    return (inter.log_softmax(-1)[..., :, None] + intra.log_softmax(-1)[..., None, :]).flatten(-2)


def _nearest_sum(rows: Tensor, n: int, m: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Rows of n nodes and of m experts inside, whose outer sum is nearest to [n m, ...]."""
    each = rows.detach().unflatten(0, (n, m))
    inter = each.mean(1)
    return nn.Parameter(inter.clone()), nn.Parameter(each.mean(0) - inter.mean(0))


def _check(path: str, module: nn.Module) -> None:
    for name, extra in module.named_parameters():
        if name not in ("weight", "bias") and extra.requires_grad:
            raise SwapError(f"router {path} learns a {name} too, which no pair of gates stands for")


def _chooses(path: str, module: Any) -> bool:
    """Whether a router gives weights and choices besides logits; it is asked with one token."""
    number, width = module.weight.shape
    try:
        with torch.no_grad():
            made = module(module.weight.new_zeros(1, width))
    except Exception as error:
        raise SwapError(f"router {path}, asked with one token: {type(error).__name__}: {error}") from error
    if isinstance(made, Tensor) and made.shape[-1] == number:
        return False
    if isinstance(made, tuple) and [len(each.shape) for each in made] == [2, 2, 2]:
        logits, weights, choices = made
        if logits.shape[-1] == number and weights.shape == choices.shape and not choices.is_floating_point():
            return True
    raise SwapError(f"router {path} gives neither logits [tokens, {number}] nor (logits, weights, choices)")
