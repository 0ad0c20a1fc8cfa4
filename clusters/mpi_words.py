"""JSON between processes of MPI, as bytes: mpi4py's own ways of sending objects pickle them."""

import json
from array import array
from typing import Any

__all__ = ["gathered", "spread"]


def spread(value: Any, others: Any) -> Any:
    """What the first process of a communicator has, on all of them.

    Args:
        value: that JSON can hold; of the first process.
        others: the communicator.
    """
    data = bytearray(json.dumps(value).encode() if others.rank == 0 else b"")
    size = array("q", [len(data)])
    others.Bcast(size)
    if others.rank:
        data = bytearray(size[0])
    others.Bcast(data)
    return json.loads(data)


def gathered(value: Any, others: Any) -> list[Any]:
    """What each process of a communicator has, on all of them, by rank.

    Args:
        value: that JSON can hold.
        others: the communicator.
    """
    data = bytearray(json.dumps(value).encode())
    sizes = array("i", [0] * others.size)
    others.Allgather(array("i", [len(data)]), sizes)
    starts = [sum(sizes[:each]) for each in range(others.size)]
    found = bytearray(sum(sizes))
    others.Allgatherv(data, [found, list(sizes), starts, "B"])
    return [json.loads(found[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
