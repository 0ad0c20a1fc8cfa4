"""A job drawn on paper: its model run on shapes, its schedule, its states."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from meshwright.clusters.simulated.forecast import Forecast
from meshwright.clusters.simulated.hosting import check_link
from meshwright.clusters.simulated.machine import Machine
from meshwright.clusters.simulated.paper import Paper, StageBytes
from meshwright.launch.load import LoadedJob
from meshwright.launch.paper.hardware import Hardware
from meshwright.launch.paper.positions import border_sends, keys_fetched, summed_at_end
from meshwright.launch.paper.states import data_calls, stage_bytes, states_of
from meshwright.launch.rehearse import settled_on_meta
from meshwright.launch.spec.job import Job
from meshwright.moe.expert_pass import Experts
from meshwright.moe.on_paper import deal_on_shapes
from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.options import Options
from meshwright.parallel.plan import Plans, make_context_plan, make_expert_plan, make_plan, make_span_plan
from meshwright.parallel.predicted import first_shares
from meshwright.parallel.stages import Stages, stages_of
from meshwright.parallel.traced_attention import Shared
from meshwright.parallel.tracing import Tracer, trace
from meshwright.parallel.work import Passes, Sent, Traced, Work

__all__ = ["Drawing", "deal_on_paper", "forecast", "run_on_paper"]

_MOST_PROVED = 2e9
"""Elements of a block times tokens of its example, up to which its plan is proved on numbers."""
_PRECISIONS = {"bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawing:
    """A model on shapes.

    Args:
        model: whole.
        mine: as the first rank of `tp` has it.
        options: of the job.
        plans: how it is dealt.
        is_proved: whether the plans were proved on numbers.
        traced: what the first rank does for one micro-batch.
        forward_flops: of one micro-batch, whole.
    """

    model: nn.Module
    mine: nn.Module
    options: Options
    plans: Plans
    is_proved: bool
    traced: Traced | None = None
    forward_flops: float = 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not done exactly."""
        found = []
        if not self.is_proved:
            found.append("blocks are too large to be proved here; how they are dealt was judged by shapes alone")
        if self.options.offload == "cpu":
            found.append("shards are updated on the host, at the rate of its link to the GPU as far as anybody knows")
        return tuple(found)


def deal_on_paper(loaded: LoadedJob, model: nn.Module) -> Drawing:
    """Deals a job's model as its first rank has it; blocks too large to be proved here are judged by their shapes.

    Args:
        loaded: the job.
        model: of it, without values.

    Raises:
        MeshwrightError: when it cannot be dealt.
    """
    mesh, options = loaded.job.mesh, settled_on_meta(loaded, model)
    options.check(mesh)
    experts = make_expert_plan(model, mesh, options)
    sizes = [sum(each.numel() for each in block.parameters()) for block in find_blocks(model, options.blocks).values()]
    work = max(sizes, default=0) * options.example["input_ids"].numel()
    sizes_of = options.sizes
    by_spans = sizes_of is not None and sizes_of.layer_block is not None
    proved = work <= _MOST_PROVED or (mesh.tp == mesh.cp == 1 and not by_spans)
    tensor = make_plan(model, mesh, options, experts=experts, shapes=not proved)
    context = make_context_plan(model, mesh, options, plan=tensor, experts=experts) if proved else None
    spans = make_span_plan(model, options, shapes=not proved)
    plans = Plans(tensor=tensor, context=context, experts=experts, spans=spans)
    return Drawing(model=model, mine=first_shares(model, tensor), options=options, plans=plans, is_proved=proved)


