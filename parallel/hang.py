"""Who is behind when nothing moves any more, from what the ranks said last. Pure.

A rank that does not answer is behind; else one that computes while others wait for it; else those that wait for each
other. A rank that waits for another is a victim. Nothing hangs as long as one rank moves.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from meshwright.parallel.flight_recorder import Recorded, Started

__all__ = ["EXIT_CODE", "PATIENCE_S", "Hang", "Note", "Sight", "find_hang"]

EXIT_CODE = 125
"""Of a process that ends because its ranks hang."""

PATIENCE_S = 600.0
"""The limit while a rank says that it has not finished a step yet, or writes a checkpoint, where the user's is shorter.
"""

_MOST_NAMED = 8


@dataclass(frozen=True)
class Note:
    """What a rank says of itself.

    Args:
        words: what it is at.
        age_s: how long.
        step: optimizer step, None outside of steps.
        waits_for: ranks without which it cannot go on.
        call: that all of these must come to; empty where they need not wait as well.
        inside: function of torch.distributed that it is in, though it did not say that it waits.
        patient: whether this may take long.
        left: whether it has left the others in peace.
        place: on the mesh, such as "pp=1, dp=0".
        stack: where its threads are, once it stands still.
        recorded: what torch recorded of its collectives, once it stands still.
    """

    words: str
    age_s: float
    step: int | None = None
    waits_for: tuple[int, ...] = ()
    call: str = ""
    inside: str = ""
    patient: bool = False
    left: bool = False
    place: str = ""
    stack: str = ""
    recorded: Recorded = field(default_factory=Recorded)

    @property
    def where(self) -> str:
        """What it is at, with the step."""
        step = "" if self.step is None else f"step {self.step}, "
        return step + self.words + (f", inside {self.inside}" if self.inside else "")

    @property
    def waits(self) -> bool:
        """Whether another rank keeps it from going on."""
        return bool(self.waits_for or self.inside)


@dataclass(frozen=True)
class Sight:
    """A note, as another rank sees it.

    Args:
        note: the last one.
        quiet_s: since when there was no newer one, though ranks write one a second.
        state: of the process, in words, where that is known.
        heard: whether it has said anything yet.
    """

    note: Note
    quiet_s: float = 0.0
    state: str = ""
    heard: bool = True

    @property
    def still_s(self) -> float:
        """How long the rank is not known to have moved."""
        return self.note.age_s + self.quiet_s

    def silent(self, limit_s: float) -> bool:
        """Whether it has said nothing for so long, though it had said something before."""
        return self.heard and self.quiet_s >= limit_s

    def patient(self, limit_s: float, *, others_silent: bool) -> bool:
        """Whether it may take long: not who has fallen silent, whatever it said last, nor who waits where another has.

        Args:
            limit_s: how long a job may stand still.
            others_silent: whether any rank has fallen silent.
        """
        return self.note.patient and not self.silent(limit_s) and not (others_silent and self.note.waits)


@dataclass(frozen=True)
class Hang:
    """A job that does not move any more.

    Attributes:
        suspects: ranks that keep the others waiting; none where all wait in the same call.
        ranks: rank -> its part, in words.
        line: all of it.
    """

    suspects: tuple[int, ...]
    ranks: Mapping[int, str]
    line: str


def find_hang(sights: Mapping[int, Sight], limit_s: float) -> Hang | None:
    """Decides whether a job hangs, and because of whom.

    Args:
        sights: all ranks, as one of them sees them.
        limit_s: how long a job may stand still.

    >>> stuck = {0: Sight(Note("1RECV_F0", 9.0, 3, waits_for=(1,))), 1: Sight(Note("0F0", 9.5, 3))}
    >>> print(find_hang(stuck, 5.0).line)
    hang: rank 1 has been at step 3, 0F0 for 10 s; rank 0 waits for rank 1 at step 3, 1RECV_F0
    >>> find_hang(stuck, 20.0) is None
    True
    """
    present = {rank: sight for rank, sight in sights.items() if not sight.note.left}
    others_silent = any(sight.silent(limit_s) for sight in present.values())
    patient = any(sight.patient(limit_s, others_silent=others_silent) for sight in present.values())
    limit = max(limit_s, PATIENCE_S) if patient else limit_s
    if not present or min(sight.still_s for sight in present.values()) < limit:
        return None
    silent = [rank for rank, sight in present.items() if sight.quiet_s >= limit_s / 2]
    edges = {rank: _edges(rank, sights) for rank in sights}
    suspects = silent or _running(sights, edges) or _circle(present, edges)
    return _told(sights, tuple(suspects), silent)


def _edges(rank: int, sights: Mapping[int, Sight]) -> list[int]:
    """The ranks that one waits for: of a call that all must come to, those that are elsewhere."""
    note = sights[rank].note
    if note.left:
        return []
    if not note.waits_for and note.inside:
        return _absent(rank, sights)
    met = {other for other, each in sights.items() if note.call and each.note.call == note.call}
    return [peer for peer in note.waits_for if peer in sights and peer not in met]


def _absent(rank: int, sights: Mapping[int, Sight]) -> list[int]:
    """Whom a call of a program's own waits for: those that torch misses there, or who waits for nobody."""
    seen = _missing(rank, sights)
    if seen is not None:
        return list(seen[1])
    return [other for other, each in sights.items() if other != rank and not each.note.waits]


