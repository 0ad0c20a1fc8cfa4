"""ZeRO-3 over a slow network: layered accumulation against FSDP2 and DeepSpeed, same model, batch and processes.

Two ranks in two network namespaces whose link is slow enough that states take several times the compute of one
micro-batch; needs root and iproute2. The limit is what takes longer when done alone: all collectives of a layered step
back to back, or the layered step without any.
`python -m benchmarks.layered [--json] [--rounds N] [--rate MBIT_PER_S]`
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import meshwright as mw
from benchmarks.link import addresses, missing, slow_link
from benchmarks.loops import batch_of, build_llama
from benchmarks.timing import alternate
from meshwright.parallel.ledger import LedgerSummary
from meshwright.parallel.microbatch import split

__all__ = ["main", "measure"]

MICROBATCHES = 8
_MODEL = {"hidden": 256, "layers": 12, "vocabulary": 256}
Step = Callable[[], object]


def measure(rounds: int) -> dict[str, Any]:
    """One rank's seconds per step, and what the layered step sent."""
    batch = batch_of(dist.get_rank(), samples=MICROBATCHES, length=128, vocabulary=_MODEL["vocabulary"])
    ours = mw.parallelize(build_llama(**_MODEL), mw.Mesh(fsdp=2), schedule="layered", num_microbatches=MICROBATCHES)
    ours.step(batch)
    _, counted = ours.ledger_step(batch)
    contenders: dict[str, Step] = {
        "layered": lambda: ours.step(batch),
        "collectives alone": _replay(counted),
        "compute alone": _alone(batch),
        "FSDP2": _fsdp2(batch, reduce_once=False),
        "FSDP2, reduced once": _fsdp2(batch, reduce_once=True),
        "DeepSpeed ZeRO-3": _deepspeed(batch),
    }
    times = alternate(contenders, rounds=rounds, steps=1, warmup=1, sync=dist.barrier)
    return {"times": times, "layered_sent_bytes": float(counted.sent_bytes())}


def _replay(counted: LedgerSummary) -> Step:
    """The collectives of a step on tensors of the same sizes, one right after the other."""
    buffers: list[tuple[str, Tensor, Tensor]] = []
    for call, number in counted.calls:
        whole = torch.zeros(call.payload_bytes // 4)
        buffers += [(call.kind, whole, torch.zeros(whole.numel() // 2))] * number

    def step() -> None:
        pending = []
        for kind, whole, part in buffers:
            if kind == "all_gather":
                pending.append(dist.all_gather_into_tensor(whole, part, async_op=True))
            elif kind == "reduce_scatter":
                pending.append(dist.reduce_scatter_tensor(part, whole, async_op=True))
            else:
                pending.append(dist.all_reduce(whole, async_op=True))
        for each in pending:
            each.wait()

    return step


def _alone(batch: dict[str, Tensor]) -> Step:
    """Forward and backward of every micro-batch, by hand, without anybody else."""
    model = build_llama(**_MODEL)
    parts = split(batch, MICROBATCHES)

    def step() -> None:
        model.zero_grad()
        for part in parts:
            (model(**part).loss / MICROBATCHES).backward()

    return step


def _fsdp2(batch: dict[str, Tensor], *, reduce_once: bool) -> Step:
    model: Any = build_llama(**_MODEL)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule), type(model)
    parts = split(batch, MICROBATCHES)

    def step() -> None:
        model.zero_grad()
        for number, part in enumerate(parts):
            last = number == MICROBATCHES - 1
            model.set_requires_gradient_sync(last or not reduce_once)
            (model(**part).loss / MICROBATCHES).backward()

    return step


def _deepspeed(batch: dict[str, Tensor]) -> Step:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an inference kernel, compiled at first use
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICROBATCHES,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    model = build_llama(**_MODEL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    parts = split(batch, MICROBATCHES)

    def step() -> None:
        for part in parts:
            engine.backward(engine(**part).loss)
            engine.step()

    return step


def main() -> None:
    """Makes the link, starts a rank on each side, prints what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=160.0, help="of the link, in Mbit/s each way")
    parser.add_argument("--rank-of", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        _rank(arguments.rank_of, arguments.rounds)
        return
    reason = missing()
    if reason is not None:
        sys.stdout.write(f"skipped: {reason}\n")
        return
    found = _on_both_sides(arguments.rate, arguments.rounds)
    middle = {name: median(each) for name, each in found["times"].items()}
    limit_s = max(middle["collectives alone"], middle["compute alone"])
    result = {
        "rounds": arguments.rounds,
        "rate_mbit_s": arguments.rate,
        "median_step_s": middle,
        "layered_sent_bytes": found["layered_sent_bytes"],
        "speedup_over_fsdp2": middle["FSDP2"] / middle["layered"],
        "speedup_over_fsdp2_reduced_once": middle["FSDP2, reduced once"] / middle["layered"],
        "speedup_over_deepspeed": middle["DeepSpeed ZeRO-3"] / middle["layered"],
        "communication_over_compute": middle["collectives alone"] / middle["compute alone"],
        "ratio_to_limit": middle["layered"] / limit_s,
    }
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _text(result))


def _rank(address: str, rounds: int) -> None:
    torch.set_num_threads(1)
    rank = addresses().index(address)
    os.environ["LOCAL_RANK"] = "0"  # one rank on each host
    dist.init_process_group("gloo", init_method=f"tcp://{addresses()[0]}:29411", rank=rank, world_size=2)
    found = measure(rounds)
    if rank == 0:
        Path(os.environ["MEASURED"]).write_text(json.dumps(found))
    dist.destroy_process_group()


def _on_both_sides(rate_mbit_s: float, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, slow_link(rate_mbit_s) as hosts:
        out = Path(folder) / "measured.json"
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "MEASURED": str(out), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [*host, sys.executable, "-m", "benchmarks.layered", "--rounds", str(rounds), "--rank-of", address],
                env=environment,
                stdout=sys.stderr,
            )
            for host, address in zip(hosts, addresses(), strict=True)
        ]
        if any([each.wait() for each in ranks]):
            raise SystemExit("a rank failed; its error is above")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _text(result: dict[str, Any]) -> str:
    lines = [f"{name:<20} {seconds:8.2f} s a step" for name, seconds in result["median_step_s"].items()]
    lines += [f"{name:<34} {value:.2f}" for name, value in result.items() if isinstance(value, float)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
