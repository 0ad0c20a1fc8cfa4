"""The clusters a job can name: one block per type, told apart by `type`; a block without one is local."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from meshwright.clusters.mpi_hosts import hosts_of
from meshwright.launch.spec.block import Block, Count, Duration, Line, Listed, Variable
from meshwright.launch.spec.local import Gpus, LocalCluster
from meshwright.launch.values import check_line
from meshwright.parallel.errors import nearest

__all__ = [
    "CLUSTER_TYPES",
    "Cluster",
    "Host",
    "KubernetesCluster",
    "LocalCluster",
    "MpiCluster",
    "RayCluster",
    "SlurmCluster",
    "SshCluster",
]

CLUSTER_TYPES = ("local", "ssh", "slurm", "kubernetes", "mpi", "ray")
"""Types of this version."""

_Port = Annotated[int, Field(ge=1, le=65535)]


def _word(value: str) -> str:
    """Refuses what a program would take for an option, or a shell for several words."""
    if value.startswith("-") or any(each.isspace() for each in value):
        raise ValueError("expected one word that does not start with '-'")
    return value


Word = Annotated[Line, AfterValidator(_word)]
"""One word that is no option."""

_OWNED = (
    *("account", "array", "batch", "chdir", "constraint", "cpus-per-task", "dependency", "error", "exclude", "export"),
    *("export-file", "gid", "gpus-per-node", "input", "job-name", "kill-on-bad-exit", "nodes", "no-requeue", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "parsable", "partition", "qos", "requeue", "reservation", "signal"),
    *("time", "uid", "wait", "wrap"),
)


def _option(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", value):
        raise ValueError("expected the long name of an option without its dashes, such as mail-type")
    if value in _OWNED:
        raise ValueError(f"{value} follows from the job or has a key of its own; remove it here")
    return value


Option = Annotated[str, AfterValidator(_option)]
"""Long name of an option of sbatch or srun that we do not set ourselves."""

Setting = Annotated[str, AfterValidator(lambda value: check_line(value) if value else value)]
"""Value of such an option; empty for one that takes none."""


def _host_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("expected a host's name of letters, digits, '.', '-' and '_'; its user goes into `user`")
    return value


HostName = Annotated[str, AfterValidator(_host_name)]
"""A name that logs can be called by."""


class Host(Block):
    """One machine that ssh reaches."""

    name: HostName = Field(description="What ssh calls it, and what logs call it.")
    addr: Word | None = Field(
        default=None, description="Address at which the other hosts reach it; by default its name."
    )
    slots: Count | None = Field(default=None, description="Ranks it takes; by default all hosts take the same number.")
    gpus: Gpus | None = Field(default=None, description="GPUs its ranks may use; 0 keeps them on CPU; by default all.")
    python: Word | None = Field(default=None, description="Python interpreter there, if not that of the cluster.")
    env: dict[Variable, str] = Field(default_factory=dict, description="Further variables of this host; no secrets.")


def _some(hosts: tuple[Host, ...]) -> tuple[Host, ...]:
    if not hosts:
        raise ValueError("expected at least one host")
    return hosts


class _SshOptions(Block):
    """How connections are made."""

    user: Word | None = Field(default=None, description="User on the hosts; by default what ssh's own files say.")
    port: _Port | None = Field(default=None, description="Port of sshd; by default what ssh's own files say.")
    identity_file: Line | None = Field(default=None, description="Private key; by default what ssh's own files say.")
    known_hosts: Line | None = Field(default=None, description="File of known host keys, if not ssh's own.")
    host_keys: Literal["strict", "accept-new"] = Field(
        default="strict", description="Refuse unknown host keys, or take and remember them at first sight."
    )
    jump: Word | None = Field(default=None, description="Host to go through.")
    config: Line | None = Field(default=None, description="Configuration file of ssh, if not its own.")
    connect_timeout: Duration = Field(default=10.0, description="How long a connection may take.")


class SshCluster(_SshOptions):
    """Machines that are reached by ssh, with host keys that are known."""

    type: Literal["ssh"] = Field(description="Kind of cluster: machines reached by ssh.")
    hosts: Annotated[Listed[Host], AfterValidator(_some)] = Field(
        description="The machines, in the order ranks are given out; at least one. Those beyond `nodes` are spare."
    )
    python: Word | None = Field(
        default=None, description="Python interpreter on the hosts, with meshwright; by default the launcher's path."
    )
    env: dict[Variable, str] = Field(
        default_factory=dict, description="Variables of agents and ranks on every host; they show in argv: no secrets."
    )
    lost_after: Duration = Field(
        default=15.0, description="Silence after which launcher and host count each other as lost, and ranks end."
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Hosts that can be used, in the order ranks are given out."""
        return tuple(host.name for host in self.hosts)

    @property
    def default_nodes(self) -> int:
        """Nodes of a job that does not say `nodes`."""
        return len(self.hosts)

    @property
    def slots(self) -> tuple[int | None, ...]:
        """Ranks that each node takes, None where that is not said."""
        return tuple(host.slots for host in self.hosts)


