"""What a launcher asks of every cluster.

There are two kinds. On a `Cluster` (local, ssh) the launcher starts the agents and follows them itself. A `Queue`
(Slurm) takes a whole run and starts it later, without the launcher; the run then has a launcher with it. In a
`DistantQueue` (Kubernetes) it has none, and whoever looks at the run fetches what its nodes said.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from meshwright.clusters.base import StartPlan, StartRequest
from meshwright.clusters.reaching import Reached, Visit

__all__ = ["Admitting", "Cluster", "Counting", "DistantQueue", "Handle", "Job", "Lost", "Queue", "Returning", "Said"]


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

    def reached(self, request: StartRequest, visit: Visit) -> AbstractContextManager[Reached]:
        """The nodes that a request would get, to be examined for as long as this lasts.

        Raises:
            UnavailableError: when they cannot be had.
        """

    def check(self, plan: StartPlan) -> None:
        """Raises where the plan could not be executed here and now."""

    def start(self, plan: StartPlan, secrets: Mapping[str, str]) -> Handle:
        """Executes a plan.

        Raises:
            FewerNodesError: when it cannot be had on so many nodes, and an elastic job may try fewer.
            UnavailableError: when it cannot be had.
        """


@runtime_checkable
class Counting(Protocol):
    """A cluster that knows its nodes, where a job does not name them: an elastic job starts on as many as there are."""

    def count(self, request: StartRequest) -> int:
        """Nodes that have what is asked of each and are not left out, in use or not.

        Raises:
            UnavailableError: when the cluster does not say.
        """


@runtime_checkable
class Returning(Protocol):
    """A cluster whose nodes may be there again after they were lost."""

    def back(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of some nodes that were lost which are there again; asks for seconds, not minutes."""


@runtime_checkable
class Admitting(Protocol):
    """A cluster that gives a run its nodes only when it starts; what is set here sees them before ranks start there.

    It returns those that the run goes on without, each with why; the cluster gives others then.
    """

    admit: Callable[[Reached], list[dict[str, Any]]] | None


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

    def reached(self, request: StartRequest, visit: Visit) -> AbstractContextManager[Reached]:
        """The nodes that a request would get, to be examined for as long as this lasts.

        Raises:
            UnavailableError: when they cannot be had.
        """

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


@dataclass(frozen=True)
class Said:
    """One line that a node of a run printed.

    Args:
        node: its name in the plan.
        at: place of the line among all that this node printed; grows.
        text: without its end.
    """

    node: str
    at: int
    text: str


@dataclass(frozen=True)
class Lost:
    """A node of a run that ended badly, as its queue saw it.

    Args:
        exit_code: what it ended with, or what a lost node counts as.
        why: in words, with the machine.
        disrupted: whether the queue ended it for what happened to its machine, whatever it said last.
    """

    exit_code: int
    why: str
    disrupted: bool = False


@runtime_checkable
class DistantQueue(Queue, Protocol):
    """A queue whose nodes share no directory with us: what they print is asked for, and kept by whoever asks."""

    def said(self, job: str, since_s: float | None = None) -> list[Said]:
        """What nodes printed in the last so many seconds, or ever, each in its order.

        Raises:
            UnavailableError: when the queue does not answer.
        """

    def lost(self, job: str) -> dict[str, Lost]:
        """Nodes that ended badly, as far as the queue still knows of them."""
