"""Sparse upcycling (arXiv 2212.05055): trained feed-forward networks become mixtures that begin as the same function.

A network of inner width f is cut into g shards of f / g (granularity, arXiv 2410.07524), and these are copied r times:
E = g r experts, copy by copy. The gate has one random row for each copy, repeated g times, so the shards of a copy tie
and a token takes whole copies, k / g of them. Its weights sum to one and are equal inside of a copy, so

  sum of w down_s(act(up_s x)) = 1 / g sum over the shards of one copy = FFN(x) / g

which `down` times g makes FFN(x), whatever the activation. Biases behind `down` are added with weights that sum to one,
and stay as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.moe.errors import SwapError
from meshwright.moe.stacked import Mixture, StackedExperts
from meshwright.moe.top_k import TopK

__all__ = ["Upcycling", "upcycle"]

_DENSE = ("up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """What a feed-forward network becomes.

    Args:
        num_experts: of each mixture.
        k: experts of each token.
        granularity: shards that a network is cut into; 1 copies whole networks.
        gate_std: of the gate's random rows.
        seed: of these; every network draws its own.

    Raises:
        SwapError: for numbers that do not fit.

    >>> Upcycling(num_experts=8, k=4, granularity=2).copies
    4
    """

    num_experts: int
    k: int
    granularity: int = 1
    gate_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        g = self.granularity
        if g < 1 or self.num_experts % g or self.k % g or not 1 <= self.k <= self.num_experts:
            shards = max(g, 1)
            k = shards * max(1, self.k // shards)
            raise SwapError(
                f"{self.num_experts} experts of granularity {g}, {self.k} for each token: tokens take whole copies of "
                f"a network, so both are multiples of the granularity; nearest: num_experts="
                f"{max(k, shards * round(self.num_experts / shards))}, k={k}"
            )

    @property
    def copies(self) -> int:
        """The r above."""
        return self.num_experts // self.granularity


def upcycle(model: nn.Module, how: Upcycling, *, modules: str = "*") -> list[str]:
    """Turns feed-forward networks of a model into mixtures of experts, which compute the same at first.

    Args:
        model: changed in place; its networks have `up_proj`, `down_proj`, `act_fn` and mostly `gate_proj`, as those of
            `transformers` do.
        how: numbers.
        modules: pattern of paths (`fnmatch`); a step such as every second layer is a pattern of each, called in turn.

    Returns:
        The paths of the networks.

    Raises:
        SwapError: where no network fits, or one cannot be cut into shards.
    """
    found = [(path, module) for path, module in _networks(model) if fnmatchcase(path, modules)]
    if not found:
        known = ", ".join(path for path, _ in list(_networks(model))[:6])
        raise SwapError(
            f"no feed-forward network of {type(model).__name__} fits {modules!r}; it has up_proj, down_proj and act_fn"
            + (f"; choose from: {known}" if known else "")
        )
    for number, (path, module) in enumerate(found):
        generator = torch.Generator().manual_seed(how.seed + number)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _mixture(path, module, how, generator=generator))
    return [path for path, _ in found]


def _networks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        matrices = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        if path and matrices >= set(_DENSE) and matrices <= {*_DENSE, "gate_proj"} and hasattr(module, "act_fn"):
            yield path, module


def _mixture(path: str, dense: Any, how: Upcycling, *, generator: torch.Generator) -> Mixture:
    inner, g = dense.down_proj.in_features, how.granularity
    if inner % g:
        raise SwapError(f"{path} of inner width {inner} cannot be cut into {g} equal shards")
    ups = [dense.gate_proj, dense.up_proj] if hasattr(dense, "gate_proj") else [dense.up_proj]
    with torch.no_grad():
        up = torch.cat([each.weight.view(g, inner // g, -1) for each in ups], 1)
        down = dense.down_proj.weight.unflatten(1, (g, -1)).transpose(0, 1) * g
        like = dense.down_proj.weight
        copies = torch.randn(how.copies, ups[0].in_features, generator=generator) * how.gate_std
        gate = copies.repeat_interleave(g, 0).to(like)
        experts = StackedExperts(
            up.repeat(how.copies, 1, 1),
            down.repeat(how.copies, 1, 1),
            dense.act_fn,
            has_gate=len(ups) == 2,
            biases=_biases(ups, dense.down_proj, how),
        )
    router = TopK(num_experts=how.num_experts, k=how.k, renormalise=True)
    return Mixture(gate, experts, router).train(dense.training)


def _biases(ups: list[nn.Linear], down: nn.Linear, how: Upcycling) -> tuple[Tensor, Tensor] | None:
    """Of all experts; zeros where only some matrices have them."""
    linears, g = [*ups, down], how.granularity
    if all(each.bias is None for each in linears):
        return None
    whole = [each.weight.new_zeros(each.out_features) if each.bias is None else each.bias for each in linears]
    up = torch.cat([each.view(g, -1) for each in whole[:-1]], 1)
    return up.repeat(how.copies, 1), whole[-1].expand(how.num_experts, -1).clone()
