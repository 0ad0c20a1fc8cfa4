"""torch's elastic agent for one node, with what it leaves out: exact deaths, true attempts, nothing left behind.

A group restart counts once on every node, because every node starts its ranks once per round.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping
from threading import Event as Flag
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.events.api import Event, EventSource
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from meshwright.clusters.deaths import Death, Deaths
from meshwright.clusters.rounds import Rounds
from meshwright.clusters.sweep import sweep

__all__ = ["NodeAgent", "StoppedError"]

Tell = Callable[..., None]


class StoppedError(Exception):
    """The launcher asked this node to stop."""


class _OwnLogs(LogsSpecs):
    """Leaves the streams of ranks alone: the bootstrap opens their logs."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        none = dict.fromkeys(envs, "")
        return LogsDest(none, none, {}, {}, dict.fromkeys(envs, os.devnull))

    @property
    def root_log_dir(self) -> str:
        return os.devnull


class NodeAgent(LocalElasticAgent):
    """Starts, watches and ends the ranks of one node.

    Args:
        spec: what torch's agent runs.
        plan: of the run, as a dictionary.
        node: index of this node.
        tell: sends an event to the launcher.
    """

    def __init__(self, spec: WorkerSpec, *, plan: Mapping[str, Any], node: int, tell: Tell) -> None:
        super().__init__(spec, _OwnLogs(), exit_barrier_timeout=300)
        self.stop, self.heeded = Flag(), Flag()
        self.deaths: Deaths | None = None
        self._attempt = len(plan["limits"]["past"]) - 1
        self._run_id, self._node, self._tell = plan["run_id"], node, tell
        self._grace_s: float = plan["limits"]["shutdown_grace_s"]
        self._leaving, self._regroup = False, bool(plan["limits"]["regroup"])
        self._rounds = Rounds(plan, node, self.stop.is_set)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._attempt += 1
        self._remaining_restarts = worker_group.spec.max_restarts - self._attempt
        if self.stop.is_set():
            raise self._stopped()
        now = time.time()
        self._rounds.begin(self._store, self._attempt)
        local: dict[int, Any] = super()._start_workers(worker_group)
        pids = {worker_group.workers[rank].global_rank: pid for rank, pid in local.items()}
        self._tell("started", attempt=self._attempt, pids=pids, time_unix_s=now)
        attempt = self._attempt

        def report(death: Death) -> None:
            self._tell(
                "exit",
                attempt=attempt,
                rank=death.rank,
                code=death.code,
                time_unix_s=death.time_unix_s,
                ended_by_us=death.ended_by_us,
            )

        self.deaths = Deaths(pids, report)
        return local

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert self.deaths is not None, "ranks are watched from their start"
        if self.stop.is_set():
            raise self._stopped()
        ended, failed = self.deaths.all_dead, self.deaths.failed  # in this order: who has ended fails no more
        if failed:
            self._rounds.call()
        elif ended:
            self._rounds.leave()
        elif not self._rounds.called:
            return RunResult(state=WorkerState.HEALTHY)
        self.end_ranks()
        if (failed or not ended) and self._rounds.left > 0:
            self._decide(failed=failed)
        if not (failed or ended):
            return RunResult(state=WorkerState.FAILED)
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _decide(self, *, failed: bool) -> None:
        """Comes back when it is time to start again, or with no restart left."""
        assert self.deaths is not None, "ranks are watched from their start"
        decision = self._rounds.decide(self.deaths.known, leaving=self._leaving)
        if self.stop.is_set():
            raise self._stopped()
        self._tell("decided", **decision.as_dict())
        if decision.again and (decision.excludes or self._regroup or self.stop.wait(decision.wait_s)):
            raise self._stopped()  # without some of these nodes, or with more, the launcher starts others
        if decision.again and not self._leaving:
            return
        if not failed:
            raise self._stopped()  # the ranks of another node failed for good
        self._remaining_restarts = 0

    def _stopped(self) -> StoppedError:
        self.heeded.set()
        return StoppedError()

    def leave(self, number: signal.Signals) -> None:
        """Warns ranks that this node will be taken away; who ends from now on is not started again."""
        self._leaving = True
        if self.deaths is not None:
            self.deaths.warn(number)

    def end_ranks(self) -> None:
        """Ends all ranks of this node and whatever they started: TERM, a wait, KILL."""
        if self.deaths is None:
            return
        if not self.deaths.all_dead:
            self.deaths.send(signal.SIGTERM)
            self.deaths.wait(self._grace_s)
        self.kill_ranks()

    def kill_ranks(self) -> None:
        """Ends all ranks of this node and whatever they started, at once."""
        if self.deaths is not None:
            self.deaths.kill_groups()
            self.deaths.wait(5.0)
        sweep(self._run_id, self._node)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self.end_ranks()
        super()._shutdown(death_sig)  # nothing is left that it could wait for

    def _construct_event(
        self, state: str, source: EventSource, worker: Worker | None = None, *_: object, **__: object
    ) -> Event:
        """A bare event: nobody records them here, and torch's own looks the host's name up on the network."""
        return Event(f"torchelastic.worker.status.{state}", source=source, metadata={})
