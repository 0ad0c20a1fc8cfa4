"""How many ranks a node gets where nodes are planned before anybody has seen them. Pure."""

from meshwright.clusters.base import StartRequest
from meshwright.clusters.errors import UnavailableError

__all__ = ["ranks_per_node"]


def ranks_per_node(request: StartRequest, why: str, *, gpus: int | None = None) -> int:
    """A number for every node alike: the one asked for, or an even share of all ranks.

    Args:
        request: what is asked.
        why: nobody can count what a node has, for people.
        gpus: what "gpu" stands for; None where that is not known either.

    Raises:
        UnavailableError: for a word that only the nodes could tell the number of.
    """
    asked = gpus if request.ranks_per_node == "gpu" and gpus else request.ranks_per_node
    if isinstance(asked, str):
        raise UnavailableError(f"nproc_per_node: {asked}, but {why}; write a number")
    return asked or max(1, (request.num_ranks or request.num_nodes) // request.num_nodes)
