"""What an action costs besides its block: our runtime and torch.distributed.pipelining's on blocks that take no time.

The same layers of width 8, the same schedule, on one rank with several stages and on two ranks. Torch's stages are
single layers or runs of them, cut by hand; ours wrap the whole model.

Gloo hands messages on in a thread of its own, which asks again and again for a lock that the main thread holds while it
writes. Where both share a core and the writer was displaced, that takes until the scheduler's next turn: 3 ms, several
times a step, for either runtime, by chance (docs/decisions/0013). Steps are therefore timed twice: as the machine
schedules these threads, and with gloo's giving way, where only the runtimes differ.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.nn import functional

import meshwright as mw
from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.parallel.ranks import RankPool

__all__ = ["compare", "measure", "our_step", "torch_step"]

MICROBATCHES = 16
LAYERS = 8
WIDTH = 8
_KINDS: dict[str, Any] = {
    "layered": ScheduleLoopedBFS,
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "modular": ScheduleLoopedBFS,
}
CASES = (("layered", 1, LAYERS), ("gpipe", 2, 1), ("1f1b", 2, 1), ("interleaved", 2, 2), ("modular", 2, LAYERS // 2))
"""Schedule, ranks, and stages of each rank."""

Step = Callable[[], object]


class Tiny(nn.Module):
    """Layers one after the other and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, values: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error (0-dim)."""
        for layer in self.layers:
            values = layer(values)
        return functional.mse_loss(values, targets)


def tiny_batch() -> dict[str, Tensor]:
    """One sample for each micro-batch."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(MICROBATCHES, WIDTH, generator=generator) for name in ("values", "targets")}


def our_step(name: Any, ranks: int) -> Step:
    """One step of ours."""
    model = mw.parallelize(Tiny(), mw.Mesh(pp=ranks), schedule=name, num_microbatches=MICROBATCHES, loss="sample_mean")
    batch = tiny_batch()
    return lambda: model.step(batch)


def torch_step(name: str, ranks: int, loops: int) -> Step:
    """One step of torch's runtime."""
    rank, layers, number = dist.get_rank(), Tiny().layers, ranks * loops
    each = LAYERS // number
    stages = [
        PipelineStage(nn.Sequential(*layers[at * each : (at + 1) * each]), at, number, torch.device("cpu"))
        for at in range(rank, number, ranks)
    ]
    single = name in ("gpipe", "1f1b")
    runs = _KINDS[name](stages[0] if single else stages, MICROBATCHES, loss_fn=functional.mse_loss)
    batch = tiny_batch()

    def step() -> None:
        for stage in stages:
            stage.submod.zero_grad()
        inputs = (batch["values"],) if rank == 0 else ()
        runs.step(*inputs, **({"target": batch["targets"]} if stages[-1].is_last else {}))

    return step


@contextmanager
def gloo_gives_way() -> Iterator[None]:
    """Inside, gloo's threads of this process never displace others, whatever they wait for."""
    threads = [
        int(each.name)
        for each in Path("/proc/self/task").iterdir()
        if (each / "comm").read_text().startswith("gloo_tcp_loop")
    ]
    before = {each: os.sched_getscheduler(each) for each in threads}
    try:
        for each in threads:
            os.sched_setscheduler(each, os.SCHED_IDLE, os.sched_param(0))
        yield
    finally:
        for each, policy in before.items():
            os.sched_setscheduler(each, policy, os.sched_param(0))


Seconds = dict[str, list[float]]


def measure(name: str, loops: int, rounds: int) -> tuple[Seconds, Seconds, Seconds]:
    """One rank's seconds per step with gloo giving way, those of its processor, and those of ordinary scheduling."""
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    used: Seconds = {}
    contenders = {
        "ours": our_step(name, ranks),
        "torch": torch_step(name, ranks, loops),
        "torch again": torch_step(name, ranks, loops),
    }
    counted = {each: _counting(step, used.setdefault(each, [])) for each, step in contenders.items()}
    ordinary = alternate(contenders, rounds=rounds, steps=4, warmup=4, sync=dist.barrier)
    with gloo_gives_way():
        return alternate(counted, rounds=rounds, steps=4, warmup=4, sync=dist.barrier), used, ordinary


def _counting(step: Step, used: list[float]) -> Step:
    """The same step, noting what processor time it takes."""

    def counted() -> None:
        start_s = time.process_time()
        step()
        used.append(time.process_time() - start_s)

    return counted


def compare(pool: RankPool, rounds: int) -> dict[str, Any]:
    """Microseconds per action of both, and their ratios, by schedule and ranks."""
    found: dict[str, Any] = {}
    for name, ranks, loops in CASES:
        by_rank = pool.run(measure, ranks, (name, loops, rounds), timeout_s=600.0)
        times = by_rank[0][0]
        ratio = ratio_of(times["ours"], times["torch"])
        actions = 2 * loops * MICROBATCHES  # forwards and backwards of one rank
        used_s = {each: sum(median(used[each]) for _, used, _ in by_rank) for each in ("ours", "torch")}
        ordinary = by_rank[0][2]
        found[f"{name} on {ranks}"] = {
            "ratio": ratio.median,
            "half_width": ratio.half_width,
            "noise": noise_of(times["torch"], times["torch again"]),
            "cpu_ratio": used_s["ours"] / used_s["torch"],
            "ordinary_ratio": ratio_of(ordinary["ours"], ordinary["torch"]).median,
            "ordinary_noise": noise_of(ordinary["torch"], ordinary["torch again"]),
            "ours_us": median(times["ours"]) / actions * 1e6,
            "torch_us": median(times["torch"]) / actions * 1e6,
        }
    return found
