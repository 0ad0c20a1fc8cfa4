"""Attention of a sequence dealt over ranks: bytes against formulas, balance of dealings, and step time against peers.

A step is forward and backward of one causal attention, from tensors [batch, own positions, heads, d] as projections
give them. Peers: DeepSpeed-Ulysses (`deepspeed.sequence.layer`) around torch's attention, and torch's ring (a private
template of `torch.distributed.tensor.experimental`) around its CPU flash kernel, with both of its ways to rotate.
`python -m benchmarks.sequence [--json] [--rounds N] [--length S]`
"""

import argparse
import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import meshwright as mw
from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.parallel.blockwise.masks import causal
from meshwright.parallel.collectives import Groups
from meshwright.parallel.context.attention import attend_dealt
from meshwright.parallel.context.axis import ContextAxis, context_axis
from meshwright.parallel.context.balance import critical_path
from meshwright.parallel.context.choose import choose
from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.kinds import GatherKV, Hybrid, Kind, Ring, Ulysses
from meshwright.parallel.context.traffic import Shape, traffic_of
from meshwright.parallel.ledger import Ledger
from meshwright.parallel.ranks import RankPool

__all__ = ["main", "measure", "sent"]

_HEADS, _WIDTH = 8, 64
_DEGREES = (2, 4)
_SMALL = Shape(batch=2, length=256, heads=8, kv_heads=4, width=16)
Step = Callable[[], object]


def _tokens(shape: Shape, size: int, layout: Callable[[Tensor], Tensor] = lambda each: each) -> list[Tensor]:
    """Query, key, value of one rank, [batch, positions, heads, d]."""
    torch.manual_seed(dist.get_rank())
    kinds = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [layout(torch.randn(shape.batch, size, each, shape.width)).requires_grad_() for each in kinds]


def _ours(axis: ContextAxis, kind: Kind, shape: Shape) -> Step:
    dealing = Dealing("zigzag", axis.size)
    leaves = _tokens(shape, dealing.size(shape.length, axis.rank))
    grad = torch.randn(*leaves[0].shape)

    def step() -> None:
        query, key, value = (each.transpose(1, 2) for each in leaves)
        out = attend_dealt(query, key, value, axis=axis, dealing=dealing, length=shape.length, kind=kind, mask=causal())
        torch.autograd.backward(out.transpose(1, 2), grad)
        _forget(leaves)

    return step


