"""A unit: parameters of one stage, sharded over the same ranks, that are gathered and reduced together.

Shards lie side by side in one piece of memory, so a gather copies nothing before it leaves. Whole parameters are the
same tensors from step to step whose memory comes and goes, so what autograd saved of them is whole again when backward
needs it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.parallel.collectives import Groups, Pending
from meshwright.parallel.deferred import like
from meshwright.parallel.errors import WrapError
from meshwright.parallel.optimizer import shares_memory
from meshwright.parallel.sharding import Places, Sharding, padded_rows, places_of

__all__ = ["Unit"]

_same_version: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class _Member:
    """One parameter: where modules hold it, its shard between uses, and itself whole (without memory when freed).

    Whether it trains is known from the start, since all ranks must sum the same ones; what was frozen since is unused.
    """

    name: str
    places: Places
    sharded: nn.Parameter
    whole: nn.Parameter
    trains: bool


class Unit:
    """Parameters that are gathered and reduced together.

    Args:
        module: the model, sharded by `shard_parameters`.
        names: of the parameters, all sharded over the same ranks.
        groups: process groups.
        over: these ranks.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], groups: Groups, *, over: Sharding) -> None:
        self._groups = groups
        self._over = over
        self._degree = over.degree
        places = {name: found for name, found in places_of(module) if name in set(names)}
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
        self._take_back()
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
            each.whole.requires_grad_(each.sharded.requires_grad)
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
        trained = [each for each in self._members if each.trains]
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
        widest = max((each.whole.itemsize for each in self._members), default=1)
        device = self._members[0].whole.device if self._members else None
        size = sum(self._shard_numel(each) * each.whole.itemsize for each in self._members)
        flat = torch.zeros(-(-size // widest) * widest, dtype=torch.uint8, device=device)
        for each, mine in self._in(flat):
            _move(each, mine)
        return flat

    def _in(self, flat: Tensor) -> Iterator[tuple[_Member, Tensor]]:
        """Where each shard lies."""
        offset = 0
        for each in self._members:
            size, local = self._shard_numel(each) * each.whole.itemsize, _local(each.sharded)
            yield each, flat[offset : offset + size].view(each.whole.dtype)[: local.numel()].view(local.shape)
            offset += size

    def _take_back(self) -> None:
        """Moves back what got memory of its own (`Module.to` there and back).

        Raises:
            WrapError: for shards of another dtype or device.
        """
        first = next(iter(self._members), None)
        if first is None or shares_memory(_local(first.sharded), self._shards):
            return
        for each, mine in self._in(self._shards):
            local = _local(each.sharded)
            if (local.dtype, local.device) != (mine.dtype, mine.device):
                raise WrapError(
                    f"parameter {each.name} is {local.dtype} on {local.device} and was {mine.dtype} on {mine.device} "
                    "when the model was wrapped; change dtypes and devices before parallelize()"
                )
            _move(each, mine)

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


def _member(name: str, places: Places) -> _Member:
    owner, leaf = places[0]
    sharded = owner._parameters[leaf]
    assert sharded is not None, name
    local = _local(sharded)
    whole = like(sharded, torch.empty(sharded.shape, dtype=local.dtype, device=local.device))
    whole.untyped_storage().resize_(0)
    return _Member(name, places, sharded, whole, sharded.requires_grad)


def _move(member: _Member, mine: Tensor) -> None:
    local = _local(member.sharded)
    if not shares_memory(local, mine):
        with torch.no_grad():
            mine.copy_(local)
            local.data = mine


def _hold(places: Places, parameter: nn.Parameter) -> None:
    for owner, leaf in places:
        owner._parameters[leaf] = parameter


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local
