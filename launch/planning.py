"""What `meshwright plan` asks and answers: the job's question, and each layout as keys of a job."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Engine, Layout
from meshwright.clusters.simulated.candidates import RUNNABLE, Question
from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob
from meshwright.launch.numbers import NAMES, numbers_of
from meshwright.parallel.errors import nearest

__all__ = ["ENGINE", "WISHES", "Wishes", "job_keys", "question_of"]

ENGINE = Engine(split_transfers=False, stops_early=False)
"""How `parallelize` trains on GPUs: every rank of tp sends what it has, a block is recomputed whole."""

_SCHEDULES = {"gpipe": "gpipe", "1f1b": "1f1b", "zero-bubble": "zb-h1", "breadth-first": "modular"}


WISHES = {
    "batch": "sequences of a step (the job's)",
    "at_most": "1: GPUs and batch are limits",
    "network": "Gb/s of each GPU between nodes, in one direction",
    "per_node": "GPUs that NVLink joins (8)",
    "memory": "GB of a GPU; less than it has leaves room",
    "tokens": "to train on",
    "show": "layouts (5)",
    "networks": "1: search again for the network that suffices",
}
"""What may be asked for besides, and what it means; numbers of the model too."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What stands on the command line.

    Args:
        gpu: kind; the job's `resources.gpu_type` where None.
        gpus: how many; as many as the job's mesh has ranks where None.
        more: names of `WISHES` and of the model's numbers -> numbers.
    """

    gpu: str | None = None
    gpus: int | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, gpu: str | None, gpus: int | None, words: Iterable[str] = ()) -> "Wishes":
        """Reads name=number.

        Raises:
            JobError: for other names, and what is no number.

        >>> Wishes.of("H100", 8, ["batch=64", "tokens=1e12"]).more
        {'batch': 64.0, 'tokens': 1000000000000.0}
        """
        found = {}
        for word in words:
            name, _, value = word.partition("=")
            known = [*WISHES, *NAMES]
            if name not in known:
                raise _wrong(f"--with {word}", f"there is no number {name!r}; {nearest(name, known)}")
            if not re.fullmatch(r"\d+(\.\d+)?(e\d+)?", value) or not float(value):
                raise _wrong(f"--with {word}", f"{value!r} is no number above 0; write {name}=8")
            found[name] = float(value)
        return cls(gpu=gpu, gpus=gpus, more=found)

    @property
    def model(self) -> dict[str, int]:
        """Numbers that stand over those of the model's config."""
        return {name: int(value) for name, value in self.more.items() if name in NAMES}


def question_of(loaded: LoadedJob, wishes: Wishes) -> tuple[Question, tuple[str, ...]]:
    """The question, and notes about what was assumed.

    Raises:
        JobError: no kind of GPU, one that the catalog does not know, a model whose numbers cannot be read.
    """
    train, cluster = loaded.job.train, _cluster(loaded, wishes)
    model, notes = numbers_of(loaded, wishes.model)
    assert train is not None, "a job with a model has train"
    if train.precision != "bfloat16":
        notes = (*notes, "planned in bfloat16, so train.precision is set to it")
    asked = Question(
        model=model,
        cluster=cluster,
        global_batch=int(wishes.more.get("batch", train.batch_size)),
        at_most="at_most" in wishes.more,
        engine=ENGINE,
        space=RUNNABLE,
    )
    return asked, notes


def _cluster(loaded: LoadedJob, wishes: Wishes) -> Cluster:
    job, more = loaded.job, wishes.more
    name = wishes.gpu or job.resources.gpu_type
    if name is None:
        raise _wrong("--gpu", "no kind of GPU to plan for; give --gpu H100, or resources.gpu_type in the job")
    try:
        kind = gpu(name)
        if kind.lacks("bfloat16"):
            raise ValueError(
                f"layouts are planned in bfloat16, for which {kind.name} has no matrix units; name another"
            )
        if "memory" in more:
            kind = replace(kind, memory_bytes=1e9 * more["memory"])
        return Cluster(
            gpu=kind,
            num_gpus=job.mesh.world_size if wishes.gpus is None else wishes.gpus,
            gpus_per_node=kind.nvlink_gpus or int(more.get("per_node", 8)),
            network_bytes_per_s=more["network"] * 1e9 / 8 if "network" in more else None,
        )
    except ValueError as error:
        raise _wrong("--gpu", str(error)) from error


def _wrong(where: str, text: str) -> JobError:
    return JobError([Problem(where, "", text)])


def job_keys(layout: Layout, *, per_node: int | None = None) -> dict[str, Any]:
    """The layout as keys of a job; what is not there has its default.

    Args:
        layout: one that `parallelize` runs.
        per_node: ranks of a node, where the job is to say so.

    >>> job_keys(Layout(tp=2, dp=4, pp=2, vpp=4, schedule="breadth-first", global_batch=32, zero_stage=1))["parallel"]
    {'pp': 2, 'fsdp': 4, 'tp': 2, 'num_microbatches': 8, 'schedule': 'modular', 'num_loops': 4, 'zero_stage': 1}
    """
    dealt = "fsdp" if layout.zero_stage else "dp"
    axes = {"pp": layout.pp, dealt: layout.dp, "cp": layout.cp, "tp": layout.tp, "ep": layout.ep}
    parallel: dict[str, Any] = {name: degree for name, degree in axes.items() if degree > 1}
    parallel["num_microbatches"] = int(layout.num_microbatches)
    parallel["schedule"] = _schedule(layout)
    one_by_one = parallel["schedule"] == "layered" and layout.depth_first
    optional = {
        "group_size": int(one_by_one),
        "num_loops": layout.vpp if layout.vpp > 1 else None,
        "zero_stage": layout.zero_stage,
        "recompute": "blocks" if layout.recompute == "full" else None,
        "sequence_parallel": layout.sequence_parallel,
    }
    parallel |= {name: value for name, value in optional.items() if value}
    found: dict[str, Any] = {"parallel": parallel}
    found["train"] = {"batch_size": layout.global_batch, "precision": "bfloat16"}
    if per_node is not None and layout.num_ranks % per_node == 0:
        found |= {"nodes": layout.num_ranks // per_node, "nproc_per_node": per_node}
    return found


def _schedule(layout: Layout) -> str:
    """Whole models go micro-batch by micro-batch; what is recomputed goes block by block, if with one at a time."""
    if layout.pp == 1:
        return "accumulate" if layout.depth_first and layout.recompute == "none" else "layered"
    return "interleaved" if layout.vpp > 1 and layout.depth_first else _SCHEDULES[layout.schedule]
