"""Pipelines on real ranks: against their closed forms, and against torch.distributed.pipelining.

emulated: blocks that sleep, every schedule on 4 and 8 ranks, step time over that of the simulated walk.
torch: the same llama, ranks and schedule in turn; two ranks of one thread each, forward and backward of all
micro-batches, no optimizer. Torch's stages are cut by hand, as its tutorial does; ours wrap the whole model.
tiny: blocks that take next to no time, so that what the runtimes do besides is compared.
`python -m benchmarks.pipeline [--json] [--rounds N] [--only emulated|torch|tiny]`
"""

import argparse
import json
import sys
from collections.abc import Callable
from statistics import geometric_mean, median
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
from benchmarks import pipeline_emulated, pipeline_tiny
from benchmarks.loops import batch_of, build_llama
from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.parallel.ranks import RankPool

__all__ = ["compare", "main", "measure"]

_PARTS = ("emulated", "torch", "tiny")
_RANKS = 2
_MICROBATCHES = 8
_LAYERS = 8
_PEERS = {
    "gpipe": (ScheduleGPipe, 1),
    "1f1b": (Schedule1F1B, 1),
    "interleaved": (ScheduleInterleaved1F1B, 2),
    "modular": (ScheduleLoopedBFS, _LAYERS // _RANKS),
}
Step = Callable[[], object]


class _Chunk(nn.Module):
    """Neighbouring layers of a llama, with the embedding before the first and the head after the last."""

    def __init__(self, model: Any, layers: range) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.model.layers[number] for number in layers)
        self.rotary = model.model.rotary_emb
        self.embedding = model.model.embed_tokens if layers.start == 0 else None
        last = layers.stop == len(model.model.layers)
        self.norm, self.head = (model.model.norm, model.lm_head) if last else (None, None)

    def forward(self, stream: Tensor) -> Tensor:
        """Token ids or the stream of the chunk before; gives the stream or scores."""
        if self.embedding is not None:
            stream = self.embedding(stream)
        positions = self.rotary(stream, torch.arange(stream.shape[1]).unsqueeze(0))
        for layer in self.layers:
            stream = layer(stream, attention_mask=None, position_embeddings=positions)
        return stream if self.norm is None or self.head is None else self.head(self.norm(stream))


def _loss(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def measure(rounds: int) -> dict[str, list[float]]:
    """One rank's seconds per step."""
    torch.set_num_threads(1)
    batch = batch_of(0, samples=_MICROBATCHES)
    contenders: dict[str, Step] = {}
    for name in _PEERS:
        contenders[f"ours {name}"] = _ours(name, batch)
        contenders[f"torch {name}"] = _torch(name, batch)
        contenders[f"torch {name} again"] = _torch(name, batch)
    return alternate(contenders, rounds=rounds, steps=2, warmup=2, sync=dist.barrier)


def _ours(name: str, batch: dict[str, Tensor]) -> Step:
    model = mw.parallelize(
        build_llama(layers=_LAYERS), mw.Mesh(pp=_RANKS), schedule=name, num_microbatches=_MICROBATCHES
    )
    return lambda: model.step(batch)


def _torch(name: str, batch: dict[str, Tensor]) -> Step:
    kind, loops = _PEERS[name]
    rank, model = dist.get_rank(), build_llama(layers=_LAYERS)
    number, each = loops * _RANKS, _LAYERS // (loops * _RANKS)
    stages = [
        PipelineStage(_Chunk(model, range(at * each, (at + 1) * each)), at, number, torch.device("cpu"))
        for at in range(rank, number, _RANKS)
    ]
    runs: Any = kind(stages[0] if loops == 1 else stages, _MICROBATCHES, loss_fn=_loss)  # type: ignore[operator]

    def step() -> None:
        for stage in stages:
            stage.submod.zero_grad()
        inputs = (batch["input_ids"],) if rank == 0 else ()
        target = {"target": batch["labels"]} if any(stage.is_last for stage in stages) else {}
        runs.step(*inputs, **target)

    return step


def compare(pool: RankPool, rounds: int) -> dict[str, Any]:
    """Seconds per step of both, and their ratios, by schedule."""
    times = pool.run(measure, _RANKS, (rounds,), timeout_s=1200.0)[0]
    ratios = {name: ratio_of(times[f"ours {name}"], times[f"torch {name}"]) for name in _PEERS}
    return {
        "median_step_s": {name: median(each) for name, each in times.items()},
        "ratio_to_torch": {name: each.median for name, each in ratios.items()},
        "half_width": {name: each.half_width for name, each in ratios.items()},
        "noise": {name: noise_of(times[f"torch {name}"], times[f"torch {name} again"]) for name in _PEERS},
    }


def main() -> None:
    """Runs the comparisons and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", choices=_PARTS, action="append", help="parts to run; all by default")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"rounds": arguments.rounds}
    pool = RankPool()
    try:
        for part in arguments.only or _PARTS:
            result |= _run(part, pool, arguments.rounds)
    finally:
        pool.close()
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _text(result))


def _run(part: str, pool: RankPool, rounds: int) -> dict[str, Any]:
    if part == "emulated":
        emulated = pipeline_emulated.compare(pool, steps=3)
        worst = max(each["ratio"] for each in emulated.values())
        return {"emulated": emulated, "worst_ratio_to_closed_form": worst}
    if part == "tiny":
        tiny = pipeline_tiny.compare(pool, rounds)
        return {
            "tiny": tiny,
            "action_ratio_to_torch": geometric_mean(each["ratio"] for each in tiny.values()),
            "action_ratio_as_scheduled": geometric_mean(each["ordinary_ratio"] for each in tiny.values()),
            "worst_action_ratio_to_torch": max(each["ratio"] for each in tiny.values()),
        }
    found = compare(pool, rounds)
    return {"torch": found, "worst_ratio_to_torch": max(found["ratio_to_torch"].values())}


def _text(result: dict[str, Any]) -> str:
    lines = []
    for name, each in result.get("emulated", {}).items():
        lines.append(
            f"{name:<18} {each['measured_s']:7.3f} s a step, {each['paper_s']:7.3f} s on paper: "
            f"{each['ratio']:.3f} (best {each['best_ratio']:.3f})"
        )
    if "torch" in result:
        found = result["torch"]
        lines += [f"{name:<18} {seconds * 1e3:8.1f} ms a step" for name, seconds in found["median_step_s"].items()]
        for name, ratio in found["ratio_to_torch"].items():
            width, noise = found["half_width"][name], found["noise"][name]
            lines.append(f"{name:<18} {ratio:.3f} +- {width:.3f} of torch's (A/A {noise:.3f})")
    for name, each in result.get("tiny", {}).items():
        lines.append(
            f"{name:<18} {each['ours_us']:7.1f} us an action, torch's {each['torch_us']:7.1f} us: "
            f"{each['ratio']:.3f} +- {each['half_width']:.3f} "
            f"(A/A {each['noise']:.3f}, processor {each['cpu_ratio']:.3f}; as scheduled "
            f"{each['ordinary_ratio']:.3f}, A/A {each['ordinary_noise']:.3f})"
        )
    lines += [f"{name} {value:.3f}" for name, value in result.items() if isinstance(value, float)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
