"""Runs without a launcher, whose nodes share no directory with us: who looks at one does what a launcher would.

What nodes printed since the last look goes into the run's logs, merged.log and launcher.log; its end becomes exit.json.
One looks at a time, whoever it is, and private/fetched.json says how far that came: nothing is lost, and kept
twice only if who looks is killed between the two.
"""

import base64
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.clusters.base import StartPlan, log_name
from meshwright.clusters.blame import Verdict
from meshwright.clusters.contract import DistantQueue, Job, Lost, Said
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.pod_lines import last_lines, missing_of
from meshwright.clusters.pod_sizes import plan_of_pods
from meshwright.clusters.records import clean_line
from meshwright.clusters.saved import plan_from
from meshwright.clusters.sending import Keeper
from meshwright.launch.exits import Exit
from meshwright.launch.follow import Run, conclude, places
from meshwright.launch.report import Outcome
from meshwright.launch.rundir import ASKED_FILE, write_json
from meshwright.launch.sizes import SizeError, size_of
from meshwright.launch.supervise import RunState
from meshwright.launch.values import fill

if TYPE_CHECKING:
    from meshwright.launch.runs import Known

__all__ = ["Fetched", "end_of", "fetch", "note_cancelled"]

FETCHED_FILE = "private/fetched.json"
"""How far what nodes printed is here, and their last words."""

_EVERY_S = 2.0
_OVERLAP_S = 10.0  # lines show up a moment after they are printed, and each machine counts seconds by its own clock
_WAIT_S, _TRY_S = 30.0, 0.1  # for another who looks
_RECORD = '{"meshwright": '


