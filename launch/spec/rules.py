"""Rules between the keys of a job: pure functions that return (dotted key, what is wrong and what to write)."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from meshwright.launch.spec.machines import NodeRange
from meshwright.parallel.errors import MeshError, ScheduleError, WrapError
from meshwright.parallel.legal import check_layout
from meshwright.parallel.pipeline.choose import complaints

if TYPE_CHECKING:
    from meshwright.launch.spec.clusters import Cluster
    from meshwright.launch.spec.job import Job

__all__ = ["OWNED_VARIABLES", "broken_rules"]

OWNED_VARIABLES = frozenset(
    [
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ]
)
"""Variables that the launcher gives to ranks itself, besides MESHWRIGHT_*."""

Broken = tuple[str, str]


def broken_rules(job: "Job") -> list[Broken]:
    """Every rule that a job breaks, each with the dotted key it is about."""
    return [broken for rule in _RULES for broken in rule(job)]


def _program(job: "Job") -> Iterator[Broken]:
    if job.command is not None:
        return
    if job.model is None:
        yield "", "the job runs nothing; add `command:` (your program) or `model:` (the built-in one)"
        return
    missing = [f"`{key}:`" for key in ("data", "train") if getattr(job, key) is None]
    if missing:
        yield "model", f"the built-in program also needs {' and '.join(missing)}; add what is missing"


def _command(job: "Job") -> Iterator[Broken]:
    if job.command is None:
        return
    for key in ("model", "data", "train"):
        if getattr(job, key) is not None:
            yield key, f"`{key}` is read by the built-in program only, and this job has `command`; remove one of them"
    if job.monitor.prometheus_port is not None:
        yield (
            "monitor.prometheus_port",
            "the built-in program serves them, and this job has `command`; remove it",
        )
    if isinstance(job.command, str) and not job.shell:
        yield "command", "a command given as text needs `shell: true`; or write it as a list of words"
    if not isinstance(job.command, str) and job.shell:
        yield "shell", "`shell: true` goes with a command given as text, this one is a list; remove it"


def _model(job: "Job") -> Iterator[Broken]:
    model = job.model
    if model is None:
        return
    given = [key for key in ("architecture", "path", "python") if getattr(model, key) is not None]
    if len(given) != 1:
        found = f"got {' and '.join(given)}" if given else "got none of them"
        yield "model", f"expected exactly one of architecture, path and python, {found}"
    if model.python is None and model.arguments:
        yield "model.arguments", "arguments go to the function of `python`, which is not given; use `config`"
    if model.python is not None and model.config:
        yield (
            "model.config",
            "config goes with `architecture` or `path`; a `python` function takes `arguments`",
        )


def _tokenizer(job: "Job") -> Iterator[Broken]:
    tokenizer = job.data.tokenizer if job.data else "bytes"
    if not isinstance(tokenizer, str) and (tokenizer.bpe is None) == (tokenizer.file is None):
        found = "got both" if tokenizer.bpe else "got none of them"
        yield "data.tokenizer", f"expected exactly one of bpe and file, {found}"


def _lengths(job: "Job") -> Iterator[Broken]:
    """Keys about samples of unequal lengths."""
    data = job.data
    if data is None:
        return
    if data.batching == "windows":
        for key, default in (("sort_window", 1), ("batches_of", "samples"), ("length_multiple", 1)):
            if getattr(data, key) != default:
                yield f"data.{key}", f"windows all have one length; {key} goes with batching: padded or packed"
    elif data.batches_of == "tokens" and data.sort_window == 1:
        yield (
            "data.batches_of",
            "a sort_window of 1 is a single batch, which has none to share tokens with; set sort_window to 2 or more",
        )
    if data.batching == "packed" and job.parallel.loss == "sample_mean":
        yield (
            "parallel.loss",
            "a packed row holds several samples, whose means a model cannot tell apart; use loss: token_mean, or "
            "batching: padded",
        )


def _nodes(job: "Job") -> Iterator[Broken]:
    nodes = job.nodes
    if isinstance(nodes, NodeRange) and nodes.min > nodes.max:
        yield "nodes.min", f"nodes.min={nodes.min} is more than nodes.max={nodes.max}"
    needed, key = (nodes.min, "nodes.min") if isinstance(nodes, NodeRange) else (nodes, "nodes")
    if needed is None or job.cluster.type not in ("local", "ssh"):
        return
    if needed > job.cluster.default_nodes:
        yield key, _too_many(needed, job.cluster)
    if isinstance(nodes, NodeRange) and job.nproc_per_node is None and any(job.cluster.slots):
        yield "nproc_per_node", "an elastic job takes equally many ranks of every node; say how many"


def _hosts(job: "Job") -> Iterator[Broken]:
    """Hosts that do not fit each other, or the ranks that they are to take."""
    if job.cluster.type != "ssh":
        return
    slots, names = job.cluster.slots, [host.name for host in job.cluster.hosts]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield f"cluster.hosts.{index}.name", f"{name} is listed before; give it more slots there"
    if any(slots) and not all(slots):
        yield "cluster.hosts", "some hosts say their slots and some do not; give all of them slots, or none"
    if job.nproc_per_node in ("gpu", "cpu", "auto"):
        yield "nproc_per_node", f"{job.nproc_per_node} is for the local cluster; say the slots of each host instead"
    if all(slots):
        yield from _slots(job, dict(zip(names, (each or 1 for each in slots), strict=True)))


def _slots(job: "Job", slots: dict[str, int]) -> Iterator[Broken]:
    used, per_node = dict(list(slots.items())[: job.num_nodes]), job.nproc_per_node
    small = [name for name, each in used.items() if isinstance(per_node, int) and per_node > each]
    have, ranks = sum(used.values()), job.num_ranks
    if small:
        yield "nproc_per_node", f"nproc_per_node={per_node} is more than the slots of {', '.join(small)}"
    elif per_node is None and ranks is not None and have < ranks:
        yield (
            "parallel",
            f"the mesh ({job.mesh}) has {ranks} ranks, but the {len(used)} hosts have {have} slots; "
            "give them more, add hosts, or make the mesh smaller",
        )


def _too_many(nodes: int, cluster: "Cluster") -> str:
    have = cluster.default_nodes
    if cluster.type == "local":
        return (
            f"nodes={nodes}, but the local cluster has {have} pretended node{'s' if have > 1 else ''}; "
            f"set cluster.simulate_nodes: {nodes}"
        )
    return f"nodes={nodes}, but cluster.hosts has {have}; add hosts, or ask for fewer nodes"


def _ranks(job: "Job") -> Iterator[Broken]:
    try:
        ranks = job.mesh.world_size
    except MeshError as error:
        yield "parallel.ep", str(error)
        return
    nodes, per_node = job.num_nodes, job.nproc_per_node
    if job.model is None and ranks == 1:  # a program of the user needs no mesh
        return
    if isinstance(per_node, int) and nodes * per_node != ranks:
        yield (
            "nproc_per_node",
            f"nodes x nproc_per_node = {nodes} x {per_node} = {nodes * per_node} ranks, but the mesh of `parallel` "
            f"({job.mesh}) has {ranks}; {_fix(ranks, nodes, per_node)}, "
            f"or make the product of the axes {nodes * per_node}",
        )
    elif per_node is None and ranks % nodes and not any(job.cluster.slots):
        yield "parallel", f"the mesh ({job.mesh}) has {ranks} ranks, which {nodes} nodes cannot share evenly"


def _fix(ranks: int, nodes: int, per_node: int) -> str:
    if ranks % nodes == 0:
        return f"set nproc_per_node: {ranks // nodes}"
    return f"set nodes: {ranks // per_node}" if ranks % per_node == 0 else "change one of them"


def _step(job: "Job") -> Iterator[Broken]:
    parallel, train = job.parallel, job.train
    if parallel.zero_stage == 0 and parallel.data_engine == "torch":
        yield (
            "parallel.zero_stage",
            "zero_stage=0 exists for data_engine deepspeed only; with torch use the axis dp",
        )
    if train is None:
        return
    least = parallel.dp * parallel.fsdp * parallel.num_microbatches
    if train.batch_size < least:
        yield (
            "train.batch_size",
            f"batch_size={train.batch_size} gives some rank an empty micro-batch: dp x fsdp x num_microbatches = "
            f"{least} need a sequence each; set at least {least}",
        )
    if train.validate_every_steps and job.data and not job.data.validation_fraction:
        yield "train.validate_every_steps", "nothing to validate on: data.validation_fraction is 0"


def _stages(job: "Job") -> Iterator[Broken]:
    """Schedules, groups and placements that do not fit together."""
    if job.model is None:
        return
    parallel = job.parallel
    try:
        asked = parallel.asked
    except ScheduleError as error:
        yield "parallel.placement", str(error)
        return
    try:
        order = parallel.order
    except ScheduleError as error:
        yield "parallel.schedule", str(error)
        return
    for key, text in complaints(order, parallel.pp, num_microbatches=parallel.num_microbatches, asked=asked):
        yield f"parallel.{key}", text


def _layout(job: "Job") -> Iterator[Broken]:
    """What the built-in program could not wrap; a program of the user may do with its mesh what it likes."""
    if job.model is None:
        return
    try:
        check_layout(job.mesh, job.parallel)
    except (MeshError, ScheduleError):
        return  # said by another rule
    except WrapError as error:
        yield "parallel", str(error)


def _environment(job: "Job") -> Iterator[Broken]:
    for key in [*(f"env.{name}" for name in job.env), *(f"secrets.{name}" for name in job.secrets)]:
        name = key.partition(".")[2]
        if name in OWNED_VARIABLES or name.startswith("MESHWRIGHT_"):
            yield key, f"{name} is set by the launcher for each rank; remove it"
    for index, pattern in enumerate(job.env_pass):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*\*?|\*", pattern):
            yield f"env_pass.{index}", f"expected a variable name, or the start of one and *, got {pattern!r}"


def _secrets(job: "Job") -> Iterator[Broken]:
    for name, secret in job.secrets.items():
        if name in job.env:
            yield f"secrets.{name}", f"{name} is also given in `env`; keep one of them"
        if (secret.from_env is None) == (secret.from_file is None):
            yield f"secrets.{name}", "expected exactly one of from_env and from_file"


def _ranges(job: "Job") -> Iterator[Broken]:
    first, last = job.rendezvous.port_range
    if first > last:
        yield "rendezvous.port_range", f"the first port {first} lies after the last {last}"
    backoff = job.failure.backoff
    if backoff.initial > backoff.max:
        yield "failure.backoff.initial", f"initial={backoff.initial:g}s is more than max={backoff.max:g}s"
    for index, cause in enumerate(job.failure.no_retry_on):
        if cause in job.failure.retry_on:
            yield f"failure.no_retry_on.{index}", f"{cause!r} is also in retry_on; keep one of them"


_RULES: tuple[Callable[["Job"], Iterator[Broken]], ...] = (
    _program,
    _command,
    _model,
    _tokenizer,
    _lengths,
    _nodes,
    _hosts,
    _ranks,
    _step,
    _stages,
    _layout,
    _environment,
    _secrets,
    _ranges,
)
