"""Which ranks share a set of experts: `ep = ep_node x ep_local` folded over the ranks of one stage.

Attention uses the ranks of a stage as dp x fsdp x cp x tp. Experts use the same ranks as edp x ep_node x ep_local, the
last varying fastest (Megatron's parallel folding, arXiv 2504.14960); neighbours share a node:

  ep         ranks that together hold every expert once            consecutive
  ep_local   those of them on one node                             consecutive
  ep_node    those with the same place on their nodes              ep_local apart
  edp        ranks that hold the same experts (expert data)        ep apart
"""

from functools import lru_cache
from typing import Literal, get_args

from meshwright.parallel.errors import MeshError, nearest
from meshwright.parallel.mesh import Mesh

__all__ = ["FOLDS", "Fold", "fold_groups", "ranks_along"]

Fold = Literal["ep", "ep_node", "ep_local", "edp"]

FOLDS: tuple[Fold, ...] = get_args(Fold)
"""The axes that own no ranks."""


def fold_groups(mesh: Mesh, fold: Fold) -> list[tuple[int, ...]]:
    """All groups of ranks along a fold; each rank lies in exactly one.

    Args:
        mesh: with its degrees `ep` and `ep_node`.
        fold: "ep", "ep_node", "ep_local" or "edp".

    Raises:
        MeshError: for another name.

    >>> mesh = Mesh(dp=8, ep=4, ep_node=2)
    >>> fold_groups(mesh, "ep"), fold_groups(mesh, "edp")
    ([(0, 1, 2, 3), (4, 5, 6, 7)], [(0, 4), (1, 5), (2, 6), (3, 7)])
    >>> fold_groups(mesh, "ep_node")
    [(0, 2), (1, 3), (4, 6), (5, 7)]
    """
    if fold not in FOLDS:
        raise MeshError(f"experts are not folded over {fold!r}; {nearest(str(fold), FOLDS)}")
    stage = mesh.world_size // mesh.pp
    sizes = {"ep": mesh.ep, "ep_node": mesh.ep, "ep_local": mesh.ep_local, "edp": stage}
    strides = {"ep": 1, "ep_node": mesh.ep_local, "ep_local": 1, "edp": mesh.ep}
    size, stride = sizes[fold], strides[fold]
    spans = [range(start, start + size) for start in range(0, mesh.world_size, size)]
    return [tuple(span[first::stride]) for span in spans for first in range(stride)]


@lru_cache(maxsize=64)  # asked for at every collective
def ranks_along(mesh: Mesh, rank: int, *axes: str) -> tuple[int, ...]:
    """The ranks that share a group with `rank`, along axes of a mesh or along one fold.

    >>> ranks_along(Mesh(dp=2, tp=2, ep=2), 3, "edp"), ranks_along(Mesh(dp=2, tp=2), 3, "dp")
    ((1, 3), (1, 3))
    """
    for fold in FOLDS:
        if axes == (fold,):
            return next(each for each in fold_groups(mesh, fold) if rank in each)
    return mesh.group(rank, axes)
