"""What torch itself recorded of this rank's collectives: its flight recorder, which also sees what our notes do not.

torch 2.13 records in memory without being asked, over gloo (collectives only, whose state it leaves at "scheduled") and
NCCL alike; TORCH_FR_BUFFER_SIZE=0 turns that off, and must be set before groups are made. Where it records nothing, or
has no such recorder, nothing is claimed. It is asked in a thread, since what hangs may hold its lock.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any
from zlib import crc32

__all__ = ["Recorded", "Recorder", "Started", "recorded_from", "save"]

_NEWEST = 100
_RECENT = 32
_OF_ONE_SIZE = ("all_reduce", "broadcast", "reduce")
_MOST_STARTED = 8
_ANSWER_S = 2.0
_SIZES = 60


@dataclass(frozen=True)
class Started:
    """A collective that a rank has called and that is not over.

    Args:
        group: name of its process group, alike on all of its ranks.
        number: among the collectives of that group.
        kind: such as "all_reduce".
        words: what people are told of it: the group's description, sizes, element type, state.
        ranks: that must come to it.
    """

    group: str
    number: int
    kind: str
    words: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Recorded:
    """What a rank's recorder says; empty where there is none.

    Args:
        started: collectives that are not over, the oldest first.
        last: group -> number of the collective that was called last, where that is known.
        members: group -> digest of its ranks, since groups may share a name.
        newest: "group/number" -> what was called, as far as that must be alike on all ranks.
    """

    started: tuple[Started, ...] = ()
    last: Mapping[str, int] = field(default_factory=dict)
    members: Mapping[str, int] = field(default_factory=dict)
    newest: Mapping[str, str] = field(default_factory=dict)

    def missing(self, others: Mapping[int, "Recorded"]) -> tuple[Started, Mapping[int, str]] | None:
        """The oldest collective that some of its ranks have not called, and these with why; None where there is none.

        Args:
            others: what other ranks' recorders say.

        >>> call = Started("0", 3, "all_reduce", "", (0, 1))
        >>> Recorded((call,), {"0": 3}, {"0": 7}).missing({1: Recorded((), {"0": 2}, {"0": 7})})[1]
        {1: 'its last is number 2'}
        """
        for call in self.started:
            told = {rank: self._why(others[rank], call) for rank in call.ranks if rank in others}
            absent = {rank: why for rank, why in told.items() if why}
            if absent:
                return call, absent
        return None

    def _why(self, other: "Recorded", call: Started) -> str:
        """How another rank is known not to have called this: fewer of that group, or something else instead."""
        if call.group not in other.last or other.members.get(call.group) != self.members.get(call.group):
            return ""
        if other.last[call.group] < call.number:
            return f"its last is number {other.last[call.group]}"
        key = f"{call.group}/{call.number}"
        own, instead = self.newest.get(key), other.newest.get(key)
        return f"it called {instead}" if own and instead and own != instead else ""


def recorded_from(saved: Mapping[str, Any]) -> Recorded:
    """What a rank's recorder says, from its JSON form.

    >>> recorded_from({}) == Recorded()
    True
    """
    if not saved:
        return Recorded()
    started = tuple(Started(**{**each, "ranks": tuple(each["ranks"])}) for each in saved["started"])
    return Recorded(started, saved["last"], saved["members"], saved["newest"])


def _dump() -> Mapping[str, Any]:
    """All that torch has; nothing where its recorder is off, or where this torch has none."""
    from torch._C import _distributed_c10d

    ask: Any = getattr(_distributed_c10d, "_dump_fr_trace_json", None)
    found: Mapping[str, Any] = {} if ask is None else json.loads(ask(True, False))
    return found


def _groups() -> dict[str, tuple[int, ...]]:
    """Name -> ranks of every process group of this rank; torch has no public list of them."""
    import torch.distributed as dist  # who reads what ranks wrote needs no torch

    world: Any = dist.distributed_c10d._world
    return {str(name): tuple(world.pg_group_ranks[group]) for group, name in dict(world.pg_names).items()}


def _told(dump: Mapping[str, Any], groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The JSON form of what a dump says of collectives."""
    if not dump.get("entries"):
        return {}
    calls = [each for each in dump["entries"] if not each["is_p2p"] and each["process_group"][0] in groups]
    whole = min(each["record_id"] for each in dump["entries"]) == 0  # otherwise the last of a group may be forgotten
    last: dict[str, int] = dict.fromkeys(groups, 0) if whole else {}
    for each in calls:
        group = each["process_group"][0]
        last[group] = max(last.get(group, 0), int(each["collective_seq_id"]))
    members = {name: crc32(repr(tuple(ranks)).encode()) for name, ranks in groups.items()}
    newest = {f"{each['process_group'][0]}/{each['collective_seq_id']}": _alike(each) for each in calls[-_RECENT:]}
    started = list(_started(calls, groups))[:_MOST_STARTED]
    return {"started": started, "last": last, "members": members, "newest": newest}


def _alike(call: Mapping[str, Any]) -> str:
    """What must be alike on all ranks of a call: its kind, and of some kinds the sizes."""
    kind = str(call["profiling_name"].partition(":")[2])
    return f"{kind} {_sizes(call)}" if kind in _OF_ONE_SIZE else kind


def _sizes(call: Mapping[str, Any]) -> str:
    return f"{'/'.join(dict.fromkeys(call['input_dtypes']))} {json.dumps(call['input_sizes'])[:_SIZES]}".lstrip()


def _started(calls: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[int]]) -> Iterator[dict[str, Any]]:
    for each in calls:
        if each["retired"] or each["state"] == "completed":
            continue
        group, described = each["process_group"]
        name = f"process group {group}" + (f" ({described})" if described not in ("", "undefined") else "")
        kind, number = each["profiling_name"].partition(":")[2], int(each["collective_seq_id"])
        words = f"{kind} number {number} of {name}, {_sizes(each)}, {each['state']}"
        yield {"group": group, "number": number, "kind": kind, "words": words, "ranks": list(groups[group])}


class Recorder:
    """Asks torch's recorder while this rank stands still.

    Args:
        ask: gives its dump.
        groups: gives name -> ranks of process groups.
    """

    def __init__(
        self,
        ask: Callable[[], Mapping[str, Any]] = _dump,
        groups: Callable[[], Mapping[str, Sequence[int]]] = _groups,
    ) -> None:
        self._ask, self._groups = ask, groups
        self._found: dict[str, Any] = {}
        self._thread: Thread | None = None

    def newest(self, *, still: bool) -> dict[str, Any]:
        """What it said last in this standstill, as JSON-able values; it is asked again for the next time.

        Args:
            still: whether the rank stands still.
        """
        if not still:
            self._found = {}
        elif self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._take, name="flight recorder", daemon=True)
            self._thread.start()
        return self._found

    def _take(self) -> None:
        with suppress(Exception):  # a torch without it, or whose form is another
            self._found = _told(self._ask(), self._groups())


def save(run_dir: Path, rank: int, ask: Callable[[], Mapping[str, Any]] = _dump) -> None:
    """Writes hang/fr-rank-N.json of a run directory, where torch records: its newest entries, and what groups stand at.

    Args:
        run_dir: of the run.
        rank: this one.
        ask: gives the recorder's dump.
    """

    def write() -> None:
        with suppress(Exception):
            found = ask()
            if found.get("entries"):
                path = run_dir / "hang" / f"fr-rank-{rank}.json"
                path.parent.mkdir(mode=0o700, exist_ok=True)
                path.write_text(json.dumps({**found, "entries": found["entries"][-_NEWEST:]}))

    thread = Thread(target=write, daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
