"""A unit: parameters of one stage, sharded over the same ranks, that are gathered and reduced together.

Shards lie side by side in one piece of memory, so a gather copies nothing before it leaves. Whole parameters are the
same tensors from step to step whose memory comes and goes, so what autograd saved of them is whole again when backward
needs it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from meshwright.parallel.collectives import Groups, Pending
from meshwright.parallel.deferred import like
from meshwright.parallel.errors import WrapError

__all__ = ["Sharding", "Unit", "padded_rows", "shard_parameters"]

_same_version: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
_Places = list[tuple[nn.Module, str]]


def padded_rows(shape: Sequence[int], degree: int) -> int:
    """Rows (dim 0) of every rank's shard, padding included.

    >>> padded_rows([5, 3], 2)
    3
    """
    return -(-shape[0] // degree)


@dataclass(frozen=True)
class Sharding:
    """Over which ranks parameters are sharded.

    Args:
        axis: of the shards.
        degree: of it.
        rank: along it.
        mesh: of the shards, and of their replicas before.
        placements: on that mesh.
        replicas: axis along which shards are replicated.
    """

    axis: str
    degree: int
    rank: int
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    replicas: str | None = None

    @classmethod
    def dense(cls, groups: Groups) -> "Sharding":
        """Of what all ranks compute with: over `fsdp`, replicated along `dp`."""
        rank, degree = groups.mesh.coordinates(groups.rank)["fsdp"], groups.mesh.fsdp
        if groups.mesh.dp == 1:
            return cls("fsdp", degree, rank, groups.device_mesh("fsdp"), (Shard(0),))
        return cls("fsdp", degree, rank, groups.device_mesh("dp", "fsdp"), (Replicate(), Shard(0)), "dp")

    @classmethod
    def experts(cls, groups: Groups) -> "Sharding | None":
        """Of experts that are dealt: over `edp`, all ranks that keep the same ones; None where there is one only."""
        ranks = groups.ranks("edp")
        if len(ranks) == 1:
            return None
        return cls("edp", len(ranks), ranks.index(groups.rank), groups.device_mesh("edp"), (Shard(0),))


def shard_parameters(module: nn.Module, over: Callable[[str], Sharding | None]) -> None:
    """Replaces every parameter by this rank's rows of it, tied ones by one.

    Args:
        module: changed in place.
        over: parameter -> over which ranks; None leaves it whole.

    Raises:
        WrapError: for a parameter without rows.
    """
    for name, places in _places(module):
        owner, leaf = places[0]
        parameter = owner._parameters[leaf]
        assert parameter is not None, name
        ranks = over(name)
        if ranks is None:
            continue
        if not parameter.dim():
            raise WrapError(f"parameter {name} is a single number, which has no rows to shard; give it the shape (1,)")
        rows = padded_rows(parameter.shape, ranks.degree)
        first = ranks.rank * rows
        mine = parameter.detach()[first : first + rows].clone(memory_format=torch.contiguous_format)
        sharded = DTensor.from_local(
            mine,
            ranks.mesh,
            ranks.placements,
            run_check=False,
            shape=parameter.shape,
            stride=torch.empty(parameter.shape, device="meta").stride(),  # shards lie row by row
        )
        fresh = like(parameter, sharded)
        for owner, leaf in places:
            owner._parameters[leaf] = fresh


@dataclass(frozen=True, eq=False)
class _Member:
    """One parameter: where modules hold it, its shard between uses, and itself whole (without memory when freed)."""

    name: str
    places: _Places
    sharded: nn.Parameter
    whole: nn.Parameter


class Unit:
    """Parameters that are gathered and reduced together.

    Args:
        module: the model, sharded by `shard_parameters`.
        names: of the parameters, all sharded over the same ranks.
        groups: process groups.
        over: these ranks.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], groups: Groups, over: Sharding) -> None:
        self._groups = groups
        self._over = over
        self._degree = over.degree
        places = {name: found for name, found in _places(module) if name in set(names)}
        members = [_member(name, found) for name, found in places.items()]
        self._members = sorted(members, key=lambda each: -each.whole.itemsize)  # so that each lies at its own alignment
        self._shards = self._side_by_side()
        self._gathering: tuple[Tensor, Pending] | None = None
        self._scattering: list[tuple[list[_Member], Tensor, Tensor, Pending]] = []
        self._summing: list[tuple[list[_Member], Tensor, Pending]] = []
        self.is_whole = False

    def gather(self) -> None:
        """Starts making the parameters whole."""
        if self.is_whole or self._gathering is not None or not self._members:
            return
        parts = self._shards.new_empty(self._degree * self._shards.numel())
        travels = bool(parts.numel())  # nothing does where all parameters are without elements
        pending = self._groups.gather_into(parts, self._shards, self._over.axis) if travels else Pending(None)
        self._gathering = parts, pending

    def need(self) -> None:
        """Waits until the parameters are whole, and lets the modules hold them."""
        if self._gathering is None:
            return
        parts, pending = self._gathering
        pending.wait()
        self._gathering = None
        offset = 0
        for each in self._members:
            size_bytes = self._shard_numel(each) * each.whole.itemsize
            each.whole.untyped_storage().resize_(each.whole.numel() * each.whole.itemsize)
            if size_bytes:
                rows = parts.view(self._degree, -1)[:, offset : offset + size_bytes].view(each.whole.dtype)
                with torch.no_grad(), _same_version(each.whole):
                    _copy_rows(rows, each.whole)
            offset += size_bytes
            _hold(each.places, each.whole)
        self.is_whole = True

    def free(self) -> None:
        """Lets the modules hold shards again, and gives memory back."""
        if self._gathering is not None:
            self._gathering[1].wait()
            self._gathering = None
        for each in self._members if self.is_whole else ():
            each.whole.untyped_storage().resize_(0)
            _hold(each.places, each.sharded)
        self.is_whole = False

    def reduce(self, ask_scale: Callable[[], Tensor]) -> list[str]:
        """Starts summing gradients, scaled, into shards; names those that this rank computed."""
        trained = [each for each in self._members if each.whole.requires_grad]
        used = [each.name for each in trained if each.whole.grad is not None]
        for dtype in dict.fromkeys(each.whole.dtype for each in trained):
            self._reduce([each for each in trained if each.whole.dtype is dtype], ask_scale)
        return used

    def sum_over_replicas(self) -> None:
        """Waits for the sums over shards; these hold them at once, whole when those over replicas have come too."""
        for members, _, sums, pending in self._scattering:
            pending.wait()
            replicas = self._over.replicas
            summed = Pending(None) if replicas is None else self._groups.all_reduce(sums, replicas)
            self._summing.append((members, sums, summed))
        self._scattering = []

    def finish(self, ask_scale: Callable[[], Tensor] | None = None) -> None:
        """Waits for all sums and adds them to the gradients of the shards; `ask_scale` where they left unscaled."""
        self.sum_over_replicas()
        for members, sums, pending in self._summing:
            pending.wait()
            sizes = [self._shard_numel(each) for each in members]
            for each, part in zip(members, sums.split(sizes), strict=True):
                self._add(each.sharded, part)
        self._summing = []
        held = [_local(each.sharded.grad) for each in self._members if each.sharded.grad is not None]
        if ask_scale is not None and held:
            torch._foreach_mul_(held, ask_scale().to(held[0].device))

    def forget(self) -> None:
        """Drops gradients, of an unfinished step too."""
        self._scattering, self._summing = [], []
        for each in self._members:
            each.whole.grad = each.sharded.grad = None

    def _side_by_side(self) -> Tensor:
        """Moves the shards into one piece of memory (1-dim, bytes), each padded to equal rows on all ranks."""
        sizes = [self._shard_numel(each) * each.whole.itemsize for each in self._members]
        widest = max((each.whole.itemsize for each in self._members), default=1)
        device = self._members[0].whole.device if self._members else None
        flat = torch.zeros(-(-sum(sizes) // widest) * widest, dtype=torch.uint8, device=device)
        for each, offset, size in zip(self._members, accumulate([0, *sizes]), sizes, strict=False):
            with torch.no_grad():
                local = _local(each.sharded)
                mine = flat[offset : offset + size].view(local.dtype)[: local.numel()].view(local.shape)
                mine.copy_(local)
                local.data = mine
        return flat

    def _reduce(self, trained: list[_Member], ask_scale: Callable[[], Tensor]) -> None:
        sizes = [self._shard_numel(each) for each in trained]
        first = trained[0].whole
        flat = first.new_zeros(self._degree * sum(sizes))
        parts = flat.view(self._degree, -1).split(sizes, dim=1)
        scale = ask_scale().to(first.device, first.dtype)
        for each, part in zip(trained, parts, strict=True):
            if each.whole.grad is not None:
                _copy_rows(part, each.whole.grad, scale)
                each.whole.grad = None
        sums = first.new_empty(sum(sizes))
        pending = self._groups.reduce_scatter(sums, flat, self._over.axis) if flat.numel() else Pending(None)
        self._scattering.append((trained, flat, sums, pending))

    def _add(self, sharded: nn.Parameter, part: Tensor) -> None:
        local = _local(sharded)
        mine = part[: local.numel()].view(local.shape)
        if sharded.grad is not None:
            _local(sharded.grad).add_(mine)
            return
        assert isinstance(sharded, DTensor)
        sharded.grad = DTensor.from_local(
            mine,
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=sharded.shape,
            stride=sharded.stride(),
        )

    def _shard_numel(self, member: _Member) -> int:
        shape = member.whole.shape
        return padded_rows(shape, self._degree) * shape[1:].numel()


def _copy_rows(parts: Tensor, whole: Tensor, scale: Tensor | None = None) -> None:
    """Copies between parts ([rank, elements], the last ones padded) and a whole tensor; which way, `scale` tells.

    Args:
        parts: taken from without `scale`, filled with it.
        whole: the other one.
        scale: 0-dim, multiplies what is put into the parts.
    """
    each = parts.shape[1]
    flat = whole.reshape(-1) if scale is not None else whole.view(-1)
    if not flat.numel():
        return
    full, rest = divmod(flat.numel(), each)
    pairs = [(parts[:full], flat[: full * each].view(full, each))]
    if rest:
        pairs.append((parts[full, :rest], flat[full * each :]))
    for part, values in pairs:
        if scale is None:
            values.copy_(part)
        else:
            torch.mul(values, scale, out=part)


def _member(name: str, places: _Places) -> _Member:
    owner, leaf = places[0]
    sharded = owner._parameters[leaf]
    assert sharded is not None, name
    local = _local(sharded)
    whole = like(sharded, torch.empty(sharded.shape, dtype=local.dtype, device=local.device))
    whole.untyped_storage().resize_(0)
    return _Member(name, places, sharded, whole)


def _places(module: nn.Module) -> list[tuple[str, _Places]]:
    """First name of every parameter, and all (module, attribute) that hold it."""
    found: dict[int, tuple[str, _Places]] = {}
    for prefix, owner in module.named_modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{leaf}".lstrip(".")
                found.setdefault(id(parameter), (name, []))[1].append((owner, leaf))
    return list(found.values())


def _hold(places: _Places, parameter: nn.Parameter) -> None:
    for owner, leaf in places:
        owner._parameters[leaf] = parameter


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local
