"""Deals the experts of an existing model over the ranks of `ep`, without rewriting it.

Each rank keeps the parameters of its own experts, under their own names; tokens travel by a transport. The model's
router stays its own: what it hands to its experts is read as a `Routing`. Whatever stands around (shared experts,
norms, residuals) does not notice.

A rank's gradients of its experts hold the tokens of all ranks of `ep`; see `experts` for how they are to be reduced.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.errors import SwapError
from meshwright.moe.experts import FeedForward
from meshwright.moe.folding import own_experts
from meshwright.moe.recognise import FoundExperts, find_experts
from meshwright.moe.routing import Routing
from meshwright.moe.transport import Experts, Transport
from meshwright.moe.transports import TransportKind, transport

__all__ = ["DealtExperts", "deal_experts", "read_routing"]


@dataclass(frozen=True)
class DealtExperts:
    """What was done to a model; prints as a table.

    Args:
        experts: path of each module -> the experts that this rank kept, numbered in the whole model.
        parameters: name of each parameter that holds a part -> that part of its first dim, or None for a parameter of
            one expert, which other ranks of `ep` do not have at all.
        kind: of the transport.
        notes: what differs from the plain run.
    """

    experts: Mapping[str, range]
    parameters: Mapping[str, range | None]
    kind: TransportKind
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kept = [f"{path}: experts {own.start} to {own.stop - 1}, {self.kind}" for path, own in self.experts.items()]
        return "\n".join([*kept, *self.notes])


def deal_experts(model: nn.Module, axes: ExpertAxes, *, kind: TransportKind = "one_hop") -> DealtExperts:
    """Leaves this rank its own experts of a model, and lets tokens travel to the others.

    All ranks of `ep` must do it, and then run the model in step, each on its own batch.

    Args:
        model: changed in place; it has the same parameters on all ranks, and may be on the meta device.
        axes: the ranks, see `expert_axes`.
        kind: of the transport.

    Raises:
        SwapError: for a model without experts that are recognised, whose experts are tied, or that computes a balance
            loss of its own from the tokens of one rank.
        DispatchError: for numbers of experts that the ranks cannot share.
    """
    found = find_experts(model)
    _check(model, found)
    own = {each.path: own_experts(each.num_experts, ranks=axes.ep.size, rank=axes.ep.rank) for each in found}
    way = transport(kind, axes)
    parameters: dict[str, range | None] = {}
    for each in found:
        names = _keep(each, own[each.path])
        parameters.update((f"{each.path}.{name}".lstrip("."), part) for name, part in names.items())
        experts: Experts = _Stacked(each.module) if each.kind == "stacked" else _Listed(each.module)
        each.module.forward = _Travelling(each, way, experts)
    return DealtExperts(own, parameters, kind, tuple(_notes(found)))


def read_routing(index: Tensor, weights: Tensor, *, num_experts: int) -> Routing:
    """The routing that a model's router hands to its experts.

    Args:
        index: int64 [tokens, k] ids, where ids of `num_experts` or more go nowhere; or [tokens, k, num_experts] of
            zeros and ones, where a choice without a one goes nowhere.
        weights: [tokens, k], with gradients.
        num_experts: of all ranks.

    Raises:
        SwapError: for other shapes.

    >>> read_routing(torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.5]]), num_experts=2).kept.tolist()
    [[True, False]]
    >>> read_routing(torch.tensor([[[0, 1]], [[0, 0]]]), torch.ones(2, 1), num_experts=2).kept.tolist()
    [[True], [False]]
    """
    if index.dim() == weights.dim() + 1 and index.shape[-1] == num_experts:
        sent, index = (index != 0).any(-1), index.argmax(-1)
    else:
        sent = (index >= 0) & (index < num_experts)
    if index.dim() != 2 or index.shape != weights.shape:
        raise SwapError(
            f"choices {list(index.shape)} and weights {list(weights.shape)} of a router; they are [tokens, k], or "
            f"choices are [tokens, k, {num_experts}] of zeros and ones"
        )
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return Routing(
        experts=torch.where(sent, index, 0).long(),
        weights=torch.where(sent, wide, 0.0),
        asked=sent,
        kept=sent,
        num_experts=num_experts,
    )


class _Travelling:
    """The forward of experts that are dealt."""

    def __init__(self, found: FoundExperts, way: Transport, experts: Experts) -> None:
        self._num_experts = found.num_experts
        self._signature = inspect.signature(found.module.forward)
        self._way = way
        self._experts = experts

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What all experts make of this rank's tokens."""
        tokens, index, weights = self._signature.bind(*args, **kwargs).arguments.values()
        routing = read_routing(index, weights, num_experts=self._num_experts)
        flat = tokens.reshape(-1, tokens.shape[-1])
        return self._way.carry(flat, routing, self._experts).view_as(tokens)


@dataclass(frozen=True, eq=False)
class _Stacked:
    """Experts whose parameters are stacked."""

    module: Any

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        module = self.module
        up = "gate_up_proj" if module.has_gate else "up_proj"
        matrices = (getattr(module, up), module.down_proj)
        whole = FeedForward(
            up=matrices[0] if module.is_transposed else matrices[0].mT,
            down=matrices[1] if module.is_transposed else matrices[1].mT,
            act=module._apply_gate if module.has_gate else module.act_fn,
            up_bias=getattr(module, f"{up}_bias") if module.has_bias else None,
            down_bias=module.down_proj_bias if module.has_bias else None,
        )
        return whole(rows.to(matrices[0].dtype), counts).to(rows.dtype)


@dataclass(frozen=True, eq=False)
class _Listed:
    """Experts that are modules."""

    module: Any

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        own = zip(self.module.children(), rows.split(counts.tolist()), strict=True)
        return torch.cat([expert(part) for expert, part in own])


def _keep(found: FoundExperts, own: range) -> dict[str, range | None]:
    """Drops what other ranks keep; the names of what is left."""
    module = found.module
    if found.kind == "listed":
        for number, name in enumerate([name for name, _ in module.named_children()]):
            if number not in own:
                delattr(module, name)  # lists would number the others anew
        return dict.fromkeys(name for name, _ in module.named_parameters())
    for name, parameter in list(module.named_parameters(recurse=False)):
        part = parameter.detach()[own.start : own.stop].clone()
        setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    return {name: own for name, _ in module.named_parameters(recurse=False)}


def _check(model: nn.Module, found: list[FoundExperts]) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        raise SwapError(
            f"{type(model).__name__} adds a balance loss to its own, of the tokens that one rank sees; set "
            "config.output_router_logits=False, and balance by meshwright.moe.balance, whose counts ranks can share"
        )
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = names.setdefault(id(parameter), name)
        for each in found:
            if other != name and (name.startswith(f"{each.path}.") or other.startswith(f"{each.path}.")):
                raise SwapError(f"parameters {other} and {name} are tied; experts that are dealt must not be")


def _notes(found: list[FoundExperts]) -> list[str]:
    """Where ranks draw numbers that one process would draw otherwise."""
    return [
        f"{each.path}.{name}: dropout masks of experts are drawn on the rank of each expert, not as in one process"
        for each in found
        for name, module in each.module.named_modules()
        if isinstance(module, nn.Dropout) and module.p > 0
    ]
