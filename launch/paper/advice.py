"""What would make a job fit, and how it would grow: the same model on paper with other settings of `parallel:`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from meshwright.clusters.simulated.forecast import Forecast
from meshwright.launch.paper.drawing import Drawing, forecast
from meshwright.launch.paper.hardware import Hardware
from meshwright.launch.spec.job import Job
from meshwright.parallel.errors import MeshwrightError
from meshwright.parallel.work import Passes, Traced, Work

__all__ = ["advised", "scaling_of"]

_FACTORS = (0.25, 0.5, 1, 2, 4, 8)


def advised(found: Forecast, drawing: Drawing, *, job: Job, hardware: Hardware) -> Forecast:
    """The same forecast; where it does not fit, with the smallest change that would."""
    if found.fits:
        return found
    best: tuple[float, str] | None = None
    for changes in _changes(job):
        try:
            other = _changed(drawing, job, hardware, changes=changes)
        except MeshwrightError:
            continue
        shown = ", ".join(f"parallel.{name}: {value}" for name, value in changes.items() if value is not None)
        if other.fits:
            needs = f"{other.memory.total_bytes / 1e9:.1f} of {other.capacity_bytes / 1e9:.0f} GB"
            return replace(found, advice=f"smallest change that would fit: {shown} ({needs})")
        if best is None or other.missing_bytes < best[0]:
            best = other.missing_bytes, shown
    if best is None or best[0] >= found.missing_bytes:
        return replace(found, advice="no other recomputing, micro-batch, schedule or sharding needs less")
    nearest = f"{best[1]} still lacks {best[0] / 1e9:.1f} GB; add GPUs to fsdp, tp or pp"
    return replace(found, advice=f"no change of recomputing, micro-batch, schedule or sharding would fit: {nearest}")


def scaling_of(drawing: Drawing, job: Job, hardware: Hardware) -> tuple[tuple[int, float], ...]:
    """(GPUs, tokens per second) with more and fewer replicas, a step's batch shared among them as it is."""
    points = []
    axis = "dp" if job.mesh.dp > 1 or job.mesh.fsdp == 1 else "fsdp"
    degree, count = getattr(job.parallel, axis), job.parallel.num_microbatches
    for factor in _FACTORS:
        changes = {axis: round(degree * factor), "num_microbatches": round(count / factor)}
        if min(changes.values()) < 1 or changes[axis] * changes["num_microbatches"] != degree * count:
            continue
        try:
            other = _with(job, changes)
            cluster = replace(hardware.cluster, num_gpus=other.mesh.world_size)
            found = forecast(drawing, other, replace(hardware, cluster=cluster))
        except MeshwrightError:
            continue
        points.append((cluster.num_gpus, found.tokens_per_s))
    return tuple(points)


def _changes(job: Job) -> Iterator[dict[str, Any]]:
    """Settings to try, the smallest change first: one after the other, then more and more of them together."""
    parts, again, sharded, earlier = list(_finer(job)), _again(job), _sharded(job), _earlier(job)
    yield from filter(None, (again, *parts[:2], earlier, sharded))
    whole: dict[str, Any] = {}
    for change in filter(None, (again, *parts[-1:], sharded, earlier)):
        if whole:
            yield {**whole, **change}
        whole |= change


def _again(job: Job) -> dict[str, Any]:
    plan = job.parallel
    layered = {} if plan.schedule != "accumulate" else {"schedule": "layered"}
    return {} if plan.recompute else {**layered, "recompute": "blocks"}


def _sharded(job: Job) -> dict[str, Any]:
    plan = job.parallel
    return {"dp": 1, "fsdp": plan.dp * plan.fsdp, "zero_stage": 3} if plan.dp > 1 else {}


def _earlier(job: Job) -> dict[str, Any]:
    """A schedule with fewer micro-batches in flight."""
    plan = job.parallel
    return {"schedule": "1f1b", "num_loops": None} if plan.pp > 1 and plan.schedule not in ("1f1b", "zb-h1") else {}


def _finer(job: Job) -> Iterator[dict[str, Any]]:
    """More, smaller micro-batches, down to one sequence each."""
    samples = _samples(job)
    factor = 2
    while samples % factor == 0 and factor <= samples:
        yield {"num_microbatches": job.parallel.num_microbatches * factor}
        factor *= 2


def _samples(job: Job) -> int:
    """Sequences of one micro-batch."""
    assert job.train is not None, "a job that trains a model"
    return -(-job.train.batch_size // (job.mesh.data_degree * job.parallel.num_microbatches))


def _with(job: Job, changes: dict[str, Any]) -> Job:
    return job.model_copy(update={"parallel": job.parallel.model_copy(update=changes)})


def _changed(drawing: Drawing, job: Job, hardware: Hardware, *, changes: dict[str, Any]) -> Forecast:
    other = _with(job, changes)
    share = _samples(other) / _samples(job)
    assert drawing.traced is not None, "a drawing that was run"
    return forecast(replace(drawing, traced=_smaller(drawing.traced, share)), other, hardware)


def _smaller(traced: Traced, share: float) -> Traced:
    """What smaller micro-batches keep; times are not those of smaller ones."""
    if share == 1:
        return traced
    known: dict[int, Passes] = {}

    def smaller(passes: Passes) -> Passes:
        if id(passes) not in known:
            ahead, back = (_scaled(each, share) for each in (passes.forward, passes.backward))
            known[id(passes)] = Passes(forward=ahead, backward=back, input_bytes=share * passes.input_bytes)
        return known[id(passes)]

    blocks = {name: smaller(each) for name, each in traced.blocks.items()}
    return Traced(blocks=blocks, before=smaller(traced.before), after=smaller(traced.after))


def _scaled(work: Work, share: float) -> Work:
    return replace(work, saved_bytes=share * work.saved_bytes, working_bytes=share * work.working_bytes)
