"""Times an all-reduce: `python -m meshwright.clusters.bandwidth BACKEND BYTES SECONDS` is one rank of it.

RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which; rank 0 prints the result as one JSON object.
Bus bandwidth is bytes / time * 2 (n - 1) / n, as nccl-tests define it: what each link carries, for any number of ranks.
"""

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from meshwright.parallel.importing import import_all

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

__all__ = ["bus_bytes_per_s", "main"]

_WARM_UP, _MOST, _SPAN_S = 2, 20, 1.0


def bus_bytes_per_s(num_bytes: int, seconds: float, num_ranks: int) -> float:
    """Bus bandwidth of one all-reduce, in bytes per second.

    >>> bus_bytes_per_s(1000, 0.5, 4)
    3000.0
    """
    return num_bytes / seconds * 2 * (num_ranks - 1) / num_ranks


def main(words: Sequence[str]) -> int:
    """Runs one rank."""
    import_all(["torch.distributed"])
    import torch
    import torch.distributed as dist

    backend, num_bytes, timeout_s = words[0], int(words[1]), float(words[2])
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    span = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=_store(rank, num_ranks, span), rank=rank, world_size=num_ranks, timeout=span)
    try:
        payload = torch.zeros(num_bytes // 4, device=device)
        spent_s = _timed(payload)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        found = bus_bytes_per_s(payload.numel() * 4, spent_s, num_ranks)
        sys.stdout.write(json.dumps({"bus_bytes_per_s": found, "seconds": spent_s, "ranks": num_ranks}) + "\n")
    return 0


def _store(rank: int, num_ranks: int, span: timedelta) -> "Store":
    """The ranks' store; left to itself it would listen on every interface, so rank 0 hands it a socket of one."""
    import torch.distributed as dist

    made: Callable[..., Store] = getattr(dist, "TCPStore")  # noqa: B009 (torch does not declare it)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank:
        return made(host, port, num_ranks, is_master=False, timeout=span)
    listener = socket.create_server((host, port), backlog=num_ranks)
    return made(host, port, num_ranks, True, span, master_listen_fd=listener.detach())


def _timed(payload: "Tensor") -> float:
    """Median seconds of one all-reduce, the slowest rank's; the ranks agree on how many are timed."""
    import torch
    import torch.distributed as dist

    def once() -> float:
        start_s = time.perf_counter()
        dist.all_reduce(payload)
        if payload.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start_s

    first_s = [once() for _ in range(_WARM_UP)][-1]
    rounds = torch.tensor([first_s], device=payload.device)
    dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
    spent_s = [once() for _ in range(max(3, min(_MOST, int(_SPAN_S / rounds.item()))))]
    slowest = torch.tensor(spent_s, device=payload.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(statistics.median(slowest.tolist()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
