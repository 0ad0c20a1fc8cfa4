"""torch's elastic agent for one node, with what it leaves out: exact deaths, true attempts, nothing left behind.

A group restart counts once on every node, because every node starts its ranks once per round.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Event as Flag
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.events.api import Event, EventSource
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from meshwright.clusters.deaths import Death, Deaths
from meshwright.clusters.node_counters import NodeCounters, counters_of
from meshwright.clusters.nvml import read_gpus
from meshwright.clusters.prefork import Forks, executed
from meshwright.clusters.rendezvous import NodeMeeting
from meshwright.clusters.rounds import Rounds
from meshwright.clusters.sweep import sweep
from meshwright.clusters.turns import Turns
from meshwright.clusters.watching import GpuWatch, shown_gpus, watch_from

__all__ = ["NodeAgent", "StoppedError"]

Tell = Callable[..., None]

_STILL_S = 5.0


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


@dataclass(frozen=True)
class _Machine:
    """What looks at the machine while ranks run.

    Args:
        turns: of who asks its driver and who forks.
        counters: of what it does.
        health: of its GPUs, where the plan wants that.
    """

    turns: Turns
    counters: NodeCounters
    health: GpuWatch | None

    @classmethod
    def of(cls, plan: Mapping[str, Any], node: int, tell: Tell) -> "_Machine":
        """Looks at the GPUs of a node's ranks from now on; counts later."""
        watch, turns = watch_from(plan["limits"]["watch"]), Turns()
        found = cls(turns, counters_of(plan, node, turns), None)
        if watch is None:
            return found
        if plan["limits"]["retry"]["exclude_after"] is None:  # nobody would take its place
            watch = replace(watch, restarts=False)
        shown = shown_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        health = GpuWatch(watch, shown, tell=tell, read=read_gpus, turns=turns)
        health.start()
        return replace(found, health=health)


