"""What a launcher asks of every cluster.

There are two kinds. On a `Cluster` (local, ssh) the launcher starts the agents and follows them itself. A `Queue`
(Slurm) takes a whole run and starts it later, without the launcher; the run then has a launcher with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from meshwright.clusters.base import StartPlan, StartRequest

__all__ = ["Cluster", "Handle", "Job", "Queue"]


class Handle(Protocol):
    """A started run, as a launcher sees it."""

    def poll(self, timeout_s: float) -> list[dict[str, Any]]:
        """Events since the last call, waiting for one at most so long."""

    def stop(self) -> None:
        """Asks all ranks to end: TERM, and KILL after the grace of the plan."""

    def kill(self) -> None:
        """Ends everything of this run at once, also what its ranks left behind."""

    @property
    def done(self) -> bool:
        """Whether no agent is left."""


class Cluster(Protocol):
    """Where the launcher starts agents and follows them."""

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request; starts nothing."""

    def check(self, plan: StartPlan) -> None:
        """Raises where the plan could not be executed here and now."""

    def start(self, plan: StartPlan, secrets: Mapping[str, str]) -> Handle:
        """Executes a plan."""


@dataclass(frozen=True)
class Job:
    """What a queue says of a run.

    Args:
        state: "pending", "running", "gone" or, where the queue does not answer, "unknown"; it forgets what has ended.
        detail: in the queue's own words.
        exit_code: of a run that is over, where the queue itself remembers it.
    """

    state: str
    detail: str = ""
    exit_code: int | None = None


@runtime_checkable
class Queue(Protocol):
    """Where a whole run is handed over; it has a launcher with it and needs none outside.

    That launcher writes launcher.log and exit.json into the run directory, which all nodes share.
    """

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request, with its submission; submits nothing."""

    def check(self, plan: StartPlan) -> None:
        """Raises where the plan could not be submitted here and now."""

    def submit(self, plan: StartPlan, secrets: Mapping[str, str]) -> str:
        """Hands a plan over; returns the queue's id of it."""

    def status(self, job: str) -> Job:
        """What the queue says of an id."""

    def start_again_soon(self, job: str) -> bool:
        """Shortens what a queue makes a run wait for no other reason than that it ran before; whether it does."""

    def cancel(self, job: str) -> None:
        """Takes a run out of the queue, and ends it if it runs."""
