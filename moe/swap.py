"""Deals the experts of an existing model over the ranks of `ep`, without rewriting it.

Each rank keeps the parameters of its own experts, under their own names; tokens travel by a transport. The model's
router stays its own: what it hands to its experts is read as a `Routing`. Whatever stands around (shared experts,
norms, residuals) does not notice. Ranks of `tp`, which hold the same tokens, each send a share of them.

A rank's gradients of its experts hold the tokens of all ranks of `ep`; see `experts` for how they are to be reduced.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.moe.assumed import even_choices, has_values, with_values
from meshwright.moe.axes import ExpertAxes
from meshwright.moe.errors import DispatchError, RoutingError, SwapError
from meshwright.moe.experts import FeedForward
from meshwright.moe.folding import own_experts
from meshwright.moe.listed import draws
from meshwright.moe.recognise import FoundExperts, find_experts
from meshwright.moe.routing import Routing
from meshwright.moe.slices import Slicing, sliced_columns
from meshwright.moe.transport import Experts
from meshwright.moe.transports import TransportKind, transport
from meshwright.parallel.deferred import like
from meshwright.parallel.exchange import Axis, cut, join
from meshwright.parallel.experts import ExpertPlan
from meshwright.parallel.layout import Split
from meshwright.parallel.randomness import keyed
from meshwright.parallel.tiles import Tiles

__all__ = ["deal_experts", "plan_experts", "read_routing"]


def plan_experts(model: nn.Module, *, ranks: int, kind: TransportKind = "one_hop", slices: int = 1) -> ExpertPlan:
    """Which rank of `ep` will keep which experts of a model; changes nothing.

    Args:
        model: with the same parameters on all ranks; may be on the meta device.
        ranks: the degree `ep`.
        kind: of the transport, for people.
        slices: ranks that share the hidden features of each expert; a part of `ranks`.

    Raises:
        SwapError: for a model without experts that are recognised, whose experts are tied, or cannot be sliced.
        DispatchError: for numbers of experts that the ranks cannot share.
    """
    found = find_experts(model)
    _check(model, found)
    if slices < 1 or ranks % slices:
        raise DispatchError(f"{slices} slices of each expert do not divide ep={ranks} ranks")
    splits: dict[str, Split] = {}
    tiles: dict[str, Tiles] = {}
    homes: dict[str, tuple[int, ...]] = {}
    for each in found:
        shares = [own_experts(each.num_experts, ranks=ranks // slices, rank=rank // slices) for rank in range(ranks)]
        rows = Split.of(0, each.num_experts, [[(own.start, own.stop)] for own in shares])
        names = {name: f"{each.path}.{name}".lstrip(".") for name, _ in each.module.named_parameters()}
        columns = sliced_columns(each, ranks=ranks, slices=slices) if slices > 1 else {}
        if each.kind == "stacked":
            tiles |= {names[name]: Tiles(rows, split) for name, split in columns.items()}
            splits |= dict.fromkeys(names.values(), rows)
            continue
        for name, path in names.items():
            number = _names(each).index(name.partition(".")[0])
            homes[path], cut = _homes(number, shares, columns.get(name))
            splits |= {path: cut} if cut is not None else {}
    paths, summary = tuple(each.path for each in found), _summary(found, f"{ranks} ranks, {kind}", slices)
    return ExpertPlan(ranks, splits, tiles, homes, paths, summary=summary, notes=tuple(_notes(found)))


def deal_experts(
    model: nn.Module,
    axes: ExpertAxes,
    *,
    kind: TransportKind = "one_hop",
    alike: Axis | None = None,
    slices: int = 1,
    overlap: bool = False,
) -> ExpertPlan:
    """Leaves this rank its own experts of a model, and lets tokens travel to the others.

    All ranks of `ep` must do it, and then run the model in step, each on its own batch.

    Args:
        model: changed in place.
        axes: the ranks, see `expert_axes`.
        kind: of the transport.
        alike: ranks that hold the same tokens (`tp`), each of which sends its share of them.
        slices: ranks that share the hidden features of each expert.
        overlap: let tokens travel in two halves, see `Transport.carry_halves`.

    Raises:
        SwapError: see `plan_experts`.
        DispatchError: the same.
    """
    plan = plan_experts(model, ranks=axes.ep.size, kind=kind, slices=slices)
    way = transport(kind, axes)
    carry = way.carry_halves if overlap else way.carry
    for each in find_experts(model):
        own = own_experts(each.num_experts, ranks=axes.ep.size // slices, rank=axes.ep.rank // slices)
        _keep(each, plan, rank=axes.ep.rank)
        part = None if slices == 1 else axes.ep.rank % slices
        experts: Experts = _Stacked(each.module) if each.kind == "stacked" else _Listed(each.module, own, part)
        each.module.forward = _Travelling(each, carry, experts, alike=alike, slicing=Slicing(slices, len(own)))
    return plan


@with_values()
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
    index, sent = _chosen(index, weights, num_experts=num_experts)
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


def _chosen(index: Tensor, weights: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """Experts, and which of them a choice goes to."""
    if weights.dim() == 2 and not has_values(index):
        tokens, k = weights.shape
        index = even_choices(tokens, k, num_experts, device=weights.device)
        return index, torch.ones_like(index, dtype=torch.bool)
    if index.dim() == weights.dim() + 1 and index.shape[-1] == num_experts:
        return index.argmax(-1), (index != 0).any(-1)
    return index, (index >= 0) & (index < num_experts)


class _Travelling:
    """The forward of experts that are dealt."""

    def __init__(
        self,
        found: FoundExperts,
        carry: Callable[..., Tensor],
        experts: Experts,
        *,
        alike: Axis | None,
        slicing: Slicing,
    ) -> None:
        self._num_experts = found.num_experts
        self._path = found.path
        self._alike = alike
        self._slicing = slicing
        self._signature = inspect.signature(found.module.forward)
        self._carry = carry
        self._experts = experts

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What all experts make of this rank's tokens."""
        tokens, index, weights = self._signature.bind(*args, **kwargs).arguments.values()
        flat = tokens.reshape(-1, tokens.shape[-1])
        with with_values():
            if self._alike is None:
                return self._carried(flat, index, weights).view_as(tokens)
            own = [cut(each, self._alike, 0) for each in (flat, index, weights)]
            return join(self._carried(*own), self._alike, 0, len(flat)).view_as(tokens)

    def _carried(self, flat: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        routing = read_routing(index, weights, num_experts=self._num_experts)
        if bool(routing.weights.isnan().any()):
            wrong = int(routing.weights.isnan().any(1).sum())
            raise RoutingError(
                f"experts {self._path}: the router gave NaN weights for {wrong} of {len(flat)} tokens; look for "
                "infinite activations or too large a learning rate before it"
            )
        return self._carry(flat, self._slicing.of(routing), self._experts)


@dataclass(frozen=True, eq=False)
class _Stacked:
    """Experts whose parameters are stacked."""

    module: Any

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        module = self.module
        up = "gate_up_proj" if module.has_gate else "up_proj"
        matrices = (getattr(module, up), module.down_proj)
        up_bias, bias = (getattr(module, f"{up}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
        whole = FeedForward(
            up=matrices[0] if module.is_transposed else matrices[0].mT,
            down=matrices[1] if module.is_transposed else matrices[1].mT,
            act=module._apply_gate if module.has_gate else module.act_fn,
            up_bias=up_bias,
            down_bias=bias if bias is not None and bias.numel() else None,
        )
        made = whole(rows.to(matrices[0].dtype), counts).to(rows.dtype)
        # a slice without the bias still gives it a gradient, so that all ranks sum and gather the same
        return made if bias is None or bias.numel() else made + bias.sum().to(made.dtype)


@dataclass(frozen=True, eq=False)
class _Listed:
    """Experts that are modules; one without rows is not called, as in the models that have them."""

    module: Any
    own: range
    part: int | None

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        experts = list(self.module.children())[self.own.start : self.own.stop]
        parts = zip(experts, rows.split(counts.tolist()), strict=True)
        with self._drawing():
            return torch.cat([expert(part) if len(part) else part for expert, part in parts])

    def _drawing(self) -> AbstractContextManager[None]:
        """Each slice draws masks of its own features, also where ranks draw from one seed."""
        if self.part is None or not self.module.training or not draws(self.module):
            return nullcontext()
        return keyed(int(torch.randint(1 << 62, (), device="cpu")), "slice", self.part)


def _names(found: FoundExperts) -> list[str]:
    """Of the experts of a list."""
    return [name for name, _ in found.module.named_children()]


def _homes(number: int, shares: Sequence[range], cut: Split | None) -> tuple[tuple[int, ...], Split | None]:
    """The ranks that keep a parameter of one expert, and how they share it, where they do."""
    near = [rank for rank, own in enumerate(shares) if number in own]
    homes = tuple(rank for rank in near if cut is None or cut.held[rank])
    return homes, cut if len(homes) > 1 else None


def _keep(found: FoundExperts, plan: ExpertPlan, *, rank: int) -> None:
    """Drops what other ranks keep."""
    if found.kind == "listed":
        for place, expert in found.module.named_children():
            for name, parameter in list(expert.named_parameters()):
                path = f"{found.path}.{place}.{name}".lstrip(".")
                module = expert.get_submodule(name.rpartition(".")[0])
                cut = plan.splits.get(path)
                kept = parameter if cut is None else like(parameter, cut.take(parameter.detach(), rank))
                module._parameters[name.rpartition(".")[2]] = kept if rank in plan.homes[path] else None
        return
    for name, parameter in list(found.module.named_parameters(recurse=False)):
        path = f"{found.path}.{name}".lstrip(".")
        dealt = plan.tiles.get(path) or plan.splits[path]
        setattr(found.module, name, like(parameter, dealt.take(parameter.detach(), rank)))


def _check(model: nn.Module, found: list[FoundExperts]) -> None:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = names.setdefault(id(parameter), name)
        for each in found:
            if other != name and (name.startswith(f"{each.path}.") or other.startswith(f"{each.path}.")):
                raise SwapError(f"parameters {other} and {name} are tied; experts that are dealt must not be")


def _summary(found: list[FoundExperts], where: str, slices: int) -> str:
    counts = " or ".join(map(str, sorted({each.num_experts for each in found})))
    cut = f", each cut into {slices} slices" if slices > 1 else ""
    return f"{counts} experts of {len(found)} modules over {where}{cut}"


def _notes(found: list[FoundExperts]) -> Iterator[str]:
    """Where ranks draw numbers that one process would draw otherwise."""
    for each in found:
        for name, module in each.module.named_modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                yield (
                    f"{each.path}.{name}: dropout masks of experts are drawn on the rank of each expert, not as in one "
                    "process"
                )
