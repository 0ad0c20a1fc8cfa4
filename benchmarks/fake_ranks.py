"""Ranks run without values and without the others, beside the same ranks of real runs on gloo, and in large jobs.

`python -m benchmarks.fake_ranks [--json] [--large-only]`

Real ranks run two steps; calls and live bytes of the second are compared, call for call. The large job is a llama of 80
layers (width 1,024, 2,048 positions) on 1,024 ranks, of which one of the first, of the middle and of the last stage are
run. Its seconds are those of a processor, so that others on this machine do not count; its plan along `tp`, which is
proved with values, is made once for all ranks and is not among them.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import meshwright as mw
from benchmarks.loops import batch_of, build_llama
from benchmarks.mixtures import build_mixture, build_switch, even_routers
from meshwright.moe.bilevel import BiLevel
from meshwright.moe.capacity import Capacity
from meshwright.parallel.fake_rank import FakeRank, fake_rank
from meshwright.parallel.footprint import Live
from meshwright.parallel.ledger import Call, Ledger
from meshwright.parallel.options import Options
from meshwright.parallel.plan import make_plans
from meshwright.testing import run_ranks

__all__ = ["JOBS", "Job", "compared", "large_ranks", "paper_ranks", "real_rank", "real_ranks"]


@dataclass(frozen=True)
class Job:
    """A job of a few ranks.

    Args:
        degrees: of the mesh.
        options: of the wrap.
        build: makes its model, the same on every rank.
        samples: of each rank's share of a batch.
        length: positions.
        vocabulary: of their tokens.
    """

    degrees: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] = lambda: build_llama(256, 4, 1024)
    samples: int = 4
    length: int = 64
    vocabulary: int = 1024

    @property
    def mesh(self) -> mw.Mesh:
        """All ranks."""
        return mw.Mesh(**self.degrees)

    def batch(self, data_rank: int) -> dict[str, torch.Tensor]:
        """A rank's share."""
        return batch_of(data_rank, samples=self.samples, length=self.length, vocabulary=self.vocabulary)

    @property
    def wrap(self) -> dict[str, Any]:
        """Options and an example, one micro-batch."""
        number = self.options.get("num_microbatches", 1)
        example = {name: each[: self.samples // number] for name, each in self.batch(0).items()}
        return {"example": example, **self.options}


_LEVELS = BiLevel(num_nodes=2, num_local=4, k_local=2)
_FEW = BiLevel(
    num_nodes=2, num_local=4, node_capacity=Capacity(factor=0.9), capacity=Capacity(factor=0.8, order="score")
)
_SLICED = {"moe": mw.Experts(slices=2, overlap=True)}
_TWO_HOPS = {"moe": mw.Experts("inter_first")}
_PIPE = {"schedule": "1f1b", "num_microbatches": 4}
_MODULAR = {"schedule": "modular", "num_microbatches": 4}

_SPANS = {"blockwise": {"layer_block": 32, "loss_block": 64}}
_HOSTED = {"recompute": "blocks", "offload_inputs": True, "schedule": "layered", "num_microbatches": 2}
_SHALLOW = partial(build_llama, 256, 2, 1024)

JOBS = {
    "dp": Job({"dp": 2}),
    "dp, by spans": Job({"dp": 2}, _SPANS, _SHALLOW),
    "dp, by ffn_block": Job({"dp": 2}, {"blockwise": {"ffn_block": 32, "loss_block": 64}}, _SHALLOW),
    "dp, inputs in host memory": Job({"dp": 2}, _HOSTED, _SHALLOW),
    "fsdp, states in host memory": Job({"fsdp": 2}, {"offload": "cpu"}, _SHALLOW),
    "fsdp layered, by spans, inputs in host memory": Job({"fsdp": 2}, {**_HOSTED, **_SPANS}, _SHALLOW),
    "fsdp, stage 3": Job({"fsdp": 4}, {"num_microbatches": 2}),
    "fsdp, layered": Job({"dp": 2, "fsdp": 2}, {"schedule": "layered", "num_microbatches": 2}),
    "tp x dp": Job({"tp": 2, "dp": 2}),
    "pp modular x fsdp": Job({"pp": 2, "fsdp": 2}, _MODULAR),
    "cp ring": Job({"cp": 2}, {"cp_kind": "ring"}),
    "tp x pp": Job({"tp": 2, "pp": 2}, {**_PIPE, "sequence_parallel": True}),
    "pp x fsdp x tp": Job({"pp": 2, "fsdp": 2, "tp": 2}, _MODULAR),
    "ep": Job({"dp": 4, "ep": 4}, {"moe": mw.Experts()}, build_mixture),
    "ep, tokens once": Job({"dp": 4, "ep": 4, "ep_node": 2}, {"moe": mw.Experts()}, build_mixture),
    "ep bi-level": Job({"dp": 4, "ep": 4, "ep_node": 2}, _TWO_HOPS, partial(build_mixture, _LEVELS)),
    "ep bi-level, capacity": Job({"dp": 4, "ep": 4, "ep_node": 2}, _TWO_HOPS, partial(build_switch, _FEW)),
    "ep of modules": Job({"dp": 4, "ep": 4}, {"moe": mw.Experts("all_gather")}, build_switch),
    "ep x tp x pp": Job({"pp": 2, "tp": 2, "dp": 2, "ep": 4}, {"moe": mw.Experts(), **_PIPE}, build_mixture),
    "ep of slices x fsdp": Job(
        {"fsdp": 4, "ep": 2}, {"moe": mw.Experts(slices=2, overlap=True), "schedule": "layered"}, build_mixture
    ),
}


_STEPS = 3


def real_rank(job: Job) -> tuple[tuple[Call, ...], int]:
    """Calls of one step of this process as a rank of a job, after a first one, and the least peak bytes of a few.

    A thread of gloo that gets no core in time still holds what the step is done with: two steps alike are enough.
    """
    with Live() as live, ExitStack() as stack:
        model = job.build()
        stack.enter_context(even_routers(model))
        for each in (*model.parameters(), *model.buffers()):
            live.note(each.untyped_storage())
        wrapped = mw.parallelize(model, job.mesh, **job.wrap)
        batch = job.batch(wrapped.data_rank)
        wrapped.step(batch)
        peaks: list[int] = []
        while len(peaks) < _STEPS and not _alike(peaks):
            gc.collect()
            live.peak_bytes = live.now_bytes
            with Ledger(job.mesh, wrapped.rank) as ledger:
                wrapped.step(batch)
            peaks.append(live.peak_bytes)
    return ledger.calls, min(peaks)


def _alike(peaks: Sequence[int]) -> bool:
    """Whether the last two steps peaked the same on every rank; all ranks take as many steps."""
    if len(peaks) < 2:
        return False
    alike = torch.tensor(peaks[-1] == peaks[-2], dtype=torch.int32)
    dist.all_reduce(alike, dist.ReduceOp.MIN)
    return bool(alike)


def real_ranks(job: Job) -> list[tuple[tuple[Call, ...], int]]:
    """Calls and peak bytes of every rank of a job, run here."""
    return run_ranks(real_rank, job.mesh, job)


def paper_ranks(job: Job) -> Iterator[FakeRank]:
    """Every rank of a job on paper.

    Raises:
        WrapError: for what cannot be run without values.
    """
    model = job.build()
    plans = make_plans(model, job.mesh, Options.of(**job.wrap))
    for rank in range(job.mesh.world_size):
        batch = job.batch(job.mesh.data_rank(rank))
        yield fake_rank(model, job.mesh, rank, batch=batch, plans=plans, **job.wrap)


def compared(job: Job) -> list[tuple[FakeRank, tuple[Call, ...], int]]:
    """Every rank of a job on paper, and its calls and peak bytes in a real run."""
    return [(fake, *real) for fake, real in zip(paper_ranks(job), real_ranks(job), strict=True)]


LARGE = mw.Mesh(pp=16, fsdp=8, tp=8)
_LAYERS, _LENGTH, _MICROBATCHES = 80, 2048, 16


def large_ranks(ranks: Sequence[int]) -> Iterator[tuple[FakeRank, float]]:
    """Some ranks of the large job, and the processor's seconds of each."""
    model = mw.deferred(lambda: build_llama(1024, _LAYERS, 32000, 4096))
    options: dict[str, Any] = {"num_microbatches": _MICROBATCHES, "schedule": "modular", "sequence_parallel": True}
    options["example"] = batch_of(0, samples=1, length=16)
    plans = make_plans(model, LARGE, Options.of(**options))
    batch = {name: torch.zeros(_MICROBATCHES, _LENGTH, dtype=torch.long) for name in ("input_ids", "labels")}
    for rank in ranks:
        start_s = time.process_time()
        yield fake_rank(model, LARGE, rank, batch=batch, plans=plans, **options), time.process_time() - start_s


def _row(job: Job) -> dict[str, Any]:
    found = compared(job)
    ratios = [fake.memory.peak_bytes / peak_bytes for fake, _, peak_bytes in found]
    return {
        "ranks": len(found),
        "equal": sum(fake.calls == calls for fake, calls, _ in found),
        "calls": sum(len(calls) for _, calls, _ in found),
        "worst_memory_ratio": max(ratios, key=lambda each: abs(each - 1)),
    }


def main() -> None:
    """Prints the comparison, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--large-only", action="store_true", help="leave out the comparison with real ranks")
    arguments = parser.parse_args()
    jobs = {} if arguments.large_only else {name: _row(job) for name, job in JOBS.items()}
    large = [
        {"rank": fake.rank, "calls": len(fake.calls), "peak_bytes": fake.memory.peak_bytes, "seconds": seconds}
        for fake, seconds in large_ranks((0, LARGE.world_size // 2, LARGE.world_size - 1))
    ]
    if arguments.json:
        sys.stdout.write(json.dumps({"jobs": jobs, "large": large}) + "\n")
        return
    for name, row in jobs.items():
        equal = f"{row['equal']} of {row['ranks']} ranks call the same ({row['calls']} calls)"
        sys.stdout.write(f"{name:<20} {equal}, memory x {row['worst_memory_ratio']:.4f} at worst\n")
    for row in large:
        words = f"{row['calls']} calls, peak {row['peak_bytes'] / 2**30:.2f} GiB, {row['seconds']:.1f} s"
        sys.stdout.write(f"rank {row['rank']} of {LARGE.world_size}: {words}\n")


if __name__ == "__main__":
    main()
