"""What follows when nothing of an attempt is left: the run goes on from its newest checkpoint, or ends.

Agents decide, and restart ranks by themselves, as long as all of them are there. Where a node is lost, or where a
cluster has no agents that outlive a failed rank (MPI), the launcher decides by the same policy, and starts the run anew
on a plan that follows from the job without nodes that are lost or at fault. An elastic job may then have fewer nodes,
and at a later restart more again.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.clusters.base import Limits, StartPlan, StartRequest
from meshwright.clusters.contract import Cluster, Handle, Queue
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.failure import Failure
from meshwright.clusters.masking import Mask
from meshwright.clusters.records import newest_step
from meshwright.clusters.retry import Decision, decide, told_decision
from meshwright.clusters.rounds import seen
from meshwright.launch.admission import examined_at_start
from meshwright.launch.exits import Exit
from meshwright.launch.given import counted, counts, started
from meshwright.launch.load import LoadedJob
from meshwright.launch.losses import Losses
from meshwright.launch.registry import cluster_of
from meshwright.launch.regroup import can_return, change_words, nodes_back, used_names
from meshwright.launch.request import limits_of, resolved_job
from meshwright.launch.rundir import EXCLUDED_FILE, RunDirError, write_json
from meshwright.launch.sizes import SizeError, shape_of, sized
from meshwright.launch.spares import SpareError, names_of, range_of, without
from meshwright.launch.supervise import Interrupts, RunState, now_unix_s
from meshwright.parallel.errors import MeshwrightError

__all__ = ["Relaunch", "decision_on_end", "history_of"]

_LOOK_S = 0.1
_ENDED = ("failed", "stopped", "succeeded")


def decision_on_end(state: RunState, run_dir: Path, since_unix_s: float) -> Decision | None:
    """What follows from the end of all agents; None where that is the end of the run.

    Args:
        state: of a run of which nothing is left.
        run_dir: of the run.
        since_unix_s: when it began: older checkpoints are of other runs.
    """
    told = state.decisions.get(state.attempt)
    agreed = None if told is None else told_decision(told)
    if not state.plan.limits.max_restarts or not _is_open(agreed, state):
        return None
    if agreed is not None and not state.losses.codes:
        return agreed
    failures = _lost(state) or _failed(state, run_dir)
    if not failures:
        return None
    worn_out = () if agreed is None else agreed.excludes
    step = newest_step(run_dir, since_unix_s)
    found = _decided(state, [replace(each, step=step) for each in failures])
    return replace(found, excludes=tuple(dict.fromkeys((*found.excludes, *worn_out))))


def _is_open(agreed: Decision | None, state: RunState) -> bool:
    """Whether something is left to be done: no agents agreed, some were lost, or they ended for us to start others."""
    if agreed is None:
        return True
    if state.losses.codes:
        return agreed.again or agreed.failure.only_lost
    return agreed.again and (bool(agreed.excludes) or state.plan.limits.regroup)


def _decided(state: RunState, failures: Sequence[Failure]) -> Decision:
    """By the policy that agents have, from what the launcher knows."""
    done = [Failure(name, done=True) for name, (word, _) in state.results.items() if word == "succeeded"]
    limits, run_id = state.plan.limits, state.plan.run_id
    stops, most = limits.hang_s is not None and limits.hang_action == "dump_and_stop", limits.max_restarts
    told = [*failures, *done]
    return decide(limits.retry, history_of(state), told, run_id=run_id, max_restarts=most, hang_stops=stops)


def _lost(state: RunState) -> list[Failure]:
    """Nodes of the attempt that are gone; none where they only ended with one that says what was wrong with it."""
    losses = state.losses
    if _is_broken(state) and losses.unplaced >= losses.codes.keys():
        return []
    return [_loss(losses, name) for name in losses.codes]


def _loss(losses: Losses, name: str) -> Failure:
    code, words = losses.cause_of(name)
    kind = "node" if code == Exit.UNAVAILABLE else "config"  # a key or a name that is wrong stays wrong
    placed = name not in losses.unplaced  # of others nobody knows whose fault it was, so it is none of theirs
    since_s = losses.since_unix_s
    return Failure(name, kind, code, time_unix_s=since_s, only_lost=not placed, evidence=words, lost=placed)


def _is_broken(state: RunState) -> bool:
    """Whether an agent failed, or what comes before its ranks: the setup of its node, or a meeting."""
    return any(word not in _ENDED for word, _ in state.results.values())


def _failed(state: RunState, run_dir: Path) -> list[Failure]:
    """What ranks of the attempt left, where no agents agreed on it and one of them failed by itself."""
    failed = any(end.code and not end.ended_by_us for end in state.ends.values())
    if state.attempt in state.decisions or _is_broken(state) or not failed:
        return []
    since_unix_s = state.attempt_unix_s
    return [seen(run_dir, list(state.ends.values()), attempt=state.attempt, since_unix_s=since_unix_s)]


def history_of(state: RunState) -> list[Decision]:
    """Decisions before; of an attempt whose agents could not tell, only that there was one."""
    blank = (Decision(True, "", 0.0, attempt, Failure("")) for attempt in range(state.attempt))
    known = state.decisions
    return [told_decision(known[each.attempt]) if each.attempt in known else each for each in blank]


@dataclass
class Relaunch:
    """Starts a run, and again when nothing of it is left, as its failure policy allows.

    Args:
        loaded: its job; kept up to date.
        base: directory the launch was typed in.
        request: what was asked of its cluster.
        started_unix_s: when the launch began.
        back: which of some nodes of a job that were lost can be used again.
    """

    loaded: LoadedJob
    base: Path
    request: StartRequest
    started_unix_s: float
    back: Callable[[LoadedJob, Sequence[str]], tuple[str, ...]] = nodes_back

    def __post_init__(self) -> None:
        self._asked = self.loaded
        self._secrets = {secret.name: secret.value for secret in self.request.program.secrets}
        self._mask = Mask(self._secrets.values())

    def first(self, cluster: Cluster, state: RunState, interrupts: Interrupts) -> Handle:
        """The first start, of an elastic job on as many nodes as its cluster has by now.

        Args:
            cluster: of the job.
            state: of the run, with the plan that was made for all nodes; takes the one that is started.
            interrupts: signals to the launcher; after one no further number of nodes is tried.
        """
        whole = state.plan

        def planned(each: LoadedJob) -> StartPlan:
            if sized(each).job.num_nodes == sized(replace(each, have=None)).job.num_nodes:
                return whole
            return cluster.plan(self._request(each, replace(whole.limits, regroup=can_return(cluster, each))))

        def write(each: LoadedJob, plan: StartPlan) -> None:
            if plan is not state.plan:
                self._write(each, plan)
                state.plan = plan

        loaded = counted(cluster, self.loaded, self.request)
        job = sized(loaded).job
        if counts(loaded) and job.num_nodes < loaded.job.num_nodes:
            asked = f"ranks start on {job.num_nodes} of at most {loaded.job.num_nodes} nodes"
            sys.stderr.write(f"meshwright: {asked}, as many as {job.cluster.type} has for them ({shape_of(job)})\n")
        self.loaded, state.plan, handle = started(
            cluster, loaded, planned, secrets=self._secrets, write=write, interrupts=interrupts
        )
        return handle

    def __call__(self, state: RunState, interrupts: Interrupts, say: Callable[[RunState], object]) -> Handle | None:
        """A new start of a run of which nothing is left; None where its end is the end.

        Args:
            state: of the run.
            interrupts: signals to the launcher; they end the wait.
            say: tells people that it will be.
        """
        decision = decision_on_end(state, self.request.run_dir, self.started_unix_s)
        if decision is None or interrupts.numbers:
            return None
        decision, loaded = self._masked(decision), self.loaded
        told = decision
        if decision.again:
            try:
                loaded = self._counted(self._regrouped(state.losses, decision.excludes))
                decision = _after_the_lost(decision, state.losses.until_unix_s)
                told = self._told(loaded, decision, state)
            except (SpareError, SizeError) as error:
                told = replace(decision, again=False, wait_s=0.0, reason=f"{error}; {self._advice()}")
        state.decisions[state.attempt] = told.as_dict()
        if not told.again:
            return None
        say(state)
        return (
            self._tried(loaded, state, decision, interrupts=interrupts)
            if _waited(decision.wait_s, interrupts)
            else None
        )

    def _tried(
        self, loaded: LoadedJob, state: RunState, decision: Decision, *, interrupts: Interrupts
    ) -> Handle | None:
        """The new start, or None where it cannot be had: the run ended by what failed before, and that is kept."""
        try:
            return self._start(loaded, state, decision, interrupts=interrupts)
        except MeshwrightError as error:
            given_up = replace(decision, again=False, wait_s=0.0, reason=str(error), nodes=None)
            state.decisions[state.attempt] = self._mask.inside(given_up.as_dict())
            with suppress(RunDirError):
                self._write(self.loaded, state.plan)
            return None

    def _masked(self, decision: Decision) -> Decision:
        """Without secrets: ranks may have left them in what they wrote of their end, and this goes into files."""
        found = decision.failure
        cleaned = replace(found, evidence=self._mask(found.evidence), sick=self._mask(found.sick))
        return replace(decision, reason=self._mask(decision.reason), failure=cleaned)

    def _regrouped(self, losses: Losses, lost: Sequence[str]) -> LoadedJob:
        """The job without nodes that are lost now, and with those that were lost before and are there again."""
        back = self.back(self._asked, losses.may_return)
        losses.take_back(back, now_unix_s())
        if not back:  # where the cluster finds nodes, it may have left some out by itself
            known = () if names_of(self.loaded.job) else losses.out
            return without(self.loaded, tuple(dict.fromkeys((*known, *lost))))
        return without(self._asked, tuple(dict.fromkeys((*losses.out, *lost))))

    def _counted(self, loaded: LoadedJob) -> LoadedJob:
        """The job with the number of nodes that its cluster has now, as far as it says."""
        with suppress(UnavailableError):  # the start will say so
            return counted(cluster_of(loaded), loaded, self.request) if counts(loaded) else loaded
        return loaded

    def _told(self, loaded: LoadedJob, decision: Decision, state: RunState) -> Decision:
        """With who is new, and how many there are."""
        job = sized(loaded).job
        before: Sequence[str] = used_names(self.loaded) or [node.name for node in state.plan.nodes]
        words = change_words(before, used_names(loaded) or job.num_nodes, decision.excludes)
        if job.num_nodes != len(before):
            decision = replace(decision, nodes=(len(before), job.num_nodes))
            words = f"{words} ({shape_of(job)})"
        return replace(decision, reason=f"{decision.reason}; {words}")

    def _advice(self) -> str:
        names = {"local": "cluster.simulate_nodes", "mpi": "cluster.hostfile"}
        where = names.get(self.loaded.job.cluster.type, "cluster.hosts")
        return f"put more into {where} than `nodes` needs, or repair it, and launch again to go on from the checkpoint"

    def _start(self, loaded: LoadedJob, state: RunState, decision: Decision, *, interrupts: Interrupts) -> Handle:
        cluster = examined_at_start(cluster_of(loaded), loaded, self.base)
        assert not isinstance(cluster, Queue), "a queue has launchers of its own"

        def planned(each: LoadedJob) -> StartPlan:
            past = (*history_of(state), self._told(each, decision, state))
            limits = replace(limits_of(each), past=past, regroup=can_return(cluster, each))
            return cluster.plan(self._request(each, limits))

        loaded = counted(cluster, loaded, self.request)
        loaded, plan, handle = started(
            cluster, loaded, planned, secrets=self._secrets, write=self._write, interrupts=interrupts
        )
        decision = self._told(loaded, decision, state)
        state.decisions[state.attempt] = decision.as_dict()
        self.loaded = loaded
        state.go_on(plan, decision)
        try:
            write_json(self.request.run_dir / EXCLUDED_FILE, state.losses.excluded)
        except BaseException:  # nobody would follow them
            handle.kill()
            raise
        return handle

    def _request(self, loaded: LoadedJob, limits: Limits) -> StartRequest:
        """What is asked of the cluster for a start, by an elastic job on as many nodes as it has."""
        if range_of(loaded.job) is None:
            return replace(self.request, limits=limits)
        job = sized(loaded).job
        return replace(self.request, limits=limits, num_nodes=job.num_nodes, num_ranks=job.num_ranks)

    def _write(self, loaded: LoadedJob, plan: StartPlan) -> None:
        write_json(self.request.run_dir / "plan.json", plan.as_dict())
        write_json(self.request.run_dir / "job.json", resolved_job(loaded, self.request.run_id, self.base))


def _after_the_lost(decision: Decision, until_unix_s: float) -> Decision:
    """With the wait for ranks that are only cut off and may save until then."""
    return replace(decision, wait_s=round(max(decision.wait_s, until_unix_s - time.time()), 3))


def _waited(wait_s: float, interrupts: Interrupts) -> bool:
    """Waits; tells whether nobody interrupted."""
    end_s = time.monotonic() + wait_s
    while not interrupts.numbers and time.monotonic() < end_s:
        time.sleep(_LOOK_S)
    return not interrupts.numbers
