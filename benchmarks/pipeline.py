"""Step time of our pipelines against torch.distributed.pipelining: same llama, same ranks, same schedule, in turn.

Two ranks of one thread each, forward and backward of all micro-batches, no optimizer. Torch's stages are cut by hand,
as its tutorial does; ours wrap the whole model.
`python -m benchmarks.pipeline [--json] [--rounds N]`
"""

import argparse
import json
import sys
from collections.abc import Callable
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
from benchmarks.loops import batch_of, build_llama
from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.parallel.ranks import RankPool

__all__ = ["main", "measure"]

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
    contenders["torch gpipe again"] = _torch("gpipe", batch)
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


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    pool = RankPool()
    try:
        times = pool.run(measure, _RANKS, (arguments.rounds,), timeout_s=1200.0)[0]
    finally:
        pool.close()
    ratios = {name: ratio_of(times[f"ours {name}"], times[f"torch {name}"]) for name in _PEERS}
    result = {
        "rounds": arguments.rounds,
        "median_step_s": {name: median(each) for name, each in times.items()},
        "ratio_to_torch": {name: each.median for name, each in ratios.items()},
        "half_width": {name: each.half_width for name, each in ratios.items()},
        "worst_ratio_to_torch": max(each.median for each in ratios.values()),
        "noise": noise_of(times["torch gpipe"], times["torch gpipe again"]),
    }
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _text(result))


def _text(result: dict[str, Any]) -> str:
    lines = [f"{name:<20} {seconds * 1e3:8.1f} ms a step" for name, seconds in result["median_step_s"].items()]
    lines += [f"{name:<20} {ratio:.3f} of torch's" for name, ratio in result["ratio_to_torch"].items()]
    return "\n".join([*lines, f"{'noise (A/A)':<20} {result['noise']:.3f}"]) + "\n"


if __name__ == "__main__":
    main()
