"""What torch itself recorded of this rank's collectives: its flight recorder, which also sees what our notes do not.

torch 2.13 records in memory without being asked: over gloo (collectives only, whose state it leaves at "scheduled") in
one recorder, over NCCL in another, which torches without NCCL lack. TORCH_FR_BUFFER_SIZE=0 turns that off, and must be
set before groups are made. Where nothing is recorded, nothing is claimed. It is asked in a thread, since what hangs may
hold its lock. What a rank says of it is as short on any number of ranks, since each reads it of all.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any
from zlib import crc32

__all__ = ["Recorded", "Recorder", "Started", "recorded_from", "save"]

_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
_NEWEST = 100
_RECENT = 32
_OF_A_GROUP = 2
_OF_ONE_SIZE = ("all_reduce", "broadcast", "reduce")
_MOST_STARTED = 2
_ANSWER_S = 2.0
_SIZES = 60


@dataclass(frozen=True)
class Started:
    """A collective that a rank has called and that is not over.

    Args:
        group: backend and name of its process group, alike on all of its ranks, such as "nccl:0".
        number: among the collectives of that group.
        kind: such as "all_reduce".
        words: what people are told of it: the group's description, sizes, element type, state.
    """

    group: str
    number: int
    kind: str
    words: str


@dataclass(frozen=True)
class Recorded:
    """What a rank's recorder says; empty where there is none.

    Args:
        started: collectives that are not over, the oldest first.
        last: group -> number of the collective that was called last, where that is known.
        members: group of this rank -> digest of its ranks, since groups may share a name.
        newest: "group/number" -> what was called, as far as that must be alike on all ranks; the last of each group.
    """

    started: tuple[Started, ...] = ()
    last: Mapping[str, int] = field(default_factory=dict)
    members: Mapping[str, int] = field(default_factory=dict)
    newest: Mapping[str, str] = field(default_factory=dict)

    def missing(self, others: Mapping[int, "Recorded"]) -> tuple[Started, Mapping[int, str]] | None:
        """The oldest collective that some of its ranks have not called, and these with why; None where there is none.

        Args:
            others: what other ranks' recorders say.

        >>> call = Started("gloo:0", 3, "all_reduce", "")
        >>> Recorded((call,), {"gloo:0": 3}, {"gloo:0": 7}).missing({1: Recorded((), {"gloo:0": 2}, {"gloo:0": 7})})[1]
        {1: 'its last is number 2'}
        """
        for call in self.started:
            told = {rank: self._why(others[rank], call) for rank in sorted(others)}
            absent = {rank: why for rank, why in told.items() if why}
            if absent:
                return call, absent
        return None

    def _why(self, other: "Recorded", call: Started) -> str:
        """How another rank of that group is known not to have called this: fewer, or something else instead."""
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
    return Recorded(
        tuple(Started(**each) for each in saved["started"]), saved["last"], saved["members"], saved["newest"]
    )


def _dump() -> Mapping[str, Any]:
    """All that torch's recorders have; nothing where they are off, or where this torch has none."""
    from torch._C import _distributed_c10d

    asked: list[Any] = [getattr(_distributed_c10d, name, None) for name in _DUMPS]
    found: list[dict[str, Any]] = [json.loads(ask(True, False)) for ask in asked if ask is not None]
    entries = [entry for each in found for entry in each.get("entries") or ()]
    whole = {key: value for each in found for key, value in each.items()}
    return {**whole, "entries": sorted(entries, key=lambda entry: entry.get("time_created_ns", 0))}


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
    last = _last(dump["entries"], calls, groups)
    members = {name: crc32(repr(tuple(groups[name.partition(":")[2]])).encode()) for name in last}
    started = [each for each in calls if not each["retired"] and each["state"] != "completed"][:_MOST_STARTED]
    newest = {
        f"{_group(each)}/{each['collective_seq_id']}": _alike(each)
        for each in [*started, *calls[-_RECENT:]]
        if each in started or int(each["collective_seq_id"]) > last[_group(each)] - _OF_A_GROUP
    }
    return {"started": [_started(each) for each in started], "last": last, "members": members, "newest": newest}


def _last(
    entries: Sequence[Mapping[str, Any]], calls: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    last: dict[str, int] = {}
    for backend in {_backend(each) for each in entries}:
        if min(each["record_id"] for each in entries if _backend(each) == backend) == 0:
            last.update({f"{backend}:{name}": 0 for name in groups})  # otherwise the last of a group may be forgotten
    for each in calls:
        last[_group(each)] = max(last.get(_group(each), 0), int(each["collective_seq_id"]))
    return last


def _backend(call: Mapping[str, Any]) -> str:
    """Such as "nccl": each records and counts by itself, also of groups that have several."""
    return str(call["profiling_name"]).partition(":")[0]


def _group(call: Mapping[str, Any]) -> str:
    return f"{_backend(call)}:{call['process_group'][0]}"


def _alike(call: Mapping[str, Any]) -> str:
    """What must be alike on all ranks of a call: its kind, and of some kinds the sizes."""
    kind = str(call["profiling_name"].partition(":")[2])
    return f"{kind} {_sizes(call)}" if kind in _OF_ONE_SIZE else kind


def _sizes(call: Mapping[str, Any]) -> str:
    return f"{'/'.join(dict.fromkeys(call['input_dtypes']))} {json.dumps(call['input_sizes'])[:_SIZES]}".lstrip()


def _started(call: Mapping[str, Any]) -> dict[str, Any]:
    group, described = call["process_group"]
    name = f"process group {group}" + (f" ({described})" if described not in ("", "undefined") else "")
    kind, number = call["profiling_name"].partition(":")[2], int(call["collective_seq_id"])
    words = f"{kind} number {number} of {name}, {_sizes(call)}, {call['state']}"
    return {"group": _group(call), "number": number, "kind": kind, "words": words}


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
