"""The ranks of a calibration: `python -m meshwright.clusters.calibrate_rank BACKEND FOLDER COUNTS SECONDS`.

This process is rank 0; the others are forked from it as soon as torch is imported, before it has done anything. For
each of COUNTS ("1,2,4,8") ranks measure with the threads that each of so many has, as many at once as there are cores
for; then they exchange tensors in groups of every size, all groups at once; then they meet again and again while they
compute. Rank 0 prints one JSON object a line: what begins, what was measured. Ranks meet through a file in FOLDER, so
nothing listens but collectives themselves.
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

from meshwright.clusters.bootstrap import die_with
from meshwright.clusters.calibrate_device import measured_device
from meshwright.clusters.calibrate_units import handled_s
from meshwright.clusters.calibrate_waits import unsteadiness

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
    _end_with(os.getppid())
    here = os.getpid()
    for rank in range(1, counts[-1]):
        if os.fork() == 0:
            _end_with(here)
            os._exit(_failed(words, counts, rank))
    return _failed(words, counts, 0)


def _end_with(parent: int) -> None:
    """No rank outlives whoever asked for numbers, however that ends."""
    if sys.platform == "linux":
        die_with(parent)


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
            groups = {size: _own_group(rank, count, size) for size in _sizes_of_groups(count)}
            if rank < count:
                _measure(count, groups, device, fewest=_threads(counts[-1]))
        dist.barrier()
        if rank == 0:
            _tell({"ended": True})
    finally:
        dist.destroy_process_group()


def _sizes_of_groups(count: int) -> list[int]:
    """Of the groups that so many ranks fall into, the largest last."""
    return [each for each in range(2, count) if count % each == 0] + [count]


def _own_group(rank: int, count: int, size: int) -> Any:
    """The group of a rank among groups of so many of the first `count` ranks; all ranks make all of them."""
    import torch.distributed as dist

    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, count, size)]
    return groups[rank // size] if rank < count else None


def _tell(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _threads(count: int) -> int:
    """Of each of so many ranks, as a launch deals cores unless the user does."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // count))


_MEASURED: dict[tuple[int, int], dict[str, Any]] = {}
"""(threads, ranks at once) -> what this rank measured."""


def _measure(count: int, groups: dict[int, Any], device: "torch.device", *, fewest: int) -> None:
    """What `count` ranks take for operations, for collectives and to meet; every shape with the fewest threads."""
    import torch
    import torch.distributed as dist

    (threads, at_once), rank = (1, 1) if device.type == "cuda" else _at_once(count), dist.get_rank()
    torch.set_num_threads(threads)

    def begin(part: str) -> None:
        if rank == 0:
            _tell({"begins": part})

    key = threads, at_once
    if rank < at_once and key not in _MEASURED:
        words = _words(threads, at_once)
        _MEASURED[key] = measured_device(device, brief=threads > fewest, begin=lambda part: begin(part + words))
    dist.barrier(groups[count])
    found: list[list[Any]] = []
    between = {"unsteady": 0.0, "unit_s": 0.0}
    for size, group in groups.items() if count > 1 else ():
        begin(f"collectives of {count} ranks in groups of {size}")
        found += [[name, size, *told] for name, *told in _collectives(size, group, groups[count], device=device)]
    if count > 1 and device.type == "cpu":
        begin(f"waiting of {count} ranks")
        turns, every = max(1.0, count / at_once), groups[count]
        between = {"unsteady": unsteadiness(every, turns=turns), "unit_s": turns * handled_s(every)}
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        said = {"device": name, "torch": torch.__version__, "threads": threads, "resident_bytes": kept}
        _tell({"ranks": count, **said, **_MEASURED[key], "collectives": found, **between})


def _at_once(count: int) -> tuple[int, int]:
    """Threads of each of so many ranks, and ranks that compute at the same time."""
    threads = _threads(count)
    return threads, min(count, max(1, len(os.sched_getaffinity(0)) // threads))


def _words(threads: int, at_once: int) -> str:
    return f", {threads} thread{'s' if threads > 1 else ''}" + (f", {at_once} ranks" if at_once > 1 else "")


def _collectives(size: int, group: Any, every: Any, *, device: "torch.device") -> list[list[Any]]:
    """[name, bytes in all, seconds] of each kind in groups of `size`, all at once; transfers go between two of each."""
    import torch
    import torch.distributed as dist

    found: list[list[Any]] = []
    for size_bytes in _SIZES:
        own = torch.zeros(size_bytes // 4 // size, device=device)
        whole, other = (torch.zeros(own.numel() * size, device=device) for _ in range(2))
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": partial(dist.all_reduce, whole, group=group),
            "all_gather": partial(dist.all_gather_into_tensor, whole, own, group=group),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, own, whole, group=group),
            "all_to_all": partial(dist.all_to_all_single, other, whole, group=group),
        }
        if size == 2:
            calls["send"] = partial(_there_and_back, dist.get_rank(), whole)
        for name, call in calls.items():
            found.append([name, size_bytes, _slowest_s(call, every, device) / (2 if name == "send" else 1)])
    return found


def _there_and_back(rank: int, whole: "torch.Tensor") -> None:
    """A transfer from each even rank to the next and back, all pairs at once."""
    import torch.distributed as dist

    if rank % 2 == 0:
        dist.send(whole, rank + 1)
        dist.recv(whole, rank + 1)
    else:
        dist.recv(whole, rank - 1)
        dist.send(whole, rank - 1)


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
