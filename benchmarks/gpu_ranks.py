"""Whether ranks run with tensors on a GPU, over NCCL and over gloo: gradients of a step against a plain run.

NCCL refuses two ranks of one host on the same GPU. So each rank says that it is a host of its own (NCCL_HOSTID), and
they meet over sockets: every collective and every message is NCCL's, and several ranks need one GPU only.
Nothing is timed: ranks that share a GPU say nothing about speed. What does not run is reported.
With CUDA_DEVICE_MAX_CONNECTIONS=1 all streams of a rank share one queue, the hardest case for ranks that wait.
`python -m benchmarks.gpu_ranks [--device cuda|cpu] [--tiny] [--seconds S] [--json PATH]`
"""

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import meshwright as mw
from benchmarks.long_models import Model, build
from benchmarks.mixtures import build_mixture
from benchmarks.sections import Sections, aligned, asked
from meshwright.parallel.collectives import World, start_ranks, stop_ranks, world
from meshwright.parallel.ranks import RankPool

__all__ = ["main", "measure", "table"]

_MODEL = Model(hidden=64, layers=4, heads=4, intermediate=128, vocabulary=256)
_START_S, _CALL_S, _NCCL_CALL_S = 25.0, 12.0, 25.0
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
_PRETENDED = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "WARN"}

Layout = tuple[mw.Mesh, dict[str, Any]]

LAYOUTS: dict[str, Layout] = {
    "dp": (mw.Mesh(dp=2), {}),
    "tp": (mw.Mesh(tp=2), {}),
    "tp, sequence parallel": (mw.Mesh(tp=2), {"sequence_parallel": True}),
    "cp, ring": (mw.Mesh(cp=2), {"cp_kind": "ring"}),
    "cp, ulysses": (mw.Mesh(cp=2), {"cp_kind": "ulysses"}),
    "pp, 1f1b": (mw.Mesh(pp=2), {"schedule": "1f1b"}),
    "pp, modular": (mw.Mesh(pp=2), {"schedule": "modular"}),
    "fsdp, ZeRO 1": (mw.Mesh(fsdp=2), {"zero_stage": 1}),
    "fsdp, ZeRO 3": (mw.Mesh(fsdp=2), {"zero_stage": 3}),
    "fsdp, layered, recomputed": (mw.Mesh(fsdp=2), {"schedule": "layered", "recompute": "blocks"}),
}
"""Meshes of two ranks, and options; what ended processes before comes last."""


MORE_LAYOUTS: dict[str, Layout] = {
    "pp x tp, interleaved": (mw.Mesh(pp=2, tp=2), {"schedule": "interleaved"}),
    "pp x fsdp, modular, ZeRO 3": (mw.Mesh(pp=2, fsdp=2), {"schedule": "modular", "zero_stage": 3}),
    "experts": (mw.Mesh(dp=2, ep=2), {"moe": mw.Experts()}),
    "experts x pp": (mw.Mesh(pp=2, dp=2, ep=2), {"schedule": "1f1b", "moe": mw.Experts()}),
    "pp, 4 stages, 1f1b": (mw.Mesh(pp=4), {"schedule": "1f1b"}),
    "fsdp, 4 ranks, layered": (mw.Mesh(fsdp=4), {"schedule": "layered", "recompute": "blocks"}),
    "experts, two levels": (mw.Mesh(dp=4, ep=4, ep_node=2), {"moe": mw.Experts()}),
    "dp x tp": (mw.Mesh(dp=2, tp=2), {"sequence_parallel": True}),
    "cp x fsdp": (mw.Mesh(fsdp=2, cp=2), {"cp_kind": "ring", "zero_stage": 3}),
}
"""Where several groups stand beside each other, and all-to-alls; experts are those of a mixtral."""


