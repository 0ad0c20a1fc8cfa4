"""Parity as a command: one step of the wrapped and of the unwrapped model, compared name by name.

Both run in float64 on CPU with the same weights, samples and random keys; casts to float32 inside the model are
promoted on both sides. What the comparison means is said in `parity`, what the plain run is in `reference`.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, Unpack

import torch
from torch import nn

from meshwright.parallel.agreement import fingerprint
from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.costs import settled
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.microbatch import split
from meshwright.parallel.optimizer import BuildOptimizer
from meshwright.parallel.options import OptionKeywords, Options
from meshwright.parallel.parity import Outcome, ParityReport, compare
from meshwright.parallel.plan import make_expert_plan, make_plan
from meshwright.parallel.ranks import RankPool, default_pool, run_ranks
from meshwright.parallel.reference import Trial, plain_outcome
from meshwright.parallel.stages import stages_of
from meshwright.parallel.wrap import ParallelModel, parallelize

__all__ = ["ParityReport", "Prepare", "verify"]

Prepare = Callable[[ParallelModel], None]

_TIMEOUT_S = 600.0
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def verify(
    build_model: Callable[[], nn.Module],
    build_batch: Callable[[], Any],
    mesh: Mesh,
    *,
    prepare: Prepare | None = None,
    build_optimizer: BuildOptimizer | None = None,
    **options: Unpack[OptionKeywords],
) -> ParityReport:
    """Runs one step on real ranks of this machine and compares it with the plain run.

    It may be called from an ordinary script: the ranks are fresh processes that it starts itself.

    Args:
        build_model: makes the model on CPU, with the same weights at every call (seed it inside).
        build_batch: makes the global batch; data ranks take their shares along dim 0.
        mesh: the mesh to try; its ranks all run here.
        prepare: called with the wrapped model on every rank before the step.
        build_optimizer: parameters -> optimizer for the weights after the step; AdamW if None.
        options: as in `parallelize`.

    Raises:
        MeshwrightError: for what `parallelize` refuses.
        RankError: when a rank fails.
    """
    chosen = Options.of(**options)
    chosen.check(mesh)
    dtype = torch.float32 if chosen.data_engine == "deepspeed" else torch.float64
    trial = _planned(Trial(build_model, build_batch, build_optimizer or _adamw, mesh, chosen, dtype))
    plain = run_ranks(plain_outcome, Mesh(), trial)[0]
    pool = RankPool() if chosen.data_engine == "deepspeed" else default_pool()  # DeepSpeed serves one life of a process
    ranks = pool.run(_parallel_outcome, mesh.world_size, (trial, prepare), timeout_s=_TIMEOUT_S)
    if pool is not default_pool():
        pool.close()
    name = str(dtype).removeprefix("torch.")
    report = compare(ranks[0][0], plain, mesh=str(mesh), dtype=name, tolerance=_TOLERANCE[dtype])
    notes = [*_drift([marks for _, marks in ranks]), *report.notes]
    if dtype is torch.float32:
        notes.append("compared in float32: DeepSpeed refuses float64 parameters")
    return replace(report, notes=tuple(notes))


def _planned(trial: Trial) -> Trial:
    """The trial with its stages cut and its tensor plan made: what cannot be had is refused before a rank starts."""
    options, mesh = trial.options, trial.mesh
    by_spans = options.sizes is not None and options.sizes.layer_block is not None
    if mesh.tp == mesh.cp == mesh.ep == 1 and not options.cuts_by_hand and not by_spans:
        return trial
    first = split(trial.samples_of(0), options.num_microbatches)[0]
    with trial.precision():
        model = trial.model()
        chosen = settled(options if options.example is not None else replace(options, example=first), model)
        find_blocks(model, chosen.blocks)
        stages_of(model, mesh, 0, chosen)
        experts = make_expert_plan(model, mesh, chosen)
        plan = make_plan(model, mesh, chosen, experts=experts) if mesh.tp > 1 else options.tensor_plan
    example = chosen.example if mesh.cp > 1 or by_spans else None if mesh.tp > 1 else options.example
    return replace(trial, options=replace(chosen, tensor_plan=plan, example=example))


def _parallel_outcome(trial: Trial, prepare: Prepare | None) -> tuple[Outcome | None, dict[str, int]]:
    """The step of the wrapped model on this rank: what it found (rank 0 only), and a mark of every next weight."""
    keywords: Any = {each.name: getattr(trial.options, each.name) for each in fields(Options)}
    model = parallelize(trial.model(), trial.mesh, **keywords)
    optimizer = model.make_optimizer(trial.build_optimizer)
    if prepare is not None:
        prepare(model)
    with trial.precision():
        loss = model.step(trial.samples_of(model.data_rank))
    gradients = {name: None if each is None else each.clone() for name, each in model.full_gradients().items()}
    norm = model.clip_gradients(None)
    optimizer.step()
    weights = {name: each.clone() for name, each in model.full_parameters().items()}
    losses = model.microbatch_losses()
    marks = {name: fingerprint(name, each) for name, each in weights.items()}
    outcome = Outcome(float(loss), gradients, float(norm), weights, losses)
    return (outcome if model.rank == 0 else None), marks


def _drift(marks: list[dict[str, int]]) -> Iterable[str]:
    """Names parameters that differ between ranks after the step, though they should be one."""
    for rank, mine in enumerate(marks[1:], start=1):
        odd = [name for name, mark in mine.items() if mark != marks[0][name]]
        if odd:
            yield f"rank {rank} holds other weights than rank 0 after the step: {odd[0]} and {len(odd) - 1} more"


def _adamw(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    # Adam's first step is the sign of the gradient unless eps stands above rounding noise, also in float32
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3)
