"""Which ranks share parameters row by row, and the rows of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from meshwright.parallel.collectives import Groups
from meshwright.parallel.deferred import like
from meshwright.parallel.errors import WrapError

__all__ = ["Places", "Sharding", "padded_rows", "places_of", "shard_parameters"]

Places = list[tuple[nn.Module, str]]
"""Modules that hold a parameter, and under which attribute."""


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
    for name, places in places_of(module):
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


def places_of(module: nn.Module) -> list[tuple[str, Places]]:
    """First name of every parameter, and all (module, attribute) that hold it."""
    found: dict[int, tuple[str, Places]] = {}
    for prefix, owner in module.named_modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{leaf}".lstrip(".")
                found.setdefault(id(parameter), (name, []))[1].append((owner, leaf))
    return list(found.values())