def measure(sections: Sections) -> None:
    """All sections: NCCL first, since nothing else here shows it."""
    device = sections.device.kind
    sections.found["queues"] = os.environ.get(_QUEUES, "as the driver has it")
    first = "one rank over NCCL" if device == "cuda" else "one rank over gloo"
    sections.run(first, partial(_alone, device))
    pool = RankPool()
    sections.run("two ranks start", partial(_started, pool, device))
    for name, layout in {**LAYOUTS, **MORE_LAYOUTS}.items():
        run = partial(_on_hosts, pool, layout, device=device)
        sections.run(f"{name}, {'NCCL' if device == 'cuda' else 'pretended hosts'}", run, needs_s=1.0)
    for name, layout in LAYOUTS.items():
        sections.run(f"{name}, gloo", partial(_on_two, pool, layout, device=device), needs_s=1.0)
    pool.close()


def _alone(device: str) -> dict[str, float]:
    """A process group of one rank."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(f"file://{Path(folder) / 'store'}", device=device, position=World(0, 1, 0, 1), timeout_s=_START_S)
        try:
            return _step((mw.Mesh(), {}), device)
        finally:
            stop_ranks()


def _started(pool: RankPool, device: str) -> None:
    """What only the first call takes long for: imports, and the first use of a GPU."""
    pool.run(_first, 2, (device,), timeout_s=_START_S)


def _first(device: str) -> None:
    build(_MODEL, attention="sdpa", device=device, dtype=torch.float32)


def _on_two(pool: RankPool, layout: Layout, *, device: str) -> dict[str, float]:
    return _worst(pool.run(_step, layout[0].world_size, (layout, device), timeout_s=_CALL_S))


def _on_hosts(pool: RankPool, layout: Layout, *, device: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{Path(folder) / 'store'}", layout, device)
        return _worst(pool.run(_pretended_host, layout[0].world_size, arguments, timeout_s=_NCCL_CALL_S))


def _worst(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(each[name] for each in found) for name in found[0]}


def _pretended_host(store: str, layout: Layout, device: str) -> dict[str, float]:
    """A step of a rank that has left the pool's group for one where each rank is alone on its host."""
    rank, num_ranks = world().rank, layout[0].world_size
    stop_ranks()
    os.environ.update({**_PRETENDED, "NCCL_HOSTID": f"pretended-{rank}"})
    start_ranks(store, device=device, position=World(rank, num_ranks, 0, 1), timeout_s=_NCCL_CALL_S, hang_s=0)
    return _step(layout, device)


def _step(layout: Layout, device: str) -> dict[str, float]:
    """Largest relative errors of loss and gradients of one step, against the same model unwrapped."""
    torch.set_num_threads(1)
    mesh, options = layout
    plain = _build(mesh, device)
    tokens = torch.randint(0, _MODEL.vocabulary, (8, 64), generator=torch.Generator().manual_seed(0)).to(device)
    loss = plain(input_ids=tokens, labels=tokens).loss
    loss.backward()
    module = _build(mesh, device)
    wrapped = mw.parallelize(module, mesh, num_microbatches=2, **options)
    share = tokens.chunk(mesh.data_degree)[wrapped.data_rank]
    ours = wrapped.step({"input_ids": share, "labels": share})
    gradients = wrapped.full_gradients()
    apart = 0.0
    for name, parameter in plain.named_parameters():
        wanted, found = parameter.grad, gradients[name]
        assert wanted is not None, name
        assert found is not None, name
        apart = max(apart, float((found.to(device) - wanted).abs().max() / wanted.abs().max()))
    return {"loss_differs": float((ours - loss.detach()).abs() / loss.detach()), "gradients_differ": apart}


def _build(mesh: mw.Mesh, device: str) -> nn.Module:
    if mesh.ep > 1:
        return build_mixture().to(device)
    return build(_MODEL, attention="sdpa", device=device, dtype=torch.float32)


def table(found: dict[str, Any]) -> str:
    """What was found, as text."""
    rows = [["", "loss differs", "gradients differ"]]
    lines = []
    for name, each in found["sections"].items():
        if each is not None and "loss_differs" in each:
            rows.append([name, f"{each['loss_differs']:.1e}", f"{each['gradients_differ']:.1e}"])
        elif each is not None:
            lines.append(f"{name}: {each}\n")
    return aligned(rows) + "".join(lines)


def main() -> None:
    """Measures and prints."""
    sections = asked(__doc__, seconds=60.0)
    measure(sections)
    sys.stdout.write(table(sections.found))


if __name__ == "__main__":
    main()
