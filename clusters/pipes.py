"""Agents at the other end of pipes, of this machine or through ssh, and their events.

launcher --(plan; then meet, alive, leave, stop, kill)--> agent
         <--(joined, meeting, started, exit, data, result)--
"""

import json
import os
import secrets as tokens
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from meshwright.clusters.base import StartPlan
from meshwright.clusters.spawn import end_agent
from meshwright.clusters.sweep import sweep

__all__ = ["Far", "PipeHandle"]

_MAX_LINE_BYTES = 1 << 26
_KILL_WAIT_S = 3.0
_LEASE = 1.05  # an agent that is cut off looks at its clock so often

Event = dict[str, Any]


def _nothing(event: Event) -> None:
    del event


@dataclass(frozen=True)
class Far:
    """What is different where agents run on other machines.

    Args:
        message: further words of the first message to every agent.
        lost_after_s: silence after which an agent ends its ranks; it hears from us four times as often. None is never.
        explain: what the end of an agent means that said nothing: its node and exit status -> fields of that event.
        keep: takes what an agent sends of a run directory that is not shared.
    """

    message: Mapping[str, Any]
    lost_after_s: float | None
    explain: Callable[[str, int], Mapping[str, Any]]
    keep: Callable[[Event], None]


_NEAR = Far({}, None, lambda name, code: {}, _nothing)


class PipeHandle:
    """A run whose agents are children of this process, or whose ssh clients are.

    Args:
        plan: what is started.
        agents: node -> process.
        secrets: values of the plan's secrets.
        far: None for agents of this machine.
    """

    def __init__(
        self,
        plan: StartPlan,
        agents: "Mapping[str, subprocess.Popen[bytes]]",
        secrets: Mapping[str, str],
        *,
        far: Far | None = None,
    ) -> None:
        self._plan, self._agents, self._far = plan, dict(agents), far or _NEAR
        self._rest = dict.fromkeys(agents, b"")
        self._selector = selectors.DefaultSelector()
        self._alive_s = time.monotonic()
        self._late: list[Event] = []
        told = {"plan": asdict(plan), "secrets": dict(secrets), "key": tokens.token_hex(32), **self._far.message}
        for node in plan.nodes:
            agent = self._agents[node.name]
            assert agent.stdout is not None, node.name
            self._selector.register(agent.stdout, selectors.EVENT_READ, node.name)
            self._say(node.name, {**told, "node": node.index, "lost_after_s": self._far.lost_after_s})

    def _say(self, name: str, message: Mapping[str, Any]) -> None:
        pipe = self._agents[name].stdin
        assert pipe is not None, name
        if pipe.closed:
            return
        left = memoryview(json.dumps(message).encode() + b"\n")
        with suppress(OSError):  # a dead agent is found by its end of output
            while left:
                left = left[pipe.write(left) or 0 :]

    @property
    def done(self) -> bool:
        """Whether no agent is left."""
        return not self._selector.get_map() and not self._late

    def poll(self, timeout_s: float) -> list[Event]:
        """Events since the last call; an agent that is gone gives a last one, {"event": "gone", "code": ...}.

        `ends_within_s` of it: where only the connection may be gone, how long agent and ranks may still be there.
        """
        self._stay_in_touch()
        events, self._late = self._late, []
        for key, _ in self._selector.select(0.0 if events else timeout_s):
            events += self._read(key.data, key.fd)
        return events

    def _stay_in_touch(self) -> None:
        every_s = self._far.lost_after_s
        if every_s is not None and time.monotonic() - self._alive_s > every_s / 4:
            self._alive_s = time.monotonic()
            for name in self._agents:
                self._say(name, {"command": "alive"})

    def _read(self, name: str, fd: int) -> list[Event]:
        data = os.read(fd, 1 << 16)
        if not data:
            return [self._gone(name)]
        *lines, self._rest[name] = (self._rest[name] + data).split(b"\n")
        if len(self._rest[name]) > _MAX_LINE_BYTES:
            self._agents[name].kill()
            self._rest[name] = b""
        found = [event for line in lines if (event := _event(line)) is not None]
        for event in found:
            if event["event"] == "meeting":  # the first node listens: tell the others
                for other in self._agents:
                    self._say(other, {**event, "command": "meet"})
            elif event["event"] == "data":
                self._far.keep(event)
        return [{**event, "node": name} for event in found if event["event"] not in ("meeting", "data")]

    def _gone(self, name: str) -> Event:
        agent = self._agents[name]
        assert agent.stdout is not None, name
        self._selector.unregister(agent.stdout)
        code = agent.wait()
        end_agent(agent)
        left_s = 0.0 if self._far.lost_after_s is None else self._far.lost_after_s * _LEASE
        return {"node": name, "event": "gone", "code": code, "ends_within_s": left_s, **self._far.explain(name, code)}

    def stop(self) -> None:
        """Asks all agents to end their ranks: TERM, then KILL after the plan's grace."""
        for name in self._agents:
            self._say(name, {"command": "stop"})

    def kill(self) -> None:
        """Kills everything of this run at once, and what it left behind."""
        for name in self._agents:
            self._say(name, {"command": "kill"})
        end_s = time.monotonic() + _KILL_WAIT_S
        while self._selector.get_map() and time.monotonic() < end_s:
            self._late += self.poll(0.1)
        for agent in self._agents.values():
            if agent.poll() is None:
                agent.send_signal(signal.SIGKILL)
                agent.wait()
        for key in list(self._selector.get_map().values()):
            self._late.append(self._gone(key.data))
        sweep(self._plan.run_id)


def _event(line: bytes) -> Event | None:
    """An event; None for what a login shell may print before the agent speaks."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "event" in found else None