class NodeAgent(LocalElasticAgent):
    """Starts, watches and ends the ranks of one node.

    Args:
        spec: what torch's agent runs.
        plan: of the run, as a dictionary.
        node: index of this node.
        tell: sends an event to the launcher.
        forks: where ranks are forked.
        mask: replaces secrets in what is told of failures.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        plan: Mapping[str, Any],
        node: int,
        tell: Tell,
        forks: Forks | None = None,
        mask: Callable[[str], str] = str,
    ) -> None:
        super().__init__(spec, _OwnLogs(), start_method="fork", exit_barrier_timeout=300)
        self._forks = forks
        self.stop, self.heeded = Flag(), Flag()
        self.deaths: Deaths | None = None
        self._attempt = len(plan["limits"]["past"]) - 1
        self._sweep, self._tell = partial(sweep, plan["run_id"], node), tell
        self._limits: Mapping[str, Any] = plan["limits"]
        self._leaving = False
        self._machine = _Machine.of(plan, node, tell)
        key = spec.rdzv_handler.key if isinstance(spec.rdzv_handler, NodeMeeting) else b""
        self._rounds = Rounds(plan, node, self.stop.is_set, sick=self._fault, mask=mask, key=key)

    def _fault(self) -> tuple[str, float] | None:
        return self._machine.health.fault if self._machine.health else None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._attempt += 1
        self._remaining_restarts = worker_group.spec.max_restarts - self._attempt
        if self._forks is not None:
            self._forks.await_imports(self.stop.is_set)
        if self.stop.is_set():
            raise self._stopped()
        now = time.time()
        self._rounds.begin(self._store, self._attempt)
        with self._holding(worker_group.spec):
            local: dict[int, Any] = super()._start_workers(worker_group)
            pids = {worker_group.workers[rank].global_rank: pid for rank, pid in local.items()}
            self._tell("started", attempt=self._attempt, pids=pids, time_unix_s=now)
            self.deaths = Deaths(pids, partial(self._report, self._attempt))
        self._machine.counters.start()
        return local

    @contextmanager
    def _holding(self, spec: WorkerSpec) -> Iterator[None]:
        """While ranks are forked: none runs before its death would be seen, and nobody is at work in a driver.

        Where a driver does not come to an end, they are executed from now on.
        """
        with ExitStack() as held:
            if self._forks is not None and not held.enter_context(self._machine.turns.still(_STILL_S)):
                sys.stderr.write(f"ranks are executed, not forked: NVML has not answered for {_STILL_S:g} s\n")
                spec.entrypoint, spec.args = executed(spec.args)
                self._forks = None
            if self._forks is not None:
                held.enter_context(self._forks.together())
            yield

    def _report(self, attempt: int, death: Death) -> None:
        self._tell("exit", **death.as_event(attempt))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert self.deaths is not None, "ranks are watched from their start"
        if self.stop.is_set():
            raise self._stopped()
        ended, failed = self.deaths.all_dead, self.deaths.failed  # in this order: who has ended fails no more
        if not self._is_over(ended=ended, failed=failed):
            return RunResult(state=WorkerState.HEALTHY)
        self.end_ranks()
        if (failed or not ended) and self._rounds.left > 0:
            self._decide(failed=failed)
        if failed or not ended:
            return RunResult(state=WorkerState.FAILED)
        return RunResult(
            WorkerState.SUCCEEDED, return_values={worker.global_rank: 0 for worker in worker_group.workers}
        )

    def _is_over(self, *, ended: bool, failed: bool) -> bool:
        """Whether the attempt is over on this node, which then says so, or on another."""
        if failed or self._is_sick:
            self._rounds.call()
        elif ended:
            self._rounds.leave()
        else:
            return self._rounds.called
        return True

    @property
    def _is_sick(self) -> bool:
        """Whether ranks that run are to end, so that others run without this machine."""
        health = self._machine.health
        if health is None or self.deaths is None or self._rounds.left <= 0:
            return False
        return health.ends_attempt and not self.deaths.all_dead

    def _decide(self, *, failed: bool) -> None:
        """Comes back when it is time to start again, or with no restart left."""
        assert self.deaths is not None, "ranks are watched from their start"
        decision = self._rounds.decide(self.deaths.known, leaving=self._leaving)
        if self.stop.is_set():
            raise self._stopped()
        self._tell("decided", **decision.as_dict())
        if decision.again and (decision.excludes or self._limits["regroup"] or self.stop.wait(decision.wait_s)):
            raise self._stopped()  # without some of these nodes, or with more, the launcher starts others
        if decision.again and not self._leaving:
            return
        if not failed:
            raise self._stopped()  # the ranks of another node failed for good
        self._remaining_restarts = 0

    def _stopped(self) -> StoppedError:
        self.heeded.set()
        return StoppedError()

    def leave(self, number: signal.Signals) -> list[int]:
        """Warns ranks that this node will be taken away; who ends from now on is not started again.

        Returns:
            Those that heed it, or did.
        """
        self._leaving = True
        if self.deaths is None:
            return []
        self.deaths.warn(number)
        return self.deaths.warned

    def end_ranks(self) -> None:
        """Ends all ranks of this node and whatever they started: TERM, a wait, KILL."""
        if self.deaths is None:
            return
        if not self.deaths.all_dead:
            self.deaths.send(signal.SIGTERM)
            self.deaths.wait(self._limits["shutdown_grace_s"])
        self.kill_ranks()

    def kill_ranks(self) -> None:
        """Ends all ranks of this node and whatever they started, at once."""
        if self.deaths is not None:
            self.deaths.kill_groups()
            self.deaths.wait(5.0)
        self._sweep()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self.end_ranks()
        if self.deaths is not None:
            self.deaths.forget()
        super()._shutdown(death_sig)  # nothing is left that it could wait for

    def _construct_event(
        self, state: str, source: EventSource, worker: Worker | None = None, *_: object, **__: object
    ) -> Event:
        """A bare event: nobody records them here, and torch's own looks the host's name up on the network."""
        return Event(f"torchelastic.worker.status.{state}", source=source, metadata={})
