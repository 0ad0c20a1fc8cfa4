"""Ends this rank when the job hangs, and says who is behind (`hang`) and where everybody stands.

Two daemon threads per rank: one writes what this rank is at to a board that all ranks see and reads theirs, the other
decides. It never waits for anything, so that a board that does not answer cannot silence it.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from meshwright.parallel.board import Board, board_of
from meshwright.parallel.flight_recorder import Recorder, recorded_from, save
from meshwright.parallel.hang import EXIT_CODE, Hang, Note, Sight, find_hang
from meshwright.parallel.progress import HERE, Progress, told

__all__ = ["Guard", "Watchdog", "guard", "unguard"]

_BEAT_S = 1.0
_MOST_READ_ALWAYS = 64  # beyond, the others are read only once this rank stands still
_FRAMES = 12
_NEAR = 4


@dataclass(frozen=True)
class Guard:
    """What is asked of a watchdog.

    Args:
        limit_s: how long a job may stand still.
        warn: only say so.
        run_dir: of a launched job, for the record; None writes none.
        progress: of this rank; None is that of this process.
    """

    limit_s: float
    warn: bool = False
    run_dir: Path | None = None
    progress: Progress | None = None


@dataclass
class _Seen:
    """The last word of another rank, and when this rank first saw it."""

    note: Note
    beat: int
    since_s: float
    pid: int = 0
    host: str = ""


class Watchdog:
    """The two threads of one rank.

    Args:
        rank: this one.
        num_ranks: of the job.
        board: where ranks write.
        asked: what to do when.
        leave: ends the process.
    """

    def __init__(
        self, rank: int, num_ranks: int, *, board: Board, asked: Guard, leave: Callable[[int], Any] = os._exit
    ) -> None:
        self._rank, self._board = rank, board
        self._asked = asked
        self._leave = leave
        self._here = HERE if asked.progress is None else asked.progress
        self._beat_s = min(_BEAT_S, asked.limit_s / 8)
        now = time.monotonic()
        self._awake_s = self._answered_s = now
        nothing = Note("nothing that it told", 0.0, patient=True)
        self._seen = {other: _Seen(nothing, -1, now) for other in range(num_ranks) if other != rank}
        self._over, self._recorder = threading.Event(), Recorder()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._publish, self._judge)]

    def start(self) -> None:
        """Begins to watch."""
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        """Tells the others that this rank has left, and watches no more."""
        self._over.set()
        self._threads[0].join(2.0)  # it may wait for a board that does not answer

    def _publish(self) -> None:
        beat = 0
        while True:
            over = self._over.is_set()
            with suppress(Exception):  # a full disk or a lost store: its age tells the other thread
                self._put(beat, left=over)
                self._answered_s = time.monotonic()
            if over:
                return
            beat += 1
            self._over.wait(self._beat_s)

    def _put(self, beat: int, *, left: bool) -> None:
        note = asdict(self._note(left=left))
        text = {
            **note,
            "rank": self._rank,
            "beat": beat,
            "life": _life(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        self._board.put(self._rank, json.dumps(text))
        still_s = time.monotonic() - self._here.at[0]
        if len(self._seen) < _MOST_READ_ALWAYS or still_s >= self._asked.limit_s / 4:
            for rank, each in self._board.read(self._seen).items():
                self._take(rank, json.loads(each))

    def _take(self, rank: int, text: dict[str, Any]) -> None:
        beat, pid, host = text["beat"], text["pid"], text["host"]
        before = self._seen[rank]
        if text["life"] == _life() and (beat, pid, host) != (before.beat, before.pid, before.host):
            fields = {name: text[name] for name in Note.__dataclass_fields__}
            fields |= {"waits_for": tuple(text["waits_for"]), "recorded": recorded_from(text["recorded"])}
            self._seen[rank] = _Seen(Note(**fields), beat, time.monotonic(), pid, host)

    def _note(self, *, left: bool = False) -> Note:
        at, step = self._here.at, self._here.step
        found = told(at)
        age_s = max(0.0, time.monotonic() - max(at[0], self._awake_s))
        still = age_s > self._asked.limit_s / 2
        stack, inside = _stacks() if still else ("", "")
        return Note(
            found.words,
            age_s,
            step,
            found.waits_for,
            found.call,
            "" if found.waits_for else inside,
            self._here.patient,
            left,
            self._here.place,
            stack,
            recorded_from(self._recorder.newest(still=still)),
        )

    def _judge(self) -> None:
        last_s, warned = time.monotonic(), None
        while not self._over.wait(self._beat_s):
            now_s = time.monotonic()
            if now_s - last_s > max(5 * self._beat_s, self._asked.limit_s / 2):
                self._awake_s = now_s  # this process itself was stopped: nobody's fault
            last_s = now_s
            if now_s - max(self._here.at[0], self._awake_s) < self._asked.limit_s or self._here.at is warned:
                continue
            hang = self._find(now_s)
            if hang is not None and self._asked.warn:
                warned = self._here.at
                _write(f"{hang.line}\n")
                if self._asked.run_dir is not None:
                    save(self._asked.run_dir, self._rank)
            elif hang is not None:
                self._end(hang)

    def _find(self, now_s: float) -> Hang | None:
        if now_s - self._answered_s > self._asked.limit_s / 2:
            line = f"hang: rank {self._rank} waits at {self._note().where} and cannot reach the other ranks' notes"
            return Hang((), {self._rank: "cannot reach the others"}, line)
        sights = {self._rank: Sight(self._note())}
        for rank, each in self._seen.items():
            quiet_s = 0.0 if each.note.left else now_s - max(each.since_s, self._awake_s)
            silent = quiet_s >= self._asked.limit_s / 2 and each.host == socket.gethostname()
            sights[rank] = Sight(each.note, quiet_s, _state(each.pid) if silent else "", each.beat >= 0)
        return find_hang(sights, self._asked.limit_s)

    def _end(self, hang: Hang) -> None:
        stacks = {rank: each.note.stack for rank, each in self._seen.items() if each.note.stack}
        stacks = dict(sorted({**stacks, self._rank: _stacks()[0]}.items()))
        shown = "".join(f"--- rank {rank}\n{stack}\n" for rank, stack in stacks.items())
        _write(f"{hang.line}\n{shown}")
        if self._asked.run_dir is not None:
            with suppress(OSError):
                _record(self._asked.run_dir, self._rank, hang, stacks=stacks)
            save(self._asked.run_dir, self._rank)
            time.sleep(2 * self._beat_s)  # others that find it too are ended once this one has
        self._leave(EXIT_CODE)
        self._over.set()


_GUARDING: list[Watchdog] = []


def guard(
    rank: int, num_ranks: int, *, hang_s: float | None, meeting: str | None, store: Callable[[], Any]
) -> Watchdog | None:
    """Watches over this process, if it is asked to by `hang_s` or by MESHWRIGHT_HANG_S.

    Args:
        rank: this one.
        num_ranks: of the job.
        hang_s: how long the job may stand still; None asks the environment.
        meeting: `init_method` of the ranks.
        store: gives a connection to the ranks' store.
    """
    unguard()
    limit_s = hang_s if hang_s is not None else float(os.environ.get("MESHWRIGHT_HANG_S") or 0)
    if limit_s <= 0:
        return None
    told = os.environ.get("MESHWRIGHT_RUN_DIR")
    run_dir = None if told is None else Path(told)
    board = board_of(meeting, run_dir, store)
    asked = Guard(limit_s, os.environ.get("MESHWRIGHT_HANG_ACTION") == "warn", run_dir)
    _GUARDING.append(Watchdog(rank, num_ranks, board=board, asked=asked))
    _GUARDING[-1].start()
    return _GUARDING[-1]


def unguard() -> None:
    """Watches no more, if it did."""
    while _GUARDING:
        _GUARDING.pop().stop()


def _life() -> str:
    """Which start of the job this is."""
    return os.environ.get("MESHWRIGHT_ATTEMPT") or os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0"


def _record(run_dir: Path, rank: int, hang: Hang, *, stacks: dict[int, str]) -> None:
    """Writes errors/hang-ATTEMPT.json, unless another rank was first."""
    text = {"time_unix_s": time.time(), "found_by": rank, **asdict(hang), "stacks": stacks}
    folder = run_dir / "errors"
    folder.mkdir(exist_ok=True)
    part = folder / f".hang-{rank}.part"
    part.write_text(json.dumps(text))
    with suppress(FileExistsError):
        os.link(part, folder / f"hang-{_life()}.json")
    part.unlink()


def _write(text: str) -> None:
    """Past sys.stderr, whose lock the stuck thread may hold."""
    with suppress(OSError):
        os.write(2, text.encode())


def _stacks() -> tuple[str, str]:
    """Where the main thread is, and others inside torch.distributed; and which function of it that is."""
    main = threading.main_thread().ident
    parts, found = [], ""
    for ident, frame in sys._current_frames().items():
        inside = _inside(frame)
        if ident == main or inside:
            parts.append(_shown(frame))
            found = found or inside
    return "\n".join(parts), found


def _inside(frame: FrameType | None) -> str:
    for _ in range(_NEAR):
        if frame is None:
            break
        if "/torch/distributed/" in frame.f_code.co_filename:
            return frame.f_code.co_name
        frame = frame.f_back
    return ""


def _shown(frame: FrameType | None) -> str:
    lines: list[str] = []
    while frame is not None and len(lines) < _FRAMES:
        lines.append(f"  {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return "\n".join(reversed(lines))


def _state(pid: int) -> str:
    """What became of a process of this machine."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "its process is gone"
    words = {"T": "its process is stopped by a signal", "t": "a debugger holds its process", "Z": "its process is dead"}
    return words.get(letter, f"its process is in state {letter}")
