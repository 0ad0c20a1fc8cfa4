"""Whether ranks run with tensors on a GPU: one over NCCL, two on the same GPU over gloo; gradients against a plain run.

Nothing is timed: two ranks that share one GPU say nothing about speed. What does not run is reported.
`python -m benchmarks.gpu_ranks [--device cuda|cpu] [--tiny] [--seconds S] [--json PATH]`
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import meshwright as mw
from benchmarks.long_models import Model, build
from benchmarks.sections import Sections, aligned, asked
from meshwright.parallel.collectives import World, start_ranks, stop_ranks
from meshwright.parallel.ranks import RankPool

__all__ = ["main", "measure", "table"]

_MODEL = Model(hidden=64, layers=4, heads=4, intermediate=128, vocabulary=256)
_CALL_S = 30.0

LAYOUTS: dict[str, tuple[mw.Mesh, dict[str, Any]]] = {
    "dp": (mw.Mesh(dp=2), {}),
    "fsdp, ZeRO 1": (mw.Mesh(fsdp=2), {"zero_stage": 1}),
    "fsdp, ZeRO 3": (mw.Mesh(fsdp=2), {"zero_stage": 3}),
    "fsdp, layered, recomputed": (mw.Mesh(fsdp=2), {"schedule": "layered", "recompute": "blocks"}),
    "tp": (mw.Mesh(tp=2), {}),
    "tp, sequence parallel": (mw.Mesh(tp=2), {"sequence_parallel": True}),
    "cp, ring": (mw.Mesh(cp=2), {"cp_kind": "ring"}),
    "cp, ulysses": (mw.Mesh(cp=2), {"cp_kind": "ulysses"}),
    "pp, 1f1b": (mw.Mesh(pp=2), {"schedule": "1f1b"}),
    "pp, modular": (mw.Mesh(pp=2), {"schedule": "modular"}),
}
"""Meshes of two ranks, and options."""


def measure(sections: Sections) -> None:
    """All sections."""
    device = sections.device.kind
    sections.run("one rank over NCCL" if device == "cuda" else "one rank over gloo", partial(_alone, device))
    pool = RankPool()
    for name, (mesh, options) in LAYOUTS.items():
        sections.run(name, partial(_on_two, pool, mesh, options, device=device), needs_s=5.0)
    pool.close()


def _alone(device: str) -> dict[str, float]:
    """A process group of one rank."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(f"file://{Path(folder) / 'store'}", device=device, position=World(0, 1, 0, 1), timeout_s=_CALL_S)
        try:
            return _step(mw.Mesh(), {}, device)
        finally:
            stop_ranks()


def _on_two(pool: RankPool, mesh: mw.Mesh, options: dict[str, Any], *, device: str) -> dict[str, float]:
    found = pool.run(_step, mesh.world_size, (mesh, options, device), timeout_s=_CALL_S)
    return {name: max(each[name] for each in found) for name in found[0]}


def _step(mesh: mw.Mesh, options: dict[str, Any], device: str) -> dict[str, float]:
    """Largest relative errors of loss and gradients of one step, against the same model unwrapped."""
    torch.set_num_threads(1)
    plain = build(_MODEL, attention="sdpa", device=device, dtype=torch.float32)
    tokens = torch.randint(0, _MODEL.vocabulary, (4, 64), generator=torch.Generator().manual_seed(0)).to(device)
    loss = plain(input_ids=tokens, labels=tokens).loss
    loss.backward()
    module = build(_MODEL, attention="sdpa", device=device, dtype=torch.float32)
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


def table(found: dict[str, Any]) -> str:
    """What was found, as text."""
    rows = [["", "loss differs", "gradients differ"]]
    lines = []
    for name, each in found["sections"].items():
        if "loss_differs" in each:
            rows.append([name, f"{each['loss_differs']:.1e}", f"{each['gradients_differ']:.1e}"])
        else:
            lines.append(f"{name}: {each}\n")
    return aligned(rows) + "".join(lines)


def main() -> None:
    """Measures and prints."""
    sections = asked(__doc__, seconds=60.0)
    measure(sections)
    sys.stdout.write(table(sections.found))


if __name__ == "__main__":
    main()