def _missing(rank: int, sights: Mapping[int, Sight]) -> tuple[Started, Mapping[int, str]] | None:
    """The collective in which torch saw a rank wait, and ranks that it did not see there, with why."""
    others = {other: each.note.recorded for other, each in sights.items() if other != rank and not each.note.left}
    return sights[rank].note.recorded.missing(others)


def _running(sights: Mapping[int, Sight], edges: Mapping[int, list[int]]) -> list[int]:
    """Ranks that wait for nobody, longest first; only those that others wait for, where there are such."""
    running = [rank for rank, sight in sights.items() if not sight.note.waits and not sight.note.left]
    left = [rank for rank, sight in sights.items() if sight.note.left]
    wanted = {peer for rank in edges if sights[rank].note.waits for peer in _reached(rank, edges)}
    found = [rank for rank in (*running, *left) if rank in wanted] or running
    return sorted(found, key=lambda rank: (-sights[rank].still_s, rank))


def _reached(rank: int, edges: Mapping[int, list[int]]) -> set[int]:
    seen: set[int] = set()
    waiting = [*edges[rank]]
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            waiting += edges[each]
    return seen


def _circle(present: Mapping[int, Sight], edges: Mapping[int, list[int]]) -> list[int]:
    """Ranks that wait for themselves in the end; those first that are in a call of which our notes know nothing."""
    found = [rank for rank in present if rank in _reached(rank, edges)]
    return sorted(found, key=lambda rank: (bool(present[rank].note.waits_for), rank))


def _told(sights: Mapping[int, Sight], suspects: tuple[int, ...], silent: Collection[int]) -> Hang:
    ranks = {rank: _victim(rank, sights) for rank in sights}
    if silent:
        ranks.update({rank: _not_answering(sights[rank]) for rank in suspects})
    elif suspects and not sights[suspects[0]].note.waits:
        ranks.update({rank: _standing(sights[rank]) for rank in suspects})
    parts = [f"{_named(rank, sights)} {ranks[rank]}" for rank in suspects]
    others = [f"rank {rank} {ranks[rank]}" for rank in sorted(ranks) if rank not in suspects]
    if not suspects:
        parts = ["every rank waits, and none is missing"]
    elif not silent and sights[suspects[0]].note.waits:
        parts.insert(0, f"ranks {', '.join(map(str, suspects))} wait for each other")
    return Hang(suspects, ranks, f"hang: {'; '.join([*_some(parts), *_some(others)])}")


def _some(parts: list[str]) -> list[str]:
    more = len(parts) - _MOST_NAMED
    return parts if more <= 0 else [*parts[:_MOST_NAMED], f"and {more} more"]


def _named(rank: int, sights: Mapping[int, Sight]) -> str:
    place = sights[rank].note.place
    return f"rank {rank} ({place})" if place else f"rank {rank}"


def _not_answering(sight: Sight) -> str:
    state = f" ({sight.state})" if sight.state else ""
    return f"has not answered for {sight.quiet_s:.0f} s{state}; it was last heard of at {sight.note.where}"


def _standing(sight: Sight) -> str:
    if sight.note.left:
        return "has left"
    return f"has been at {sight.note.where} for {sight.still_s:.0f} s"


def _victim(rank: int, sights: Mapping[int, Sight]) -> str:
    note = sights[rank].note
    if note.left:
        return "has left"
    missing = _edges(rank, sights)
    if not note.waits:
        return f"is at {note.where}"
    whom = " for rank" + ("s " if len(missing) > 1 else " ") + ", ".join(map(str, missing)) if missing else ""
    return f"waits{whom} at {note.where}{_recorded(rank, sights)}"


def _recorded(rank: int, sights: Mapping[int, Sight]) -> str:
    """What torch saw a waiting rank call, and who has not; empty where torch recorded nothing."""
    started, seen = sights[rank].note.recorded.started, _missing(rank, sights)
    if not started:
        return ""
    call = started[0] if seen is None else seen[0]
    if seen is None:
        return f" (torch: {call.words})"
    absent = _some([f"rank {other} ({why})" for other, why in seen[1].items()])
    return f" (torch: {call.words}; not joined by {', '.join(absent)})"