def run_on_paper(loaded: LoadedJob, dealt: Drawing, hardware: Hardware) -> Drawing:
    """Runs a model that was dealt, on shapes, by the kernels of that hardware.

    Raises:
        WrapError: when the model asks its tensors for values.
    """
    job, options = loaded.job, dealt.options
    precision = _PRECISIONS.get(job.train.precision) if job.train else None
    on_cpu = hardware.cluster.gpu.generation == "cpu"
    run, plans = partial(trace, dealt.model, precision=precision), dealt.plans
    spread = partial(_spread, mesh=job.mesh, options=options)
    mine = partial(run, plan=plans.tensor, spans=plans.spans, prepare=spread, on_cpu=on_cpu)
    traced = mine(options)
    if job.mesh.cp > 1:
        part = replace(options, example=_first_positions(options.example, job.mesh.cp))
        shared = Shared(job.mesh.cp, keys_fetched(options, job.mesh.cp))
        blocks = mine(part, shared=shared).blocks
        traced = replace(traced, blocks=blocks, after=_beyond(traced.after, dealt))
    flops = traced.forward_flops
    if on_cpu or plans.spans or job.mesh.tp > 1 or job.mesh.cp > 1 or job.mesh.ep > 1:  # the model's, whoever runs it
        whole = replace(options, blockwise=None)
        flops = run(whole, backward=False, prepare=partial(_spread, mesh=Mesh(), options=options)).forward_flops
    return replace(dealt, traced=traced, forward_flops=flops)


def forecast(drawing: Drawing, job: Job, hardware: Hardware) -> Forecast:
    """Predicts a step of a job.

    Args:
        drawing: of its model, or of that of a job with the same `tp`, `cp` and `ep`.
        job: with its own schedule, micro-batches and data axes.
        hardware: of it.

    Raises:
        MeshwrightError: for a mesh or schedule that cannot be had.
    """
    assert job.data is not None, "a job that trains a model has data"
    assert job.train is not None, "and says how"
    kept = ("blockwise", "moe", "stage_costs")  # counted, or made from what a job says
    options = replace(drawing.options, **{name: value for name, value in job.options.items() if name not in kept})
    options.check(job.mesh)
    stages = stages_of(drawing.mine, job.mesh, 0, options)
    experts = drawing.plans.experts
    states = states_of(drawing.mine, job.mesh, options, stages=stages, experts=experts)
    paper = _paper(drawing, job, hardware, options=options, stages=stages)
    updated = max(each.optimizer for each in states) / 2
    clipped = 3 if job.train.clip_norm is not None else 0  # read for the norm, read and written to be scaled
    return Forecast(
        paper=replace(paper, optimizer_bytes=(7 + clipped) * updated),  # gradient read; weight and moments both
        states=states,
        tokens=job.train.batch_size * job.data.sequence_length,
        flops=3 * drawing.forward_flops * job.mesh.data_degree * options.num_microbatches,
    )


def _paper(drawing: Drawing, job: Job, hardware: Hardware, *, options: Options, stages: Stages) -> Paper:
    traced = drawing.traced
    assert traced is not None, "a drawing that was run"
    mine, experts = drawing.mine, drawing.plans.experts
    of_stages: dict[int, StageBytes] = {}
    rest, sent = StageBytes(), tuple[Sent, ...]()
    if job.mesh.data_degree > 1 and stages.blocks:
        of_stages, rest, sent = stage_bytes(mine, job.mesh, stages=stages, experts=experts)
    elif job.mesh.data_degree > 1:
        sent = data_calls(mine, job.mesh, options, experts=experts)
    paper = Paper(
        machine=Machine(mesh=job.mesh, cluster=hardware.cluster, efficiency=hardware.efficiency),
        schedule=stages.schedule,
        traced=traced,
        stage_of=stages.stage_of,
        recomputed=stages.recomputed,
        border_bytes=max((each.input_bytes for each in traced.blocks.values()), default=0.0),
        stages=of_stages,
        rest=rest,
        sent=sent,
        closing=summed_at_end(mine, job.mesh, options, plans=drawing.plans),
        shards_on_host=options.offload == "cpu",
    )
    check_link(paper)
    return paper


def _beyond(after: Passes, dealt: Drawing) -> Passes:
    """With what is sent along `cp` where blocks are entered and left, both ways."""
    itemsize = max((each.element_size() for each in dealt.mine.parameters()), default=0)
    sent = Work(sent=border_sends(dealt.plans.context, itemsize))
    return replace(after, backward=after.backward + sent)


def _spread(model: nn.Module, tracer: Tracer, *, mesh: Mesh, options: Options) -> None:
    """Deals the experts of a model on shapes."""
    deal_on_shapes(model, tracer, mesh, experts=cast(Experts | None, options.moe))


def _first_positions(example: Any, degree: int) -> Any:
    """The positions of one rank of `cp`, of as many as there are."""
    return {name: each[:, : max(1, each.shape[1] // degree)] for name, each in example.items()}