class _SlurmRequest(Block):
    """What is asked of Slurm, in its own words."""

    partition: Word | None = Field(default=None, description="Partition.")
    account: Word | None = Field(default=None, description="Account.")
    qos: Word | None = Field(default=None, description="Quality of service.")
    constraint: Word | None = Field(default=None, description="Features that nodes must have.")
    reservation: Word | None = Field(default=None, description="Reservation.")
    time: Duration | None = Field(default=None, description="Time limit; by default the partition's.")
    gpus_per_node: Gpus | None = Field(default=None, description="GPUs of each node that are asked for.")
    cpus_per_node: Count | None = Field(default=None, description="Cores of each node that are asked for.")
    exclude: Listed[Word] = Field(default=(), description="Nodes that are not to be used.")


class SlurmCluster(_SlurmRequest):
    """A Slurm cluster whose `sbatch` is here, with a file system that its nodes share."""

    type: Literal["slurm"] = Field(description="Kind of cluster: Slurm.")
    nodes: Count = Field(default=1, description="Nodes of a job that does not say `nodes`.")
    requeue: bool = Field(default=True, description="Queue the job again when it was preempted, from its checkpoint.")
    python: Word | None = Field(
        default=None, description="Python interpreter on the nodes, with meshwright; by default the launcher's path."
    )
    sbatch: dict[Option, Setting] = Field(
        default_factory=dict,
        description='Further options of sbatch by long name, such as {mail-type: FAIL}; "" where one takes no value.',
    )
    srun: dict[Option, Setting] = Field(
        default_factory=dict, description="Further options of srun by long name, such as {cpu-bind: none}."
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Nodes that can be used, in the order ranks are given out; none where the cluster chooses them."""
        return ()

    @property
    def default_nodes(self) -> int:
        """Nodes of a job that does not say `nodes`."""
        return self.nodes

    @property
    def slots(self) -> tuple[int | None, ...]:
        """Ranks that each node takes, None where that is not said."""
        return ()


class _Sized(Block):
    """A cluster that says how many nodes a job takes unless it says `nodes`."""

    nodes: Count = Field(default=1, description="Nodes of a job that does not say `nodes`.")
    gpus_per_node: Gpus | None = Field(default=None, description="GPUs of each node that are asked for.")

    @property
    def names(self) -> tuple[str, ...]:
        """Nodes that can be used, in the order ranks are given out; none where the cluster chooses them."""
        return ()

    @property
    def default_nodes(self) -> int:
        """Nodes of a job that does not say `nodes`."""
        return self.nodes

    @property
    def slots(self) -> tuple[int | None, ...]:
        """Ranks that each node takes, None where that is not said."""
        return ()


class _PodNodes(_Sized):
    """Which nodes of Kubernetes pods come to."""

    node_selector: dict[Line, Line] = Field(default_factory=dict, description="Labels that nodes must have.")
    exclude: Listed[Word] = Field(
        default=(), description="Nodes that are not to be used, by their names in Kubernetes; also after a restart."
    )
    prefer: Listed[Word] = Field(default=(), description="Nodes to be used where they are free, by such names.")


class KubernetesCluster(_PodNodes):
    """A namespace of Kubernetes with the operator of JobSet or of Kubeflow Trainer."""

    type: Literal["kubernetes"] = Field(description="Kind of cluster: Kubernetes, through kubectl.")
    image: Word = Field(description="Image of the pods, with meshwright in it.")
    kind: Literal["jobset", "trainjob"] = Field(default="jobset", description="Object that a run becomes.")
    namespace: Word = Field(default="default", description="Namespace of all objects.")
    context: Word | None = Field(default=None, description="Context of kubectl; by default its current one.")
    python: Word = Field(default="python3", description="Python interpreter in the image.")
    workdir: Line | None = Field(default=None, description="Working directory in the image; by default as here.")
    secret: Word | None = Field(default=None, description="Secret that has the job's secrets, one key per variable.")
    claim: Word | None = Field(default=None, description="Volume claim for run directories; by default the pod's disk.")
    runtime: Word = Field(default="torch-distributed", description="Training runtime of a trainjob.")


class MpiCluster(_Sized):
    """What one mpiexec reaches."""

    type: Literal["mpi"] = Field(description="Kind of cluster: MPI, with Open MPI or MPICH.")
    mpiexec: Word = Field(default="mpiexec", description="Name or path of mpiexec.")
    hostfile: Line | None = Field(
        default=None,
        description="Host file in that MPI's own form; by default this machine. Hosts beyond `nodes` are spare.",
    )
    exclude: Listed[Word] = Field(default=(), description="Hosts of that file that are not to be used.")
    python: Word | None = Field(default=None, description="Python interpreter on all nodes; by default as here.")
    extra: Listed[Line] = Field(default=(), description="Further words of mpiexec, as they are.")

    @property
    def names(self) -> tuple[str, ...]:
        """Hosts that can be used, in the order ranks are given out; none where the file does not tell."""
        known = () if self.hostfile is None else hosts_of(Path(self.hostfile))
        return tuple(name for name in known if name not in self.exclude)


class RayCluster(_Sized):
    """A Ray cluster that runs already."""

    type: Literal["ray"] = Field(description="Kind of cluster: Ray.")
    address: Word = Field(
        default="auto", description="Address of its head, or auto: what RAY_ADDRESS or this node says."
    )
    cpus_per_node: Count = Field(default=1, description="CPUs of each node that are asked for.")
    ready_timeout: Duration = Field(default=60.0, description="How long Ray may take to place the nodes.")
    exclude: Listed[Word] = Field(default=(), description="Nodes that are not to be used: addresses, or Ray's ids.")


def _known(value: object) -> object:
    """Refuses types of clusters that are not there, before blocks of other types complain about keys."""
    kind = value.get("type", "local") if isinstance(value, Mapping) else "local"
    if kind in CLUSTER_TYPES:
        return value
    has = f"this version of meshwright has {', '.join(CLUSTER_TYPES)}"
    if isinstance(kind, str):
        message = f"no cluster type {kind!r}; {nearest(kind, CLUSTER_TYPES)} ({has})"
    else:
        message = f"expected a type of cluster as text; {has}"
    raise PydanticCustomError("job_rules", "{message}", {"message": message, "problems": [("type", message)]})


def _kind(value: object) -> str:
    kind = value.type if isinstance(value, BaseModel) else value.get("type") if isinstance(value, Mapping) else None  # type: ignore[attr-defined]
    return f"<{kind}>" if kind in CLUSTER_TYPES else "<local>"


Cluster = Annotated[
    Annotated[LocalCluster, Tag("<local>")]
    | Annotated[SshCluster, Tag("<ssh>")]
    | Annotated[SlurmCluster, Tag("<slurm>")]
    | Annotated[KubernetesCluster, Tag("<kubernetes>")]
    | Annotated[MpiCluster, Tag("<mpi>")]
    | Annotated[RayCluster, Tag("<ray>")],
    Discriminator(_kind),
    BeforeValidator(_known),
]
"""One of the blocks above."""
