"""An agent inside a Ray actor, and our end of the line to it, which looks like a process with two pipes."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from threading import Event, Thread
from typing import Any

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.lost import lost_in_ray

__all__ = ["RayLine", "agent_class", "answered"]

_PART_BYTES = 1 << 16
_ANSWER_S = 120.0
"""Ray starts an actor in seconds, and one of a busy node in some more."""


def agent_class() -> type:
    """The class of the actors; made here, so that Ray carries it by value and nodes need only have the agent."""

    class NodeAgent:
        """Holds the agent of one node."""

        def start(self, argv: Sequence[str]) -> tuple[str, str]:
            """Starts the agent; returns the address of this node, and Ray's id of it."""
            import ray

            self._agent = subprocess.Popen(
                list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
            )
            find: Any = ray.util.get_node_ip_address
            return str(find()), str(ray.get_runtime_context().get_node_id())

        def write(self, data: bytes) -> None:
            """Passes words of the launcher on; none closes the line, at which the agent ends its ranks."""
            assert self._agent.stdin is not None
            with suppress(OSError, ValueError):
                if not data:
                    self._agent.stdin.close()
                while data:
                    data = data[self._agent.stdin.write(data) or 0 :]

        def read(self) -> bytes:
            """What the agent says next; nothing at its end."""
            assert self._agent.stdout is not None
            return os.read(self._agent.stdout.fileno(), _PART_BYTES)

        def wait(self) -> int:
            """The agent's exit status."""
            return self._agent.wait()

    return NodeAgent


def answered(asked: Any) -> Any:
    """What actors answer, soon.

    Args:
        asked: what calls of them returned.

    Raises:
        UnavailableError: when one of them is lost, or does not answer in time.
    """
    import ray

    try:
        return ray.get(asked, timeout=_ANSWER_S)
    except ray.exceptions.GetTimeoutError as error:
        raise UnavailableError(f"a node that Ray has placed does not answer within {_ANSWER_S:g} s") from error
    except ray.exceptions.RayError as error:
        raise UnavailableError(lost_in_ray("a node that Ray has placed", "", str(error))) from error


class RayLine:
    """An agent in an actor.

    Args:
        actor: of `agent_class`.
        argv: words that start the agent.
    """

    def __init__(self, actor: Any, argv: Sequence[str]) -> None:
        self._actor = actor
        self._started = actor.start.remote(list(argv))
        inward, out = os.pipe()
        self.stdin = os.fdopen(out, "wb", buffering=0)
        outward, self._into = os.pipe()
        self.stdout = os.fdopen(outward, "rb", buffering=0)
        self._code: int | None = None
        self.host, self.why = "", ""
        self._gone = Event()
        for target in (self._pass_on, self._fetch):
            Thread(target=target, args=(inward,), daemon=True).start()

    def place(self) -> tuple[str, str]:
        """Address of the actor's node, and Ray's id of it, once it is placed and the agent runs.

        Raises:
            UnavailableError: when the actor is lost, or does not answer in time.
        """
        address, node = answered(self._started)
        return address, node

    def _pass_on(self, inward: int) -> None:
        """In the order of the calls, which Ray keeps for one caller only where one waits for the other."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.get(self._started)
            while True:
                data = os.read(inward, _PART_BYTES)
                ray.get(self._actor.write.remote(data))
                if not data:
                    break
        os.close(inward)

    def _fetch(self, inward: int) -> None:
        import ray

        code = -int(signal.SIGKILL)  # what an actor that is lost leaves of its agent
        try:
            self.host = str(ray.get(self._started)[0])
            while data := ray.get(self._actor.read.remote()):
                os.write(self._into, data)
            code = ray.get(self._actor.wait.remote())
        except (ray.exceptions.RayError, OSError) as error:
            self.why = str(error)
        self._code = code
        self._gone.set()
        os.close(self._into)

    def poll(self) -> int | None:
        """The agent's exit status; None while it runs."""
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the agent's end.

        Raises:
            subprocess.TimeoutExpired: when it does not come in time.
        """
        if not self._gone.wait(timeout):
            raise subprocess.TimeoutExpired("the agent of an actor", timeout or 0.0)
        return -int(signal.SIGKILL) if self._code is None else self._code

    def end(self) -> None:
        """Has the actor kill the agent, and keeps the actor."""
        import ray

        def kill(held: Any) -> None:  # local, as the class is
            if held._agent.poll() is None:
                os.killpg(held._agent.pid, signal.SIGKILL)

        with suppress(ray.exceptions.RayError):
            self._actor.__ray_call__.remote(kill)

    def send_signal(self, number: int) -> None:
        """Kills the actor; the agent's line breaks, and it ends its ranks."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.kill(self._actor)

    def kill(self) -> None:
        """Kills the actor."""
        self.send_signal(signal.SIGKILL)
