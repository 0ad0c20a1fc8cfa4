"""Where a job runs: nodes, ranks per node, what each node needs, how ranks meet, which cluster."""

from typing import Annotated, Literal

from pydantic import Field, Tag

from meshwright.launch.spec.block import BY_KIND, Block, Count, Duration, Line, Listed, Size
from meshwright.launch.spec.clusters import Cluster, LocalCluster

__all__ = ["Cores", "NodeRange", "Placement", "Rendezvous", "Resources"]

Port = Annotated[int, Field(ge=1, le=65535)]
Nodes = Annotated[Annotated[Count, Tag("<integer>")] | Annotated["NodeRange", Tag("<mapping>")], BY_KIND]
RanksPerNode = Annotated[
    Annotated[Count, Tag("<integer>")] | Annotated[Literal["auto", "gpu", "cpu"], Tag("<text>")], BY_KIND
]
Binding = Annotated[
    Annotated[Literal["none", "numa", "socket"], Tag("<text>")] | Annotated["Cores", Tag("<mapping>")],
    BY_KIND,
]
PortChoice = Annotated[Annotated[Port, Tag("<integer>")] | Annotated[Literal["auto"], Tag("<text>")], BY_KIND]


class NodeRange(Block):
    """An elastic number of nodes: as many as there are when ranks start."""

    min: Count = Field(description="Fewest nodes the job runs on.")
    max: Count = Field(
        description="Most nodes the job uses; `parallel` is the mesh of so many. With fewer, dp and then fsdp are "
        "smaller and num_microbatches larger, for the same batches."
    )


class Cores(Block):
    """Which cores each rank of a node runs on."""

    cores: Listed[Line] = Field(description='Cores of each local rank, such as ["0-11", "12-23"].', min_length=1)


class Resources(Block):
    """What each node must have."""

    gpus_per_node: Annotated[int, Field(ge=0, le=1024)] | None = Field(default=None, description="GPUs of a node.")
    gpu_type: Line | None = Field(default=None, description="Kind of GPU, such as H100.")
    cpus_per_rank: Count | None = Field(default=None, description="Cores of each rank.")
    memory_per_node: Size | None = Field(default=None, description="Host memory of a node, such as 900GiB.")
    exclusive: bool = Field(default=False, description="Share the nodes with no other job.")


class Rendezvous(Block):
    """How the ranks of a job find each other."""

    backend: Literal["c10d", "static"] = Field(default="c10d", description="torchrun's rendezvous backend.")
    interface: Line = Field(default="auto", description="Network interface nodes meet on, or auto.")
    port: PortChoice = Field(default="auto", description="Port nodes meet at, or auto: a free one of `port_range`.")
    port_range: Annotated[tuple[Port, Port], Field(strict=False)] = Field(
        default=(29400, 29999),
        description="First and last port that auto, and the store of ranks of several machines, may take.",
    )
    join_timeout: Duration = Field(default=600.0, description="How long to wait for all nodes to join.")
    bind: Literal["interface", "any"] = Field(
        default="interface",
        description="Listen on that interface only, or on any (anyone who reaches the port can join).",
    )


class Placement(Block):
    """Keys of a job that say where it runs."""

    launcher: Literal["torchrun"] = Field(
        default="torchrun", description="What starts the ranks: torch's elastic agent."
    )
    nodes: Nodes | None = Field(
        default=None,
        description="Number of nodes, or {min, max}; by default what the cluster says: its `simulate_nodes` or `nodes` "
        "(1 unless set), or the number of its `hosts`.",
    )
    nproc_per_node: RanksPerNode | None = Field(
        default=None,
        description="Ranks per node: a number, gpu, cpu or auto; by default the ranks of the mesh over the nodes.",
    )
    resources: Resources = Field(default_factory=Resources, description="What each node must have.")
    binding: Binding = Field(default="none", description="Cores of a rank: none, numa, socket, or {cores: [...]}.")
    rendezvous: Rendezvous = Field(default_factory=Rendezvous, description="How ranks find each other.")
    cluster: Cluster = Field(
        default_factory=LocalCluster,
        description="Where to run: a name in clusters.yaml, or the cluster's own block.",
    )
