"""Checks of machines before and while a job runs."""

from typing import Annotated, Literal

from pydantic import Field

from meshwright.launch.spec.block import Block, Duration, Listed, Size

__all__ = ["AllReduceCheck", "Health", "Watch"]

Check = Literal["ssh", "clock", "ports", "versions", "disk", "gpu", "nvlink", "allreduce"]


class AllReduceCheck(Block):
    """The all-reduce that a preflight times."""

    min_busbw_gbps: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Least bus bandwidth that passes, in gigabytes per second."
    )
    size: Size | None = Field(
        default=None, description="Bytes that are reduced; by default 64 MiB over gloo and 1 GiB over NCCL."
    )


class Watch(Block):
    """What is watched while the job runs."""

    interval: Duration = Field(default=10.0, description="Time between two readings.")
    max_temp_c: Annotated[float, Field(ge=0, le=200)] | None = Field(
        default=None, description="GPU temperature that counts as a fault, in degrees Celsius."
    )
    xid: Literal["critical", "any", "ignore"] = Field(
        default="critical", description="Which NVIDIA Xid errors are faults."
    )
    on_fault: Literal["record", "restart"] = Field(
        default="record",
        description="What a fault leads to: it is kept, and the next restart leaves the node out if "
        "failure.exclude_bad_nodes allows that; or ranks start again without the node at once.",
    )


class Health(Block):
    """Checks of machines before and while the job runs."""

    preflight: Listed[Check] = Field(default=(), description="Checks before the ranks start.")
    on_fail: Literal["abort", "exclude_node", "warn"] = Field(
        default="abort", description="What a failed check leads to."
    )
    allreduce: AllReduceCheck = Field(
        default_factory=AllReduceCheck, description="The timed all-reduce of the preflight."
    )
    watch: Watch | None = Field(default=None, description="Readings while the job runs; none unless given.")
