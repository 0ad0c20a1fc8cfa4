"""Step time of our `dp` and `fsdp` against DDP, plain FSDP2 and DeepSpeed ZeRO-3, and bytes against the formulas.

All contenders run in the same processes, in turn; every step is forward, backward and AdamW on the same llama.
`python -m benchmarks.data [--json] [--rounds N]`
"""

import argparse
import json
import sys
from typing import Any

import torch.distributed as dist

import meshwright as mw
from benchmarks.loops import batch_of, build_llama, ddp_step, deepspeed_step, fsdp2_step, our_model, our_step
from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.parallel.ranks import RankPool

__all__ = ["main", "measure"]

_RANKS = 2


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """One rank's measurement; the figures of rank 0 are reported."""
    rank = dist.get_rank()
    batch = batch_of(rank)
    dp, fsdp = mw.Mesh(dp=_RANKS), mw.Mesh(fsdp=_RANKS)
    contenders = {
        "ours dp": our_step(build_llama(), dp, batch),
        "ours fsdp": our_step(build_llama(), fsdp, batch),
        "DDP": ddp_step(build_llama(), batch),
        "DDP again": ddp_step(build_llama(), batch),
        "FSDP2": fsdp2_step(build_llama(), batch, _RANKS),
        "FSDP2 again": fsdp2_step(build_llama(), batch, _RANKS),
        "DeepSpeed ZeRO-3": deepspeed_step(build_llama(), batch, 3),
    }
    times = alternate(contenders, rounds=rounds, steps=steps, sync=dist.barrier)
    return {"times": times, "bytes": {str(mesh): _bytes(mesh, batch) for mesh in (dp, fsdp)}}


def _bytes(mesh: mw.Mesh, batch: dict[str, Any]) -> dict[str, Any]:
    """Bytes of one step by the ledger and by the report's formulas."""
    model, _ = our_model(build_llama(), mesh)
    model.step(batch)
    _, counted = model.ledger_step(batch)
    predicted = model.report.collectives
    assert predicted is not None, "data_engine='torch' predicts"
    return {
        "sent_bytes": float(counted.sent_bytes()),
        "formula_bytes": float(predicted.sent_bytes()),
        "calls": counted.count(),
        "equal": counted == predicted,
    }


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    pool = RankPool()
    try:
        found = pool.run(measure, _RANKS, (arguments.rounds, arguments.steps), timeout_s=1200.0)[0]
    finally:
        pool.close()
    times = found["times"]
    ratios = {
        "dp_over_ddp": ratio_of(times["ours dp"], times["DDP"]),
        "fsdp_over_fsdp2": ratio_of(times["ours fsdp"], times["FSDP2"]),
        "fsdp_over_deepspeed_zero3": ratio_of(times["ours fsdp"], times["DeepSpeed ZeRO-3"]),
    }
    noise = max(noise_of(times["DDP"], times["DDP again"]), noise_of(times["FSDP2"], times["FSDP2 again"]))
    result = {
        "rounds": arguments.rounds,
        "median_step_s": {name: sorted(each)[len(each) // 2] for name, each in times.items()},
        **{name: ratio.median for name, ratio in ratios.items()},
        "half_width": {name: ratio.half_width for name, ratio in ratios.items()},
        "noise": noise,
        "bytes": found["bytes"],
    }
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _text(result))


def _text(result: dict[str, Any]) -> str:
    lines = [f"{name:<18} {seconds * 1e3:8.1f} ms a step" for name, seconds in result["median_step_s"].items()]
    lines += [f"{name:<28} {result[name]:.3f}" for name in result["half_width"]]
    lines += [f"{'noise (A/A)':<28} {result['noise']:.3f}"]
    for mesh, row in result["bytes"].items():
        verdict = "equal to the formula" if row["equal"] else f"NOT the formula's {row['formula_bytes']:,.0f}"
        lines.append(f"{mesh}: {row['sent_bytes']:,.0f} bytes sent a step in {row['calls']} calls, {verdict}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
