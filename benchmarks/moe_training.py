"""The loss of a small language model under Switch routing, bi-level routing and without experts; several seeds.

A llama of width 64 and 2 layers on the bytes of Python's standard library. Its feed-forward networks are 8 experts of
which a token visits one: by one gate over all (Switch), or by a gate over 4 nodes and a gate over 2 experts of a node
(bi-level); or one network of an expert's size. Runs of a seed begin with equal weights, except for gates, and see
the same text. The loss that is compared is of held-out text, after the last step; curves are of training.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.loops import build_llama
from benchmarks.moe_layers import Network, OurLayer, Sizes, weights_of
from benchmarks.sections import aligned
from meshwright.launch.worker.corpus import STDLIB, read_documents, split_documents
from meshwright.moe.axes import ExpertAxes, RowAxis
from meshwright.moe.balance import balance_loss, tally
from meshwright.moe.bilevel import BiLevel, BiLevelRouting
from meshwright.moe.level_balance import bilevel_loss, tally_levels
from meshwright.moe.routing import Routing
from meshwright.moe.top_k import TopK
from meshwright.parallel.plotting import pyplot_for
from meshwright.parallel.ranks import RankPool

__all__ = ["compare", "text", "train"]

ROUTINGS = ("Switch", "bi-level", "no experts")
SEEDS = 5
STEPS = 800
_PROCESSES = 2
_ALONE = ExpertAxes(*[RowAxis(None, 0, 1)] * 3)
_SIZES = Sizes(tokens=2048, width=64, inner=128, experts=8, k=1)
_NODES, _LAYERS, _VOCABULARY, _LENGTH, _SAMPLES = 4, 2, 256, 128, 16
_PEAK_RATE, _WARMUP_STEPS = 4e-3, 40
_BALANCE = 0.01  # of Switch; half of it for each of two levels, as in SMILE
_SMOOTHED = 25  # steps of a point of a curve


class _Routed(nn.Module):
    """Experts in the place of a network; keeps its last routing for the balance loss."""

    def __init__(self, router: TopK | BiLevel, seed: int) -> None:
        super().__init__()
        self.layer = OurLayer(_SIZES, _ALONE, router=router, kind="one_hop")
        _draw([self.layer.up, self.layer.down, self.layer.gate], seed)
        self.last: Routing | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """[batch, positions, d] -> the same."""
        tokens = inputs.flatten(0, 1)
        self.last = self.layer.route(tokens)
        return self.layer.carry(tokens, self.last).view_as(inputs)

    def balance(self) -> Tensor:
        """The balance loss of the last forward."""
        assert self.last is not None
        if isinstance(self.last, BiLevelRouting):
            return bilevel_loss(tally_levels(self.last), nodes=_BALANCE / 2, local=_BALANCE / 2)
        return _BALANCE * balance_loss(tally(self.last), "switch")


def _draw(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in parameters:
            each.normal_(std=0.02, generator=generator)


def _model(routing: str, seed: int) -> nn.Module:
    model: Any = build_llama(_SIZES.width, _LAYERS, _VOCABULARY, _SIZES.inner, seed=seed)
    for number, block in enumerate(model.model.layers):
        if routing == "no experts":
            network = Network(*(each[0] for each in weights_of(_SIZES)[1:]))
            _draw([network.up, network.down], seed * _LAYERS + number)
            block.mlp = network
            continue
        flat = TopK(num_experts=_SIZES.experts, k=1)
        levels = BiLevel(num_nodes=_NODES, num_local=_SIZES.experts // _NODES)
        block.mlp = _Routed(flat if routing == "Switch" else levels, seed * _LAYERS + number)
    assert isinstance(model, nn.Module), type(model)
    return model


def _texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on and held-out ones."""
    parts = split_documents(read_documents(STDLIB, max_bytes=1 << 22), 0.1)
    joined = [b"".join(document.content for document in part) for part in parts]
    training, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in joined)
    return training, held_out


