"""A run under one mpiexec: what its ranks and itself say, and its end."""

import json
import math
import os
import secrets as tokens
import selectors
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from meshwright.clusters.base import StartPlan
from meshwright.clusters.lost import LOST_CODE, host_in_mpi, lost_in_mpi, unheard_code
from meshwright.clusters.mpi_hosts import same_host
from meshwright.clusters.pipes import event_of
from meshwright.clusters.records import log_end
from meshwright.clusters.sweep import sweep

__all__ = ["MpiHandle"]

_KILL_WAIT_S = 5.0
_NAMES_S, _LOOK_S = 1.5, 0.05


def _is_failure(event: Mapping[str, Any]) -> bool:
    """Whether a rank ended by itself, and not well."""
    return event["event"] == "exit" and bool(event["code"]) and not event["ended_by_us"]


class MpiHandle:
    """A run under one mpiexec.

    Args:
        plan: what is started.
        secrets: values of the plan's secrets.
    """

    def __init__(self, plan: StartPlan, secrets: Mapping[str, str]) -> None:
        self._plan, self._rest = plan, b""
        self._late: list[dict[str, Any]] = []
        self._explained = False  # by a rank that failed, or by us
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._before = os.fstat(log).st_size
        self._job = subprocess.Popen(
            plan.nodes[0].agent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            bufsize=0,
        )
        os.close(log)
        self._until_s = time.monotonic() + plan.limits.join_timeout_s  # without a word of any rank
        self._selector, self._open = selectors.DefaultSelector(), True
        self._selector.register(self._stream(self._job.stdout), selectors.EVENT_READ)
        self._say({"plan": asdict(plan), "secrets": dict(secrets), "key": tokens.token_hex(32)})

    def _stream(self, found: "IO[bytes] | None") -> "IO[bytes]":
        assert found is not None, "it was started with pipes"
        return found

    def _say(self, message: Mapping[str, Any]) -> None:
        pipe = self._stream(self._job.stdin)
        left = memoryview(json.dumps(message).encode() + b"\n")
        with suppress(OSError, ValueError):  # an mpiexec that is gone is found by its end of output
            while left:
                left = left[pipe.write(left) or 0 :]

    @property
    def done(self) -> bool:
        """Whether mpiexec has ended."""
        return not self._open and not self._late

    def poll(self, timeout_s: float) -> list[dict[str, Any]]:
        """Events since the last call; after the end {"event": "gone", "code": ...} for the node that mpiexec names.

        Where it names none, for every node, with `lost` false: any of them may be used again.
        """
        events, self._late = self._late, []
        if time.monotonic() > self._until_s:  # MPICH waits for ever where it does not reach a host
            self._end_job()
        for key, _ in self._selector.select(0.0 if events else timeout_s) if self._open else ():
            data = os.read(key.fd, 1 << 16)
            if not data:
                events += self._gone()
                continue
            *lines, self._rest = (self._rest + data).split(b"\n")
            events += [event for line in lines if (event := event_of(line)) is not None]
            self._until_s = math.inf if events else self._until_s
        self._explained = self._explained or any(map(_is_failure, events))
        return events

    def _gone(self) -> list[dict[str, Any]]:
        out, self._open = self._stream(self._job.stdout), False
        self._selector.close()
        code = self._job.wait()
        for pipe in (out, self._stream(self._job.stdin)):
            pipe.close()
        said = self._complained(_NAMES_S if code and not self._explained else 0.0)
        meant = LOST_CODE if self._until_s == math.inf else unheard_code(code, said)
        told = {"event": "gone", "code": code, "exit_code": meant, "message": lost_in_mpi(code, said)}
        names, host = [node.name for node in self._plan.nodes], host_in_mpi(said)
        lost = next((name for name in names if host is not None and same_host(name, host)), None)
        if lost is None:
            return [{**told, "node": name, "lost": False} for name in names]
        ended = {"event": "result", "state": "stopped", "message": ""}
        return [{**told, "node": lost}, *({**ended, "node": name} for name in names if name != lost)]

    def _complained(self, most_s: float) -> str:
        """What mpiexec said, and its ssh, which tells of a lost host at times when mpiexec has ended already."""
        end_s = time.monotonic() + most_s
        while True:
            said = log_end(self._log, max(1, self._log.stat().st_size - self._before))
            if host_in_mpi(said) is not None or time.monotonic() >= end_s:
                return said
            time.sleep(_LOOK_S)

    @property
    def _log(self) -> Path:
        return Path(self._plan.run_dir, "logs", "mpiexec.log")

    def stop(self) -> None:
        """Asks all ranks to end: TERM, then KILL after the plan's grace."""
        self._say({"command": "stop"})

    def _end_job(self) -> None:
        self._until_s = math.inf
        if self._job.poll() is None:
            self._job.terminate()  # mpiexec ends its processes, also those of other hosts
            with suppress(subprocess.TimeoutExpired):
                self._job.wait(_KILL_WAIT_S)
            self._job.kill()

    def kill(self) -> None:
        """Kills everything of this run at once, and what it left behind on this machine."""
        self._explained = True
        self._say({"command": "kill"})
        end_s, late = time.monotonic() + _KILL_WAIT_S, []
        while self._open and time.monotonic() < end_s:
            late += self.poll(0.1)
        self._end_job()
        self._late += late
        if self._open:
            self._late += self._gone()
        sweep(self._plan.run_id)
