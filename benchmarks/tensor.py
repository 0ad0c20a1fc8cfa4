"""A step of one llama dealt over two ranks: ours, torch's DTensor plan, transformers' own tp, DeepSpeed's AutoTP.

All contenders train the same 6-layer, 512-wide llama on the same batch, in one set of processes, in turn. One that
does not run here is named with its error. Also: what wrapping without `tp` costs, and the peak memory of a step, as
the process's allocator counted it, against what the report predicted.
`python -m benchmarks.tensor [--json] [--rounds N]`
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import meshwright as mw
from benchmarks.loops import batch_of, build_llama, deepspeed_step, our_step
from benchmarks.memory import measured_peak_bytes
from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.parallel.ranks import RankPool

__all__ = ["main", "measure"]

_RANKS = 2
_WIDTH = 512
_VOCABULARY = 4096


def _llama() -> nn.Module:
    return build_llama(hidden=_WIDTH, layers=6, vocabulary=_VOCABULARY, intermediate=1408)


def _trained(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    kinds = [[each for each in model.parameters() if isinstance(each, DTensor) is dealt] for dealt in (True, False)]
    groups = [{"params": kind} for kind in kinds if kind]  # one fused update does not take both kinds
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def _torch_step(batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    """torch's plan as its tutorial on llama writes it; embedding and head stay whole."""
    model = _llama()
    columns = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel())
    columns |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ColwiseParallel())
    plan = {**columns, **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel())}
    for layer in model.model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, init_device_mesh("cpu", (_RANKS,)), plan)  # type: ignore[arg-type]
    return _trained(model, batch)


def _transformers_step(batch: dict[str, torch.Tensor], folder: str) -> Callable[[], object]:
    from transformers import AutoModelForCausalLM

    if dist.get_rank() == 0:
        _llama().save_pretrained(folder)  # type: ignore[operator]
    dist.barrier()
    return _trained(AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32), batch)


def measure(rounds: int, folder: str) -> dict[str, Any]:
    """Seconds per step of each contender on this rank, and errors of those that do not run."""
    batch = batch_of(0, samples=4, length=128, vocabulary=_VOCABULARY)
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "ours": lambda: our_step(_llama(), mw.Mesh(tp=_RANKS), batch, example=batch),
        "ours again": lambda: our_step(_llama(), mw.Mesh(tp=_RANKS), batch, example=batch),
        "torch": lambda: _torch_step(batch),
        "transformers": lambda: _transformers_step(batch, folder),
        "DeepSpeed": lambda: deepspeed_step(_llama(), batch, 0, tensor_ranks=_RANKS),
    }
    steps: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            steps[name] = make()
            steps[name]()
        except Exception as error:  # a peer that does not run here is reported, not hidden
            steps.pop(name, None)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        dist.barrier()
    return {"times": alternate(steps, rounds=rounds, steps=2, sync=dist.barrier), "missing": missing}


def _alone(rounds: int) -> dict[str, list[float]]:
    """One rank without tp: what the wrapper costs."""
    batch = batch_of(0, samples=4, length=128, vocabulary=_VOCABULARY)
    contenders = {
        "wrapped": our_step(_llama(), mw.Mesh(), batch),
        "bare": _trained(_llama(), batch),
        "bare again": _trained(_llama(), batch),
    }
    return alternate(contenders, rounds=rounds, steps=2)


def _memory(options: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of a step on two ranks: predicted by the report, and measured on this one."""
    batch = batch_of(0, samples=4, length=128, vocabulary=_VOCABULARY)
    model = mw.parallelize(_llama(), mw.Mesh(tp=_RANKS), example=batch, predict_memory=True, **options)
    measured_bytes = measured_peak_bytes(model.module, lambda: model.step(batch))
    memory = model.report.memory
    assert memory is not None, model.report.notes
    return {"predicted_bytes": memory.peak_bytes, "measured_bytes": measured_bytes}


def _result(rounds: int) -> dict[str, Any]:
    pool = RankPool()
    try:
        with tempfile.TemporaryDirectory(prefix="meshwright-bench-") as folder:
            found = pool.run(measure, _RANKS, (rounds, folder), timeout_s=1800.0)[0]
        memory = {
            name: pool.run(_memory, _RANKS, (options,), timeout_s=600.0)
            for name, options in (("tp", {}), ("tp, dealt sequence", {"sequence_parallel": True}))
        }
        alone = pool.run(_alone, 1, (rounds,), timeout_s=1800.0)[0]
    finally:
        pool.close()
    times = found["times"]
    peers = [name for name in times if not name.startswith("ours")]
    ratios = {name: ratio_of(times["ours"], times[name]).median for name in peers}
    return {
        "rounds": rounds,
        "median_step_s": {name: median(each) for name, each in {**times, **alone}.items()},
        "ratio_to": ratios,
        "worst_ratio_to_fastest": max(ratios.values(), default=float("nan")),
        "noise": noise_of(times["ours"], times["ours again"]),
        "wrapper_overhead": ratio_of(alone["wrapped"], alone["bare"]).median,
        "wrapper_noise": noise_of(alone["bare"], alone["bare again"]),
        "memory": memory,
        "worst_memory_error": max(
            abs(each["predicted_bytes"] / each["measured_bytes"] - 1) for ranks in memory.values() for each in ranks
        ),
        "not_run": found["missing"],
    }


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    result = _result(arguments.rounds)
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name, seconds in result["median_step_s"].items():
        sys.stdout.write(f"{name:<14} {seconds * 1e3:8.1f} ms a step\n")
    for name, ratio in result["ratio_to"].items():
        sys.stdout.write(f"ours / {name:<12} {ratio:.3f}\n")
    sys.stdout.write(f"noise {result['noise']:.3f}   wrapper without tp {result['wrapper_overhead']:.3f}")
    sys.stdout.write(f" (noise {result['wrapper_noise']:.3f})\n")
    for name, ranks in result["memory"].items():
        for rank, each in enumerate(ranks):
            predicted_mb, measured_mb = each["predicted_bytes"] / 1e6, each["measured_bytes"] / 1e6
            sys.stdout.write(f"memory, {name}, rank {rank}: predicted {predicted_mb:.1f} MB, {measured_mb:.1f} MB\n")
    for name, error in result["not_run"].items():
        sys.stdout.write(f"not run: {name}: {error}\n")


if __name__ == "__main__":
    main()
