"""The ranks of a calibration: `python -m meshwright.clusters.calibrate_rank BACKEND FOLDER COUNTS SECONDS`.

This process is rank 0; the others are forked from it as soon as torch is imported, before it has done anything. For
each of COUNTS ("1,2,4,8") rank 0 measures with the threads that each of so many ranks has, while the others wait; then
as many ranks exchange tensors. Rank 0 prints one JSON object a line: what begins, what was measured. Ranks meet through
a file in FOLDER, so nothing listens but collectives themselves.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from meshwright.clusters.calibrate_device import measured_device

if TYPE_CHECKING:
    import torch

__all__ = ["main"]

_SIZES = (2**10, 2**16, 2**20, 2**23)  # bytes
_ROUNDS = 9


def main(words: Sequence[str]) -> int:
    """Runs all ranks."""
    import torch
    import torch.distributed as dist  # noqa: F401 (imported once for all ranks)

    assert not torch.cuda.is_initialized(), "ranks are forked before a GPU is used"
    counts = [int(each) for each in words[2].split(",")]
    for rank in range(1, counts[-1]):
        if os.fork() == 0:
            os._exit(_failed(words, counts, rank))
    return _failed(words, counts, 0)


def _failed(words: Sequence[str], counts: Sequence[int], rank: int) -> int:
    """Runs a rank; 1 and a line on standard error if it fails."""
    try:
        _run(words, counts, rank)
    except (RuntimeError, OSError, ValueError) as error:
        sys.stderr.write(f"rank {rank}: {error}\n".replace("\n", " ").strip() + "\n")
        sys.stderr.flush()
        return 1
    return 0


def _run(words: Sequence[str], counts: Sequence[int], rank: int) -> None:
    import torch
    import torch.distributed as dist

    backend, meeting, span = words[0], f"file://{words[1]}/meeting", timedelta(seconds=float(words[3]))
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=counts[-1], timeout=span)
    try:
        dist.barrier()
        for count in counts:
            group = dist.new_group(list(range(count)))
            if rank < count:
                _measure(count, group, device, fewest=_threads(counts[-1]))
        dist.barrier()
        if rank == 0:
            _tell({"ended": True})
    finally:
        dist.destroy_process_group()


def _tell(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _threads(count: int) -> int:
    """Of each of so many ranks, as a launch deals cores unless the user does."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // count))


_MEASURED: dict[int, dict[str, Any]] = {}  # threads -> what rank 0 measured with them


def _measure(count: int, group: Any, device: "torch.device", *, fewest: int) -> None:
    """What one of `count` ranks takes for operations, and all for collectives; every shape with the fewest threads."""
    import torch
    import torch.distributed as dist

    threads = 1 if device.type == "cuda" else _threads(count)
    torch.set_num_threads(threads)
    first = dist.get_rank() == 0

    def begin(part: str) -> None:
        _tell({"begins": f"{part}, {threads} thread{'s' if threads > 1 else ''}"})

    if first and threads not in _MEASURED:
        _MEASURED[threads] = measured_device(device, brief=threads > fewest, begin=begin)
    dist.barrier(group)
    found: list[list[Any]] = []
    if count > 1:
        if first:
            _tell({"begins": f"collectives of {count} ranks"})
        found = _collectives(count, group, device)
    if first:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        said = {"device": name, "torch": torch.__version__, "threads": threads, "resident_bytes": kept}
        _tell({"ranks": count, **said, **_MEASURED[threads], "collectives": found})


def _collectives(count: int, group: Any, device: "torch.device") -> list[list[Any]]:
    """[name, bytes in all, seconds] of gathers and all-reduces of all ranks, and of transfers between two."""
    import torch
    import torch.distributed as dist

    found: list[list[Any]] = []
    for size in _SIZES:
        whole = torch.zeros(size // 4, device=device)
        own = whole[: size // 4 // count].clone()
        parts = torch.zeros(own.numel() * count, device=device)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": partial(dist.all_reduce, whole, group=group),
            "all_gather": partial(dist.all_gather_into_tensor, parts, own, group=group),
            "send": partial(_there_and_back, dist.get_rank(), whole),
        }
        for name, call in calls.items():
            found.append([name, size, _slowest_s(call, group, device) / (2 if name == "send" else 1)])
    return found


def _there_and_back(rank: int, whole: "torch.Tensor") -> None:
    """A transfer from rank 0 to rank 1 and back; others have nothing to do."""
    import torch.distributed as dist

    if rank == 0:
        dist.send(whole, 1)
        dist.recv(whole, 1)
    elif rank == 1:
        dist.recv(whole, 0)
        dist.send(whole, 0)


def _slowest_s(call: Callable[[], object], group: Any, device: "torch.device") -> float:
    """First quartile over rounds of what the slowest rank took."""
    import torch
    import torch.distributed as dist

    sync: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    spent = torch.zeros(_ROUNDS, device=device)
    for place in range(-2, _ROUNDS):
        dist.barrier(group)
        start_s = time.perf_counter()
        call()
        sync()
        if place >= 0:
            spent[place] = time.perf_counter() - start_s
    dist.all_reduce(spent, op=dist.ReduceOp.MAX, group=group)
    return float(statistics.quantiles(spent.tolist(), n=4, method="inclusive")[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