class Fetched:
    """What is here of a run's output.

    Args:
        run_dir: of the run, here.
        shown: ranks whose lines are for people; None is all.
    """

    def __init__(self, run_dir: Path, shown: tuple[int, ...] | None) -> None:
        self._run_dir, self._shown = run_dir, shown
        self.plan = plan_from(json.loads((run_dir / "plan.json").read_text()))
        self.job = json.loads((run_dir / "job.json").read_text())
        whole = run_dir / ASKED_FILE  # of an elastic run: pods may be others at its next start
        self._whole = json.loads(whole.read_text()) if whole.exists() else None
        most = self.plan if self._whole is None else plan_from(self._whole["plan"])
        self._names, self._num_ranks = {node.name for node in most.nodes}, most.world_size
        self._asked_unix_s: float | None = None
        self._last: dict[str, int] = {}
        self.records: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError):
            told = json.loads((run_dir / FETCHED_FILE).read_text())
            self._asked_unix_s, self._last, self.records = told["asked_unix_s"], told["last"], told["records"]

    @property
    def recent(self) -> bool:
        """Whether somebody has just looked."""
        return self._asked_unix_s is not None and 0 <= time.time() - self._asked_unix_s < _EVERY_S

    def ask(self, queue: DistantQueue, job: str) -> None:
        """Takes what nodes printed since the last time.

        Raises:
            UnavailableError: when the queue does not answer.
        """
        now_s, before_s = time.time(), self._asked_unix_s
        said = queue.said(job, None if before_s is None else max(0.0, now_s - before_s) + _OVERLAP_S)
        new = [each for each in said if each.at > self._last.get(each.node, 0)]
        self._keep(sorted(new, key=lambda each: each.at))
        self._last |= {each.node: each.at for each in new}
        self._asked_unix_s = now_s
        told = {"asked_unix_s": now_s, "last": self._last, "records": self.records}
        write_json(self._run_dir / FETCHED_FILE, told)

    def _keep(self, new: Iterable[Said]) -> None:
        lines: dict[str, list[str]] = {}
        for each in new:
            who, _, text = each.text.partition(" ")
            host, _, rank = who.rpartition(":")
            if self._is_rank(host, rank):
                for name, line in self._lines(host, int(rank), clean_line(text.encode())):
                    lines.setdefault(name, []).append(line)
            elif each.text.startswith(_RECORD):
                for name, line in self._of_record(each, lines):
                    lines.setdefault(name, []).append(line)
            else:  # the pod's own words, such as that there is no meshwright in its image
                lines.setdefault(f"logs/agent-{each.node}.log", []).append(each.text)
                lines.setdefault("launcher.log", []).append(f"{each.node} | {clean_line(each.text.encode())}")
        for name, found in lines.items():
            self._append(name, "\n".join(found))

    def _is_rank(self, host: str, rank: str) -> bool:
        """Whether a node of the run may have a rank; of an elastic run each may have any, one start after the other."""
        return host in self._names and rank.isdecimal() and int(rank) < self._num_ranks

    def _lines(self, host: str, rank: int, text: str) -> Iterator[tuple[str, str]]:
        """Files that get a line of a rank, and how it reads there."""
        line = f"{fill(self.job['logs']['prefix'], host=host, rank=str(rank))} | {text}"
        yield log_name(rank), text
        yield "merged.log", line
        if self._shown is None or rank in self._shown:
            yield "launcher.log", line

    def _of_record(self, said: Said, lines: Mapping[str, list[str]]) -> list[tuple[str, str]]:
        """Keeps a record; of one of lines that an earlier pod left, those that nobody had fetched before it went."""
        try:
            record = json.loads(said.text)["meshwright"]
            if "left" in record:
                host, rank = str(record["node"]), int(record["rank"])
                if not self._is_rank(host, str(rank)):
                    return []
                known = [*last_lines(self._run_dir / log_name(rank)), *lines.get(log_name(rank), [])]
                missing = missing_of(known, [str(line) for line in record["left"]])
                return [each for line in missing for each in self._lines(host, rank, line)]
            if "pods" in record:
                self._take_pods([int(pod) for pod in record["pods"]])
            else:
                self._keep_record(said.node, record["events"], record["files"])
        except (ValueError, KeyError, TypeError):
            pass  # of another version in the image
        return []

    def _take_pods(self, pods: Sequence[int]) -> None:
        """Plan and job of an elastic run are those of the pods that have ranks since its last start."""
        from meshwright.launch.spec.job import Job as Spec

        if self._whole is None or not set(pods) <= set(range(len(self._names))):
            return
        self.plan = plan_of_pods(plan_from(self._whole["plan"]), pods)
        with suppress(SizeError):  # where too few came, nothing ran
            self.job = size_of(Spec.model_validate(self._whole["job"]), len(pods)).as_dict()
        write_json(self._run_dir / "plan.json", self.plan.as_dict())
        write_json(self._run_dir / "job.json", self.job)

    def _keep_record(self, node: str, events: Any, files: Mapping[str, Any]) -> None:
        self.records[node] = {"events": events}
        for name, value in files.items():
            lines = value if name.endswith(".jsonl") else [value]
            data = base64.b64encode("".join(f"{json.dumps(line)}\n" for line in lines).encode()).decode()
            Keeper(self._run_dir)({"path": name, "at": 0, "data": data})

    def _append(self, name: str, line: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(os.open(self._run_dir / name, flags, 0o600), "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def end(self, outcome: Outcome) -> None:
        """Writes the exit record, and says what a launcher would."""
        if outcome.exit_code:
            self._append("launcher.log", f"meshwright: {outcome}")
        self._append("launcher.log", places(self._run_dir).rstrip("\n"))
        write_json(self._run_dir / "exit.json", outcome.as_dict())


def _taken(held: int, wait_s: float) -> bool:
    end_s = time.monotonic() + wait_s
    while True:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= end_s:
            return False
        time.sleep(_TRY_S)


@contextmanager
def _alone(run_dir: Path, *, wait_s: float = 0.0) -> Iterator[bool]:
    """Whether nobody else looks at this run, or has done so in time; from then on nobody else does."""
    held = os.open(run_dir / "private" / "fetching", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        yield _taken(held, wait_s)
    finally:
        os.close(held)


def fetch(known: "Known", queue: DistantQueue) -> None:
    """Brings what nodes said since somebody last looked; a queue that does not answer is asked again later.

    Args:
        known: the run.
        queue: that has it.
    """
    assert known.job is not None, "a run of a queue"
    run_dir = Path(known.run_dir)
    with _alone(run_dir) as alone, suppress(UnavailableError):
        if alone and not (run_dir / "exit.json").exists() and not (found := Fetched(run_dir, known.shown)).recent:
            found.ask(queue, known.job)


def end_of(known: "Known", queue: DistantQueue, ended: Job) -> None:
    """Writes down how a run ended, unless somebody else has done it meanwhile.

    Args:
        known: the run.
        queue: that has it.
        ended: what the queue says of its end.
    """
    from meshwright.launch.spec.job import Job as Spec

    assert known.job is not None, "a run of a queue"
    run_dir = Path(known.run_dir)
    with _alone(run_dir, wait_s=_WAIT_S) as alone:
        if not alone or (run_dir / "exit.json").exists():
            return
        found = Fetched(run_dir, known.shown)
        with suppress(UnavailableError):
            found.ask(queue, known.job)
        state = RunState.of(found.plan)
        for event in _events(found.plan, found.records, lost=queue.lost(known.job), ended=ended):
            state.observe(event)
        run = Run(Spec.model_validate(found.job), found.plan, known.shown, (), known.started_unix_s)
        found.end(conclude(run, state, [], one_log=True))


def _events(
    plan: StartPlan, records: Mapping[str, Mapping[str, Any]], *, lost: Mapping[str, Lost], ended: Job
) -> list[dict[str, Any]]:
    """What agents said, in its order; of nodes that were lost or said nothing, what the queue says of them."""
    names = {node.name for node in plan.nodes}  # of an elastic run others may have had ranks before
    disrupted = {node for node, each in lost.items() if each.disrupted}
    told = [
        {**event, "node": node}
        for node, record in records.items()
        for event in record["events"]
        if node in names and not (node in disrupted and event["event"] == "result")
    ]
    told.sort(key=lambda event: float(event.pop("told_unix_s", 0.0)))
    spoke = {node for node, record in records.items() if any(each["event"] == "result" for each in record["events"])}
    silent = [node.name for node in plan.nodes if node.name in disrupted or node.name not in spoke]
    silent.sort(key=lambda node: (node not in disrupted, node not in lost))
    over = any(event["event"] == "decided" and not event["again"] for event in told)
    return told + [_of_silent(node, lost.get(node), ended, over=over) for node in silent]


def _of_silent(node: str, lost: Lost | None, ended: Job, *, over: bool) -> dict[str, Any]:
    """What became of a node that said no last word; once the run was over its pod was deleted, which is no loss."""
    if lost is None and over:
        return {"event": "result", "node": node, "state": "stopped"}
    if lost is None and not ended.exit_code:
        return {"event": "result", "node": node, "state": "succeeded"}
    lost = lost or Lost(ended.exit_code or int(Exit.UNAVAILABLE), f"{node} ended without a word; {ended.detail}")
    return {"event": "gone", "node": node, "code": lost.exit_code, "exit_code": lost.exit_code, "message": lost.why}


def note_cancelled(known: "Known") -> None:
    """Writes down that a run was cancelled, which nothing else would tell once its queue has forgotten it."""
    with _alone(Path(known.run_dir), wait_s=_WAIT_S):
        if (Path(known.run_dir) / "exit.json").exists():  # it had ended by itself
            return
        times_s = (known.started_unix_s, round(time.time(), 3))
        why, code = f"job {known.job} was cancelled", 128 + signal.SIGINT
        outcome = Outcome(known.run_id, "cancelled", code, Verdict(None), why, 1, *times_s)
        Fetched(Path(known.run_dir), known.shown).end(outcome)
