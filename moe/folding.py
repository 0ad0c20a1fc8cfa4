"""Which experts a rank of `ep` keeps."""

from meshwright.moe.errors import DispatchError

__all__ = ["own_experts"]


def own_experts(num_experts: int, *, ranks: int, rank: int) -> range:
    """The experts of one rank of `ep`: consecutive ones, equally many on each.

    Args:
        num_experts: of all ranks.
        ranks: the degree `ep`.
        rank: along it.

    Raises:
        DispatchError: for experts that the ranks cannot share.

    >>> own_experts(8, ranks=4, rank=1)
    range(2, 4)
    """
    if num_experts % ranks:
        legal = ", ".join(str(number) for number in range(1, num_experts + 1) if num_experts % number == 0)
        raise DispatchError(f"{num_experts} experts do not lie evenly on ep={ranks} ranks; choose ep from: {legal}")
    each = num_experts // ranks
    return range(rank * each, (rank + 1) * each)
