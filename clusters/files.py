"""Agents that a queue starts: their line to the launcher of the run is a folder that all nodes share.

start.json       plan, secrets and key; for this user only, removed once all agents have it
command.jsonl    what the launcher says        node-N.jsonl    what agents say
alive            touched by the launcher; agents end when that stops, and whoever looks at the run says so much sooner
"""

import json
import os
import secrets as tokens
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any

from meshwright.clusters.base import StartPlan
from meshwright.clusters.lease import LOST_AFTER_S
from meshwright.clusters.lines import Lines, Tail, write_all
from meshwright.clusters.lost import LOST_CODE
from meshwright.clusters.sweep import sweep

__all__ = ["FileLine", "StepHandle", "alive_file", "step_folder"]

_LOOK_S = 0.1
_ALIVE_S = 2.0
_STALLED_S = 60.0  # without a look at agents, which no command that the launcher waits for takes
_LOST_AFTER_S = 120.0  # attributes of files on network file systems can be a minute old
_KILL_WAIT_S = 5.0
_WARN_S = 1.0
_LAST = ("result", "unheard")
_LAST_WORD_S = 5.0


def step_folder(run_dir: Path) -> Path:
    """Where the line of the newest start of a run lies."""
    return run_dir / "private" / "step"


def alive_file(run_dir: Path) -> Path:
    """What the launcher of the newest start of a run touches every two seconds, as long as it follows the run."""
    return step_folder(run_dir) / "alive"


class FileLine:
    """An agent's end.

    Args:
        folder: of the step.
        node: index of the agent's node.
    """

    def __init__(self, folder: Path, node: int) -> None:
        self._folder, self._node = folder, node
        self._lines = Lines(folder / f"node-{node}.jsonl")

    def has_words(self, timeout_s: float) -> bool:
        """Always: the plan is there before the agent."""
        return True

    def messages(self) -> Iterator[dict[str, Any]]:
        """The plan, then what the launcher says, for ever."""
        try:
            start = json.loads((self._folder / "start.json").read_text())
        except OSError as error:
            raise SystemExit(
                f"meshwright: node {self._node} does not see {self._folder}: {error.strerror}; a run directory on "
                "Slurm must lie on a file system that all nodes share: set logs.dir"
            ) from error
        yield {**start, "node": self._node, "lost_after_s": _LOST_AFTER_S, "lease_s": LOST_AFTER_S}
        commands, touched = Tail(self._folder / "command.jsonl", "command"), 0.0
        while True:
            said: list[dict[str, Any]] = []
            with suppress(OSError):  # the next look finds them
                said = commands.read()
            yield from said
            self._lines.flush()
            with suppress(OSError), (self._folder / "alive").open("rb") as file:  # a network file system looks anew
                now = os.fstat(file.fileno()).st_mtime
                if now != touched:
                    touched = now
                    yield {"command": "alive"}
            time.sleep(_LOOK_S)

    def tell(self, event: str, **fields: object) -> None:
        """Sends one event, or keeps it until it finds room; a last word waits for that, since nobody comes after it."""
        there, end_s = self._lines.add({"event": event, **fields}), time.monotonic() + _LAST_WORD_S
        while not there and event in _LAST and self._folder.exists() and time.monotonic() < end_s:
            time.sleep(_LOOK_S)
            there = self._lines.flush()


