"""From command to the end of the first step, and the steady step, against other launchers with loops written by hand.

All start the quickstart's llama on two nodes, a rank each; launches alternate. The nodes are pretended on loopback, or,
by `--hosts` and as root, two hosts with sshd. torchrun, deepspeed and accelerate start the same loop (see
`benchmarks.launch_peers`); one that is not installed is left out, and said. The steady step is timed in one set of
processes, in turn, against DDP and FSDP2 (see `benchmarks.loops`), the better of which counts.
`python -m benchmarks.launch [--json] [--rounds N] [--hosts]`
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

import meshwright as mw
from benchmarks.launch_nodes import Nodes, here_environment, hosts, loopback
from benchmarks.launch_peers import PEERS, first_step_s, missing
from benchmarks.loops import batch_of, build_llama, ddp_step, fsdp2_step, our_step
from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.parallel.ranks import RankPool

__all__ = ["main", "steady"]

_JOB = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
_RANKS = 2
_STEPS = 2


def _ours_s(folder: Path, nodes: Nodes) -> float:
    """Seconds from our command to the end of the first step."""
    settings = {
        "train.steps": _STEPS,
        "train.log_every_steps": 1,
        "data.validation_fraction": 0,
        "train.validate_every_steps": "null",
        "checkpoint.dir": folder / "checkpoints",
        "logs.dir": folder / "run",
        **nodes.settings,
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    start_s = time.time()
    _run([sys.executable, "-m", "meshwright.launch.cli", "launch", str(_JOB), *overrides], nodes)
    lines = next(folder.rglob("metrics.jsonl")).read_text().splitlines()
    first = next(record for record in map(json.loads, lines) if record.get("step") == 1 and "loss" in record)
    return float(first["time_unix_s"]) - start_s


def _first_s(name: str, folder: Path, nodes: Nodes) -> float:
    """Seconds to the end of the first step, of one launch."""
    return _ours_s(folder, nodes) if name == "ours" else first_step_s(name, folder, nodes=nodes, job=_JOB, steps=_STEPS)


def _cpu_s() -> float:
    """Of all launches so far, to their ends; what else the machine does hardly changes it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(command: list[str], nodes: Nodes) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=here_environment(nodes), check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )


def steady(rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each contender on this rank."""
    batch = batch_of(dist.get_rank())
    contenders = {
        "ours": our_step(build_llama(), mw.Mesh(dp=_RANKS), batch),
        "DDP": ddp_step(build_llama(), batch),
        "DDP again": ddp_step(build_llama(), batch),
        "FSDP2": fsdp2_step(build_llama(), batch, _RANKS),
    }
    return alternate(contenders, rounds=rounds, steps=3, sync=dist.barrier)


def _measure(rounds: int, steady_rounds: int, nodes: Nodes) -> dict[str, Any]:
    peers = [name for name in PEERS if name not in missing()]
    firsts: dict[str, list[float]] = {name: [] for name in ("ours", "ours again", *peers, "torchrun again")}
    cpu: dict[str, list[float]] = {name: [] for name in firsts}
    for turn in range(rounds):
        names = list(firsts)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with tempfile.TemporaryDirectory(prefix="meshwright-bench-") as folder:
                before_s = _cpu_s()
                firsts[name].append(_first_s(name.removesuffix(" again"), Path(folder), nodes))
                cpu[name].append(_cpu_s() - before_s)
    pool = RankPool()
    try:
        times = pool.run(steady, _RANKS, (steady_rounds,), timeout_s=1200.0)[0]
    finally:
        pool.close()
    fastest = min(peers, key=lambda name: median(firsts[name]))
    better = min(("DDP", "FSDP2"), key=lambda name: median(times[name]))
    return {
        "nodes": nodes.name,
        "first_step_s": {name: median(seconds) for name, seconds in firsts.items()},
        "first_step_ratios": {name: ratio_of(firsts["ours"], firsts[name]).median for name in peers},
        "first_step_ratio": ratio_of(firsts["ours"], firsts[fastest]).median,
        "first_step_against": fastest,
        "launch_cpu_s": {} if nodes.typed[0] else {name: median(seconds) for name, seconds in cpu.items()},
        "left_out": missing(),
        "first_step_noise": noise_of(firsts["torchrun"], firsts["torchrun again"]),
        "step_s": {name: median(seconds) for name, seconds in times.items()},
        "step_ratio": ratio_of(times["ours"], times[better]).median,
        "step_against": better,
        "noise": noise_of(times["DDP"], times["DDP again"]),
    }


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=5, help="launches of each kind")
    parser.add_argument("--steady-rounds", type=int, default=16)
    parser.add_argument("--hosts", action="store_true", help="on two hosts with sshd, as root")
    arguments = parser.parse_args()
    for name in missing():
        sys.stderr.write(f"LEFT OUT: {name} is not installed here\n")
    with hosts() if arguments.hosts else loopback() as nodes:
        result = _measure(arguments.rounds, arguments.steady_rounds, nodes)
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for part in ("first_step_s", "launch_cpu_s", "step_s"):
        for name, seconds in result[part].items():
            sys.stdout.write(f"{part:<13} {name:<15} {seconds:8.3f} s\n")
    for name, ratio in result["first_step_ratios"].items():
        sys.stdout.write(f"first_step ours / {name:<16} {ratio:8.3f}\n")
    for name in ("first_step_ratio", "first_step_noise", "step_ratio", "noise"):
        sys.stdout.write(f"{name:<29} {result[name]:8.3f}\n")


if __name__ == "__main__":
    main()