def _batches(source: Tensor, seed: int) -> Iterator[Tensor]:
    """Endless [samples, length] of random places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(source) - _LENGTH, (_SAMPLES,), generator=generator)
        yield torch.stack([source[start : start + _LENGTH] for start in starts.tolist()]).long()


def train(routing: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: the loss of each step, the loss of held-out text, and how unevenly the last batch went to experts."""
    training, held_out = _texts()
    model: Any = _model(routing, seed)
    routed = [each for each in model.modules() if isinstance(each, _Routed)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(steps))
    losses = []
    for _, ids in zip(range(steps), _batches(training, seed), strict=False):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        (loss + sum(each.balance() for each in routed)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        found = [
            model(input_ids=ids, labels=ids).loss for _, ids in zip(range(20), _batches(held_out, 0), strict=False)
        ]
    loads = [each.last.loads() for each in routed if each.last is not None]
    return {
        "losses": losses,
        "held_out": float(torch.stack(found).mean()),
        "worst_load": max((float(each.max() / each.double().mean()) for each in loads), default=1.0),
    }


def _rate(steps: int) -> Callable[[int], float]:
    """A warmup, then half a cosine down to a tenth."""

    def rate(step: int) -> float:
        if step < _WARMUP_STEPS:
            return (step + 1) / _WARMUP_STEPS
        done = (step - _WARMUP_STEPS) / max(1, steps - _WARMUP_STEPS)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return rate


def _share(seeds: int, steps: int) -> dict[str, dict[int, dict[str, Any]]]:
    """On a process: every other run."""
    torch.set_num_threads(1)
    runs = [(routing, seed) for seed in range(seeds) for routing in ROUTINGS]
    found: dict[str, dict[int, dict[str, Any]]] = {routing: {} for routing in ROUTINGS}
    for routing, seed in runs[dist.get_rank() :: _PROCESSES]:
        found[routing][seed] = train(routing, seed, steps)
    return found


def compare(picture: Path | None = None, *, seeds: int = SEEDS, steps: int = STEPS) -> dict[str, Any]:
    """Losses of all runs, and differences seed by seed.

    Args:
        picture: of the curves, as PNG; None for none.
        seeds: runs of each routing.
        steps: of a run.
    """
    pool = RankPool()
    try:
        parts = pool.run(_share, _PROCESSES, (seeds, steps), timeout_s=7200.0)
    finally:
        pool.close()
    runs = {
        routing: [({**parts[0][routing], **parts[1][routing]})[seed] for seed in range(seeds)] for routing in ROUTINGS
    }
    held_out = {routing: [each["held_out"] for each in found] for routing, found in runs.items()}
    if picture is not None:
        _draw_curves({routing: [each["losses"] for each in found] for routing, found in runs.items()}, picture)
    return {
        "seeds": seeds,
        "steps": steps,
        "held_out_loss": held_out,
        "worst_load": {routing: max(each["worst_load"] for each in found) for routing, found in runs.items()},
        "bi_level_minus_switch": _difference(held_out["bi-level"], held_out["Switch"]),
        "no_experts_minus_switch": _difference(held_out["no experts"], held_out["Switch"]),
    }


def _difference(one: list[float], other: list[float]) -> dict[str, float]:
    """Mean of paired differences and its standard error."""
    pairs = [a - b for a, b in zip(one, other, strict=True)]
    return {"mean": mean(pairs), "standard_error": stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else math.inf}


def _draw_curves(curves: dict[str, list[list[float]]], path: Path) -> None:
    plt = pyplot_for(path)
    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=110, layout="constrained")
    for (routing, runs), colour in zip(curves.items(), ("#c0392b", "#2166ac", "#888888"), strict=True):
        points = torch.tensor(runs).unfold(1, _SMOOTHED, _SMOOTHED).mean(2)
        steps = (torch.arange(points.shape[1]) + 1) * _SMOOTHED
        style = {"linestyle": "--"} if routing == "bi-level" else {}
        axes.plot(steps, points.mean(0), color=colour, label=f"{routing} (mean of {len(runs)} seeds)", **style)
        axes.fill_between(steps, points.amin(0), points.amax(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {_SMOOTHED} steps (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, format="png")
    finally:
        plt.close(figure)


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    rows = [["held-out loss", *(f"seed {seed}" for seed in range(found["seeds"])), "mean", "worst load"]]
    for routing, losses in found["held_out_loss"].items():
        cells = [f"{loss:.4f}" for loss in (*losses, mean(losses))]
        rows.append([routing, *cells, f"{found['worst_load'][routing]:.2f}"])
    differences = [
        f"{name} {found[name]['mean']:+.4f} +- {found[name]['standard_error']:.4f} (standard error)\n"
        for name in ("bi_level_minus_switch", "no_experts_minus_switch")
    ]
    return "\n".join([aligned(rows), "".join(differences)])
