"""The mesh: named axes with degrees, and the arithmetic between ranks and coordinates.

Pure numbers: no torch, no environment, no process group. Ranks are laid out row-major over
`pp, dp, fsdp, cp, tp`, so that the ranks of `tp` are neighbours and those of `pp` far apart.
Expert parallelism (`ep = ep_node x ep_local`) owns no ranks: it folds over the ranks of
`dp, fsdp, cp, tp` inside a stage (Megatron's parallel folding, arXiv 2504.14960).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import product
from math import prod

from meshwright.parallel.errors import MeshError, nearest

__all__ = ["AXES", "BATCH_AXES", "DATA_AXES", "Mesh"]

AXES = ("pp", "dp", "fsdp", "cp", "tp")
"""The axes that own ranks, outermost first."""

DATA_AXES = ("dp", "fsdp")
"""The axes whose ranks read different samples."""

BATCH_AXES = ("dp", "fsdp", "cp")
"""The axes over which one global batch (samples and positions) is spread."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Degrees of each parallel axis; their product is the number of ranks.

    Args:
        pp: pipeline stages (devices, not virtual stages).
        dp: replicas that hold whole parameters.
        fsdp: ranks that share one sharded set of states (ZeRO).
        cp: ranks that share one sequence.
        tp: ranks that share one matrix.
        ep: ranks that share one set of experts, folded over the ranks of one stage.
        ep_node: how many nodes an `ep` group spans; `ep_local = ep / ep_node`.

    Raises:
        MeshError: for a degree below one, or an `ep` that does not fold over a stage.

    >>> mesh = Mesh(dp=2, tp=2)
    >>> mesh.world_size, mesh.coordinates(3)
    (4, {'pp': 0, 'dp': 1, 'fsdp': 0, 'cp': 0, 'tp': 1})
    >>> mesh.groups("tp")
    [(0, 1), (2, 3)]
    >>> print(mesh)
    dp=2 x tp=2
    """

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    ep_node: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            degree = getattr(self, field.name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise MeshError(f"mesh axis {field.name}={degree!r}: a degree is an integer of at least 1")
        stage_size = self.world_size // self.pp
        if stage_size % self.ep:
            raise MeshError(
                f"mesh axis ep={self.ep} does not divide the {stage_size} ranks of one stage "
                f"(dp x fsdp x cp x tp); choose from: {', '.join(map(str, _divisors(stage_size)))}"
            )
        if self.ep % self.ep_node:
            raise MeshError(f"mesh axis ep_node={self.ep_node} does not divide ep={self.ep}")

    def __str__(self) -> str:
        shown = [f"{axis}={self.degree(axis)}" for axis in (*AXES, "ep") if self.degree(axis) > 1]
        return " x ".join(shown) or "one rank"

    @classmethod
    def of(cls, degrees: Mapping[str, int]) -> "Mesh":
        """Builds a mesh from a mapping, naming the nearest axis for an unknown one.

        >>> Mesh.of({"dp": 2})
        Mesh(pp=1, dp=2, fsdp=1, cp=1, tp=1, ep=1, ep_node=1)
        """
        known = [field.name for field in fields(cls)]
        for name in degrees:
            if name not in known:
                raise MeshError(f"mesh axis {name!r} does not exist; {nearest(name, known)}")
        return cls(**degrees)

    @property
    def world_size(self) -> int:
        """Number of ranks of the whole mesh."""
        return prod(self.degree(axis) for axis in AXES)

    @property
    def ep_local(self) -> int:
        """Ranks of an expert group inside one node."""
        return self.ep // self.ep_node

    @property
    def data_degree(self) -> int:
        """How many ranks read different samples (`dp x fsdp`)."""
        return prod(self.degree(axis) for axis in DATA_AXES)

    def degree(self, axis: str) -> int:
        """Degree of one axis."""
        if axis not in (*AXES, "ep", "ep_node"):
            raise MeshError(f"mesh axis {axis!r} does not exist; {nearest(axis, AXES)}")
        return int(getattr(self, axis))

    def degrees(self) -> dict[str, int]:
        """Degrees of the axes that own ranks, outermost first."""
        return {axis: self.degree(axis) for axis in AXES}

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a rank along each axis."""
        self._check_rank(rank)
        found: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, self.degree(axis))
        return {axis: found[axis] for axis in AXES}

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """Rank at a position; axes left out count as 0.

        >>> Mesh(pp=2, tp=4).rank({"pp": 1, "tp": 3})
        7
        """
        rank = 0
        for axis in AXES:
            position = coordinates.get(axis, 0)
            if not 0 <= position < self.degree(axis):
                raise MeshError(f"coordinate {axis}={position} lies outside axis {axis}={self.degree(axis)}")
            rank = rank * self.degree(axis) + position
        return rank

    def group(self, rank: int, axes: str | Iterable[str]) -> tuple[int, ...]:
        """Ranks that differ from `rank` only along `axes`, in row-major order.

        >>> Mesh(dp=2, fsdp=2, tp=2).group(5, ("dp", "fsdp"))
        (1, 3, 5, 7)
        """
        wanted = self._axes(axes)
        here = self.coordinates(rank)
        spans = [range(self.degree(axis)) if axis in wanted else (here[axis],) for axis in AXES]
        return tuple(self.rank(dict(zip(AXES, at, strict=True))) for at in product(*spans))

    def groups(self, axes: str | Iterable[str]) -> list[tuple[int, ...]]:
        """All groups along `axes`; each rank lies in exactly one."""
        wanted = self._axes(axes)
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            rest = tuple(at for axis, at in self.coordinates(rank).items() if axis not in wanted)
            found.setdefault(rest, []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

    def data_rank(self, rank: int) -> int:
        """Which share of the samples a rank reads, in `range(data_degree)`."""
        here = self.coordinates(rank)
        share = 0
        for axis in DATA_AXES:
            share = share * self.degree(axis) + here[axis]
        return share

    def _axes(self, axes: str | Iterable[str]) -> frozenset[str]:
        wanted = frozenset([axes] if isinstance(axes, str) else axes)
        for axis in wanted:
            if axis not in AXES:
                raise MeshError(f"mesh axis {axis!r} owns no ranks; {nearest(axis, AXES)}")
        return wanted

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise MeshError(f"rank {rank} lies outside this mesh of {self.world_size} ranks ({self})")


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