class _Kept:
    """What a launcher keeps in the folder besides its words: that it is there, and what starts agents."""

    def __init__(self, folder: Path, start: Mapping[str, Any], names: Sequence[str]) -> None:
        self._start, self._alive = folder / "start.json", folder / "alive"
        self._away, self._looked_s, self._over = set(names), time.monotonic(), Event()
        write_all(self._start, [json.dumps(start).encode() + b"\n"])
        self._touch()
        self._thread = Thread(target=self._go_on, name="alive", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """The launcher looks at its agents."""
        self._looked_s = time.monotonic()

    def _touch(self) -> None:
        with suppress(OSError):  # agents bear with it for a while
            self._alive.touch(mode=0o600)

    def _go_on(self) -> None:
        """Is heard of, every two seconds, also while the launcher waits for the queue; not where it looks no more."""
        while not self._over.wait(_ALIVE_S):
            if time.monotonic() - self._looked_s < _STALLED_S:
                self._touch()

    def take(self, name: str) -> None:
        """An agent has read plan, secrets and key; once all have, nobody needs them there."""
        self._away.discard(name)
        if not self._away:
            self._start.unlink(missing_ok=True)

    def end(self) -> None:
        """The key is taken away, and nobody waits to hear of this start any more."""
        self._over.set()
        self._thread.join(_ALIVE_S)
        for path in (self._start, self._alive):
            path.unlink(missing_ok=True)


class _Warner:
    """Repeats a warning: ranks that are started, or only begin to catch the signal, are to hear of it too."""

    def __init__(self, warning: Callable[[bool], str | None], say: Callable[..., None]) -> None:
        self._warning, self._say = warning, say
        self._next_s, self.asked, self.over = 0.0, False, False

    def warn(self) -> None:
        """Says it, if it is time."""
        if self.over:  # agents that are asked to end now are by us, whatever the queue says
            return
        asked, self.asked = self.asked, False
        number = self._warning(asked)
        if number == "":
            self._say("stop")
        elif number is not None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _WARN_S
            self._say("leave", signal=number)


class StepHandle:
    """Agents that one command starts on all nodes, such as srun.

    Args:
        plan: what is started, with the real names of nodes.
        secrets: values of the plan's secrets.
        words: the command.
        warning: gives the name of a signal once ranks are to be warned by it, and "" where agents that were asked to
            end are to do so; it is told whether one was since it was called before.
        reached: whether anybody else than the nodes is heard of here, on the first of them.
    """

    def __init__(
        self,
        plan: StartPlan,
        secrets: Mapping[str, str],
        *,
        words: Sequence[str],
        warning: Callable[[bool], str | None],
        reached: Callable[[], bool] = lambda: True,
    ) -> None:
        self._plan, self._reached = plan, reached
        self._folder = step_folder(Path(plan.run_dir))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        start = {"plan": asdict(plan), "secrets": dict(secrets), "key": tokens.token_hex(32)}
        self._kept = _Kept(self._folder, start, [node.name for node in plan.nodes])
        self._tails = {node.name: Tail(self._folder / f"node-{node.index}.jsonl", "event") for node in plan.nodes}
        self._commands = Lines(self._folder / "command.jsonl")
        self._warner = _Warner(warning, self._say)
        self._left = set(self._tails)
        self._ended, self._cut = False, False
        self._late: list[dict[str, Any]] = []
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)

    def _say(self, command: str, **fields: object) -> None:
        self._commands.add({"command": command, **fields})

    @property
    def done(self) -> bool:
        """Whether no agent is left; for a node that is cut off the command waits much longer than anybody else."""
        return (self._ended or (self._cut and not self._left)) and not self._late

    def poll(self, timeout_s: float) -> list[dict[str, Any]]:
        """Events since the last call, waiting for one at most so long."""
        self._kept.look()
        self._warner.warn()
        self._commands.flush()
        end_s = time.monotonic() + timeout_s
        found, self._late = self._late, []
        while not self._ended:
            code = self._process.poll()  # before the last look, so that nothing is missed
            found += self._look()
            if code is not None:
                self._ended = True
                found += [{"node": name, "event": "gone", "code": code} for name in sorted(self._left)]
            if found or time.monotonic() >= end_s:
                break
            time.sleep(min(_LOOK_S, timeout_s))
        return found

    def _look(self) -> list[dict[str, Any]]:
        found = [{**event, "node": name} for name, tail in self._tails.items() for event in tail.read()]
        for event in list(found):
            if event["event"] == "meeting":
                self._say("meet", address=event["address"], port=event["port"])
            elif event["event"] == "joined":
                self._kept.take(event["node"])
            elif event["event"] == "asked":
                self._warner.asked = True
            elif event["event"] == "result":
                self._left.discard(event["node"])
            elif event["event"] == "unheard":
                found += self._lose(event["of"])
        return found

    def _lose(self, index: int) -> list[dict[str, Any]]:
        """A node is cut off, if it had not ended before, or this one is: it is said, and counts as gone."""
        name, first = self._plan.nodes[index].name, self._plan.nodes[0].name
        if name not in self._left:
            return []
        self._left.discard(name)
        words = f"node {name}: it was not heard of over the network for {LOST_AFTER_S:g} s; is it up, and its link?"
        if not self._cut and not self._reached():
            what = f"neither {name}, for {LOST_AFTER_S:g} s, nor the queue's controller was heard of over the network"
            name, words = first, f"node {first}: {what}; its own link seems to be cut"
        self._cut = True
        said = {"event": "health", "fault": None, "found": words, "time_unix_s": round(time.time(), 3)}
        gone = {"event": "gone", "code": LOST_CODE, "exit_code": LOST_CODE, "message": words}
        return [{"node": name, **said}, {"node": name, **gone}]

    def stop(self) -> None:
        """Asks all agents to end their ranks: TERM, then KILL after the plan's grace."""
        self._say("stop")

    def kill(self) -> None:
        """Ends everything of this run at once, and takes what was secret away."""
        late, self._warner.over = [], True
        if not self._ended:
            self._say("kill")
            end_s = time.monotonic() + _KILL_WAIT_S
            while not self._ended and time.monotonic() < end_s and (self._left or not self._cut):
                late += self.poll(0.1)
        for end in (self._process.terminate, self._process.kill):
            if self._process.poll() is None:
                end()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_KILL_WAIT_S / 5 if self._cut else _KILL_WAIT_S)
        if not self._ended:
            late += self.poll(0.1)
        self._late += late
        sweep(self._plan.run_id)
        self._kept.end()