def _peer(attention: Callable[..., Tensor], shape: Shape) -> Step:
    leaves = _tokens(shape, shape.length // dist.get_world_size())
    grad = torch.randn(*leaves[0].shape)

    def step() -> None:
        torch.autograd.backward(attention(*leaves), grad)
        _forget(leaves)

    return step


def _forget(leaves: list[Tensor]) -> None:
    for each in leaves:
        each.grad = None


def measure(rounds: int, length: int) -> dict[str, Any]:
    """Seconds per step of each contender on this rank, and errors of those that do not run."""
    from benchmarks import sequence_peers as peers  # by name: torch.ops, which they use, does not travel to ranks

    degree = dist.get_world_size()
    shape = Shape(batch=1, length=length, heads=_HEADS, kv_heads=_HEADS, width=_WIDTH)
    axis = context_axis(Groups(mw.Mesh(cp=degree)), Ring(), Ulysses())
    makers: dict[str, Callable[[], Step]] = {
        "ring": lambda: _ours(axis, Ring(), shape),
        "ulysses": lambda: _ours(axis, Ulysses(), shape),
        "ring again": lambda: _ours(axis, Ring(), shape),
        "ulysses again": lambda: _ours(axis, Ulysses(), shape),
        "DeepSpeed-Ulysses": lambda: _peer(peers.deepspeed_ulysses(), shape),
        "torch ring, gathered": lambda: _peer(peers.torch_ring("allgather"), shape),
        "torch ring, by hops": lambda: _peer(peers.torch_ring("alltoall"), shape),
    }
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            steps[name] = make()
            steps[name]()
        except Exception as error:  # a peer that does not run here is reported, not hidden
            steps.pop(name, None)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        dist.barrier()
    return {"times": alternate(steps, rounds=rounds, steps=1, sync=dist.barrier), "missing": missing}


def sent() -> dict[str, list[int]]:
    """By kind, bytes of one attention on this rank: forward counted and by formula, and backward likewise."""
    mesh, degree, found = mw.Mesh(cp=dist.get_world_size()), dist.get_world_size(), {}
    kinds: dict[str, Kind] = {"ring": Ring(), "gathered keys": GatherKV(), "ulysses": Ulysses(), "hybrid": Hybrid(2)}
    groups, dealing = Groups(mesh), Dealing("zigzag", degree)
    axis = context_axis(groups, *kinds.values())
    for name, kind in kinds.items():
        query, key, value = (each.transpose(1, 2) for each in _tokens(_SMALL, dealing.size(_SMALL.length, axis.rank)))
        options: Any = {"axis": axis, "dealing": dealing, "length": _SMALL.length, "kind": kind, "mask": causal()}
        with Ledger(mesh, groups.rank) as there:
            out = attend_dealt(query, key, value, **options)
        with Ledger(mesh, groups.rank) as back:
            out.sum().backward()
        found[name] = []
        for ledger, backward in ((there, False), (back, True)):
            formula = traffic_of(_SMALL, dealing, kind, rank=axis.rank, backward=backward).sent_bytes(4)
            found[name] += [int(ledger.summary().sent_bytes(axis="cp")), formula]
    return found


_LIKE = {"ring": ("torch ring, gathered", "torch ring, by hops"), "ulysses": ("DeepSpeed-Ulysses",)}


def _compared(found: dict[str, Any], shape: Shape, degree: int) -> dict[str, Any]:
    """Ratios of one degree: like against like, and the kind that is chosen against the fastest peer."""
    times = found["times"]
    peers = {name: median(times[name]) for names in _LIKE.values() for name in names if name in times}
    choice = choose(shape, degree, itemsize=4)
    chosen = "ulysses" if choice.kind == Ulysses() else "ring"
    fastest = min(peers, key=lambda name: peers[name])
    like = {
        f"{own} / {name}": ratio_of(times[own], times[name])
        for own, names in _LIKE.items()
        for name in names
        if name in times
    }
    return {
        "degree": degree,
        "median_step_s": {name: median(each) for name, each in times.items()},
        "chosen": chosen,
        "reason": choice.reason,
        "fastest_peer": fastest,
        "ratio_to_fastest": ratio_of(times[chosen], times[fastest]).median,
        "ratio_to_like": {name: each.median for name, each in like.items()},
        "noise": {own: noise_of(times[own], times[f"{own} again"]) for own in _LIKE},
        "not_run": found["missing"],
    }


def _result(rounds: int, length: int) -> dict[str, Any]:
    shape = Shape(batch=1, length=length, heads=_HEADS, kv_heads=_HEADS, width=_WIDTH)
    pool = RankPool()
    try:
        counted = pool.run(sent, 4, (), timeout_s=600.0)
        rows = [
            _compared(pool.run(measure, degree, (rounds, length), timeout_s=3600.0)[0], shape, degree)
            for degree in _DEGREES
        ]
    finally:
        pool.close()
    balance = {
        kind: {str(degree): float(critical_path(Dealing(kind, degree), 1024 * degree)) for degree in (2, 4, 8, 64)}
        for kind in ("contiguous", "zigzag", "striped")
    }
    return {
        "rounds": rounds,
        "length": length,
        "bytes": counted[0],
        "bytes_equal": all(each[0] == each[1] and each[2] == each[3] for rank in counted for each in rank.values()),
        "critical_path": balance,
        "steps": rows,
        "worst_ratio_to_fastest": max(row["ratio_to_fastest"] for row in rows),
        "worst_ratio_to_like": max(ratio for row in rows for ratio in row["ratio_to_like"].values()),
        "noise": max(noise for row in rows for noise in row["noise"].values()),
    }


def _text(result: dict[str, Any]) -> str:
    lines = ["bytes sent by rank 0: forward counted, by formula; backward counted, by formula"]
    lines += [f"  {name:<14} {'  '.join(f'{each:>10,}' for each in row)}" for name, row in result["bytes"].items()]
    lines.append(f"equal on all ranks: {result['bytes_equal']}")
    for kind, row in result["critical_path"].items():
        shown = "  ".join(f"{degree}: {value:.4f}" for degree, value in row.items())
        lines.append(f"critical path of {kind:<10} against ideal, by ranks   {shown}")
    for row in result["steps"]:
        lines.append(f"cp={row['degree']}, {result['length']} positions; {row['reason']}")
        lines += [f"  {name:<22} {seconds * 1e3:8.1f} ms a step" for name, seconds in row["median_step_s"].items()]
        lines += [f"  {name:<40} {ratio:.3f}" for name, ratio in row["ratio_to_like"].items()]
        noise = ", ".join(f"{name} {value:.3f}" for name, value in row["noise"].items())
        lines.append(f"  {row['chosen']} / {row['fastest_peer']}: {row['ratio_to_fastest']:.3f}; noise: {noise}")
        lines += [f"  not run: {name}: {error}" for name, error in row["not_run"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--length", type=int, default=4096, help="positions of the whole sequence")
    arguments = parser.parse_args()
    result = _result(arguments.rounds, arguments.length)
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _text(result))


if __name__ == "__main__":
    main()
