"""The job: one frozen value made of blocks, and what follows from it (mesh, nodes, ranks)."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from meshwright.launch.spec.block import BY_KIND, Block, Line, Listed, Name, Variable, whole
from meshwright.launch.spec.conduct import Conduct, Secret
from meshwright.launch.spec.machines import NodeRange, Placement
from meshwright.launch.spec.rules import broken_rules
from meshwright.launch.spec.training import Training
from meshwright.parallel.mesh import AXES, Mesh

__all__ = ["Job", "Program"]

Pattern = Line
"""An exact name of a variable, or one with a trailing *."""


class Program(Block):
    """Keys of a job that say what runs."""

    version: Annotated[Literal[1], BeforeValidator(whole)] = Field(default=1, description="Version of this format.")
    name: Name = Field(description="Name of the job; its run directories lie under it.")
    workdir: Line = Field(default=".", description="Working directory of every rank, relative to the job file.")
    setup: str | None = Field(default=None, description="Shell script that runs once per node before the ranks.")
    command: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[Listed[str], Field(min_length=1), Tag("<list>")],
            BY_KIND,
        ]
        | None
    ) = Field(
        default=None,
        description="What each rank runs, a list of words; may contain {name} and {run_id}. Text needs `shell: true`.",
    )
    shell: bool = Field(default=False, description="Run a command given as text through /bin/sh.")
    env: dict[Variable, str] = Field(default_factory=dict, description="Environment variables of every rank.")
    env_pass: Listed[Pattern] = Field(
        default=(), description="Variables of the launcher's environment that ranks get: a name, or a start and *."
    )
    secrets: dict[Variable, Secret] = Field(
        default_factory=dict,
        description="Variables whose values are read where they are and never written down.",
    )


class Job(Conduct, Placement, Training, Program):
    """A job: what to run or train, on which mesh, where, and how it behaves."""

    @model_validator(mode="after")
    def _check_rules(self) -> "Job":
        problems = broken_rules(self)
        if problems:
            message = "; ".join(f"{key}: {text}" for key, text in problems)
            raise PydanticCustomError("job_rules", "{message}", {"message": message, "problems": problems})
        return self

    @property
    def mesh(self) -> Mesh:
        """The mesh of `parallel:`; consecutive ranks share a node."""
        mesh = Mesh(**{axis: getattr(self.parallel, axis) for axis in (*AXES, "ep")})
        per_node = self.nproc_per_node
        each = per_node if isinstance(per_node, int) else max(1, mesh.world_size // self.num_nodes)
        return replace(mesh, ep_node=mesh.ep // each) if mesh.ep > each and mesh.ep % each == 0 else mesh

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `parallelize` that `parallel:` and `train.seed` state."""
        names = (
            "loss",
            "loss_items",
            "num_microbatches",
            "zero_stage",
            "data_engine",
            "offload",
            "schedule",
            "num_buffers",
            "recompute",
            "offload_inputs",
            "num_loops",
            "group_size",
            "stage_costs",
            "blocks",
        )
        dealt = ("sequence_parallel", "tensor_plan", "cp_kind")
        stated = {name: getattr(self.parallel, name) for name in (*names, *dealt)}
        stated["placement"] = self.parallel.asked.placement
        blockwise = self.parallel.blockwise
        stated["blockwise"] = None if blockwise is None else blockwise.model_dump()
        if self.parallel.ep > 1:
            from meshwright.moe.expert_pass import Experts

            stated["moe"] = Experts(**self.parallel.moe.model_dump())
        return {**stated, "seed": self.train.seed if self.train else 0}

    @property
    def num_nodes(self) -> int:
        """Number of nodes; of an elastic job the largest."""
        if isinstance(self.nodes, NodeRange):
            return self.nodes.max
        return self.nodes or self.cluster.default_nodes

    @property
    def ranks_per_node(self) -> int | None:
        """Ranks of each node; None where only the machine can tell (nproc_per_node: auto, gpu, cpu)."""
        if isinstance(self.nproc_per_node, str):
            return None
        # a program of the user that names neither mesh nor ranks gets one rank per node
        return self.nproc_per_node or max(1, self.mesh.world_size // self.num_nodes)

    @property
    def num_ranks(self) -> int | None:
        """Number of ranks of all nodes; None where only the machine can tell."""
        if self.nproc_per_node is None and any(self.cluster.slots):
            if self.model is not None or self.mesh.world_size > 1:
                return self.mesh.world_size
            return sum(slots or 1 for slots in self.cluster.slots[: self.num_nodes])
        return None if self.ranks_per_node is None else self.num_nodes * self.ranks_per_node

    def as_dict(self) -> dict[str, Any]:
        """The resolved job as JSON-able values; `Job.model_validate` is the inverse. Secrets stay references."""
        return self.model_dump(mode="json", by_alias=True)
