"""This machine as a cluster of a job, with as many nodes as it pretends to have."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from meshwright.launch.spec.block import Block, Line, Listed

__all__ = ["Gpus", "LocalCluster"]

Gpus = Annotated[int, Field(ge=0, le=1024)]
"""A number of GPUs."""


class LocalCluster(Block):
    """This machine, the embedded default."""

    type: Literal["local"] = Field(default="local", description="Kind of cluster: this machine.")
    simulate_nodes: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1,
        description="Pretended nodes that the ranks of this machine are split into; those beyond `nodes` are spare.",
    )
    exclude: Listed[Line] = Field(default=(), description="Pretended nodes that are not used, such as node1.")
    gpus_per_node: Gpus | None = Field(
        default=None, description="GPUs each pretended node may use; 0 keeps ranks on CPU; by default all there are."
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Nodes that can be used, in the order ranks are given out."""
        return tuple(name for name in self._all if name not in self.exclude)

    @property
    def _all(self) -> tuple[str, ...]:
        return tuple(f"node{index}" for index in range(self.simulate_nodes))

    @property
    def default_nodes(self) -> int:
        """Nodes of a job that does not say `nodes`."""
        return len(self.names)

    @property
    def slots(self) -> tuple[int | None, ...]:
        """Ranks that each node takes, None where that is not said."""
        return (None,) * len(self.names)

    @model_validator(mode="after")
    def _some_left(self) -> "LocalCluster":
        wrong = next((name for name in self.exclude if name not in self._all), None)
        if wrong is not None:
            raise ValueError(f"exclude: there is no {wrong} among {', '.join(self._all)}")
        if not self.names:
            raise ValueError("exclude: no node is left")
        return self
