"""What a pod is told by its variables, and how it finds the others of its run: by its plan, or by a roll call."""

import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from meshwright.clusters.pod_sizes import SIZES_FILE, plan_of_pods, sized_files
from meshwright.clusters.roll_call import AGAIN_S, Answering, Calling
from meshwright.clusters.saved import plan_from
from meshwright.parallel.keyed import derived

__all__ = ["Given", "Way", "way_of"]

_RETRY_S = 0.5
_TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Given:
    """What a pod is told.

    Args:
        plan: as JSON-able values, with a node per pod that takes part.
        files: of ranks.
        key: of this start of the pods, in hexadecimal.
        pod: its index.
        node: its place in the plan.
        times: how often pods were started again.
        comes_again: whether somebody would start them again.
        pods: indices of those that take part, where it is not all.
    """

    plan: dict[str, Any]
    files: Mapping[str, str]
    key: str
    pod: int
    node: int
    times: int
    comes_again: bool
    pods: tuple[int, ...] = ()

    @classmethod
    def taken(cls) -> "Given":
        """Takes it out of the environment, which ranks inherit."""
        told = {name: os.environ.pop(f"MESHWRIGHT_{name}") for name in ("PLAN", "FILES", "KEY")}
        restarts = os.environ.pop("MESHWRIGHT_RESTARTS", "")  # told where somebody would start pods again
        index, times = int(os.environ["JOB_COMPLETION_INDEX"]), int(restarts or 0)
        # attempts may have the same number again
        key = derived(bytes.fromhex(told["KEY"]), f"start {times}").hex()
        plan, files = json.loads(told["PLAN"]), json.loads(told["FILES"])
        return cls(plan, files, key, index, index, times, bool(restarts))


class Way(Protocol):
    """How one pod comes to the others."""

    def part(self) -> Given | None:
        """What this pod is to do; None once the run is over without it.

        Raises:
            RendezvousError: when others did not come.
        """

    def place(self) -> tuple[str, int] | None:
        """Where agents meet, once the first pod's listens; None on that one, and where it does not in time."""

    def heard(self, event: Mapping[str, Any]) -> None:
        """Takes what this pod's agent says."""

    def leave(self) -> None:
        """Waits for those that have to end before this one."""


class _Known:
    """All pods of the plan take part."""

    def __init__(self, given: Given) -> None:
        self._given = given

    def part(self) -> Given | None:
        return self._given

    def place(self) -> tuple[str, int] | None:
        """Where the first pod listens, at the port that it was given."""
        if not self._given.pod:
            return None
        meeting = self._given.plan["meeting"]
        end_s = time.monotonic() + self._given.plan["limits"]["join_timeout_s"]
        while time.monotonic() < end_s:
            with suppress(OSError):
                address = socket.gethostbyname(meeting["host"])
                socket.create_connection((address, meeting["port"]), 5.0).close()
                return address, meeting["port"]
            time.sleep(_RETRY_S)
        return None

    def heard(self, event: Mapping[str, Any]) -> None:
        del event

    def leave(self) -> None:
        return


class _Called:
    """As many take part as are there."""

    def __init__(self, given: Given) -> None:
        self._given, self._pods = given, tuple[int, ...]()
        self._calling: Calling | None = None
        self._answering: Answering | None = None

    def part(self) -> Given | None:
        given = self._given
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0 if given.pod else _TERMINATED))  # nothing runs yet
        if given.pod:
            self._answering = Answering(given.plan, given.pod, given.key)
            pods = self._answering.pods()
            return None if pods is None else self._part(pods)
        sizes, most_s = json.loads(given.files[SIZES_FILE]), given.plan["limits"]["join_timeout_s"]
        self._calling = Calling(given.plan, given.key)
        window_s = min(most_s, AGAIN_S) if given.times else most_s
        return self._part(self._calling.pods([int(size) for size in sizes], window_s=window_s, most_s=most_s))

    def _part(self, pods: tuple[int, ...]) -> Given:
        self._pods = pods
        plan = plan_of_pods(plan_from(self._given.plan), pods)
        plan = replace(plan, meeting=replace(plan.meeting, port=None))  # at that one the roll is called
        files = sized_files(self._given.files, len(pods))
        return replace(self._given, plan=plan.as_dict(), files=files, node=pods.index(self._given.pod), pods=pods)

    def place(self) -> tuple[str, int] | None:
        return None if self._answering is None else self._answering.meeting()

    def heard(self, event: Mapping[str, Any]) -> None:
        if self._calling is not None and event["event"] == "meeting":
            self._calling.meet(event["address"], event["port"])

    def leave(self) -> None:
        if self._calling is not None:
            self._calling.wait_for(self._pods)


def way_of(given: Given) -> Way:
    """How a pod that was told so finds the others."""
    return _Called(given) if SIZES_FILE in given.files else _Known(given)
