"""Which rank failed first, and who fell with it.

The first death is not always the cause: a rank that raised may still be tearing down while its peers already died of
the connection they lost. So times of error records, times of deaths, and lost connections are weighed. Pure.
"""

import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from meshwright.clusters.deaths import exit_code_of
from meshwright.parallel.hang import EXIT_CODE

__all__ = [
    "Blame",
    "ErrorRecord",
    "HangRecord",
    "RankEnd",
    "Verdict",
    "judge",
    "lost_connection",
    "traceback_in",
]


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended.

    Args:
        rank: global rank.
        host: name of its node.
        code: exit code, or minus the signal that killed it.
        time_unix_s: when it died.
        ended_by_us: whether it had been asked to end.
        kernel: what the kernel of its node says of it, in words.
    """

    rank: int
    host: str
    code: int
    time_unix_s: float
    ended_by_us: bool = False
    kernel: str = ""


@dataclass(frozen=True)
class ErrorRecord:
    """What a rank wrote down about the exception that ended it, at the moment it was raised.

    Args:
        rank: that one.
        time_unix_s: when.
        traceback: of the exception.
        exit_code: that it meant to end with.
        last: what it was at, where it knew.
    """

    rank: int
    time_unix_s: float
    traceback: str
    exit_code: int = 1
    last: str = ""


@dataclass(frozen=True)
class HangRecord:
    """What the rank wrote down that found that nothing moves.

    Args:
        time_unix_s: when.
        found_by: which rank.
        line: who is behind, and where everybody stands.
        suspects: ranks that keep the others waiting; none where all wait in one call.
        ranks: rank -> its part, in words.
        stacks: rank -> where its threads are, of ranks that could tell.
    """

    time_unix_s: float
    found_by: int
    line: str
    suspects: tuple[int, ...]
    ranks: Mapping[int, str]
    stacks: Mapping[int, str]


@dataclass(frozen=True)
class Blame:
    """One rank's part in a failure."""

    rank: int
    host: str
    exit_code: int
    signal: str | None
    evidence: str
    traceback: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """The first failing rank (None where none failed by itself), and the others that did not end well.

    Attributes:
        hang: where nothing moved any more, who was behind and where everybody stood.
        only_lost: whether that rank only lost its connection to another, or got SIGTERM from somebody.
    """

    first: Blame | None
    victims: tuple[Blame, ...] = ()
    hang: str = ""
    only_lost: bool = False

    @property
    def reason(self) -> str:
        """Who failed first, in one line."""
        if self.first is None or self.hang:
            return self.hang
        return f"rank {self.first.rank} on {self.first.host} failed first"


_LOST = re.compile(
    r"Connection (?:closed by peer|reset by peer|refused|reset)|Broken pipe|Socket closed|ncclRemoteError"
    r"|remote process exited|recvValue failed|NCCL communicator was aborted"
)


def traceback_in(log: str) -> str:
    """The end of a log from its last traceback on; empty where there is none.

    >>> traceback_in("step 1\\nTraceback (most recent call last):\\n  ...\\nKeyError: 'a'\\n")
    "Traceback (most recent call last):\\n  ...\\nKeyError: 'a'"
    """
    found = log.rfind("Traceback (most recent call last)")
    return log[found:].rstrip() if found >= 0 else ""


def lost_connection(traceback: str) -> bool:
    """Whether a traceback ends in a connection that another process broke.

    >>> lost_connection("RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    True
    >>> lost_connection("KeyError: 'a'")
    False
    """
    return _LOST.search("\n".join(traceback.rstrip().splitlines()[-8:])) is not None


def judge(
    ends: Iterable[RankEnd],
    records: Mapping[int, ErrorRecord] | None = None,
    tails: Mapping[int, str] | None = None,
    *,
    hang: HangRecord | None = None,
    last: Mapping[int, str] | None = None,
) -> Verdict:
    """Decides which rank failed first and who fell with it.

    Args:
        ends: the ends of the last attempt's ranks.
        records: rank -> its error record.
        tails: rank -> the end of its log.
        hang: what was found, if ranks stood still; outweighed by a rank that failed before.
        last: rank -> what it was last known to be at.
    """
    known = {end.rank: end for end in ends}
    told, logs, at = records or {}, tails or {}, last or {}
    cases = [_Case.of(end, told.get(rank), logs.get(rank, ""), last=at.get(rank, "")) for rank, end in known.items()]
    bad = [case for case in cases if case.end.code or case.end.ended_by_us]
    first = _first(bad)
    if hang is not None and not _before(first, hang):
        return _hung(bad, hang)
    if first is None:
        return Verdict(None, tuple(case.victim() for case in sorted(bad, key=_Case.order)))
    others = sorted((case for case in bad if case is not first), key=_Case.order)
    return Verdict(first.culprit(), tuple(case.victim() for case in others), only_lost=first.was_taken_along)


def _before(first: "_Case | None", hang: HangRecord) -> bool:
    """Whether ranks stood still because one had failed."""
    return first is not None and first.failed_by_itself and first.order()[0] < hang.time_unix_s


def _hung(bad: list["_Case"], hang: HangRecord) -> Verdict:
    """Blames the first suspect; where all wait for each other, the rank that noticed speaks for all."""
    wanted = hang.suspects[0] if hang.suspects else hang.found_by
    blames = {case.end.rank: case.stuck(hang) for case in sorted(bad, key=_Case.order)}
    first = blames.pop(wanted, None) or blames.pop(hang.found_by, None)
    return Verdict(first, tuple(blames.values()), hang.line)


def _first(bad: list["_Case"]) -> "_Case | None":
    """The earliest of the strongest kind of evidence: own failure, own traceback, lost connection."""
    lost = [case for case in bad if not case.end.ended_by_us]
    own = [case for case in bad if case.failed_by_itself]
    raised = [case for case in bad if case.raised and lost]
    for kind in (own, raised, lost):
        if kind:
            return min(kind, key=_Case.order)
    return None


@dataclass(frozen=True)
class _Case:
    """What is known of one rank."""

    end: RankEnd
    record: ErrorRecord | None
    traceback: str
    tail: str
    lost: bool
    last: str

    @classmethod
    def of(cls, end: RankEnd, record: ErrorRecord | None, tail: str, *, last: str) -> "_Case":
        traceback = record.traceback if record is not None else traceback_in(tail)
        exact = record.last if record is not None else ""
        return cls(end, record, traceback, tail, lost_connection(traceback), exact or last)

    @property
    def failed_by_itself(self) -> bool:
        return not self.lost and (self.record is not None or not self.end.ended_by_us)

    @property
    def was_taken_along(self) -> bool:
        """Whether it only lost its connection, or was asked to end by somebody else than us."""
        return self.lost or self.end.code == -signal.SIGTERM

    @property
    def raised(self) -> bool:
        return bool(self.traceback) and not self.lost and "KeyboardInterrupt" not in self.traceback

    def order(self) -> tuple[float, int]:
        return (self.record.time_unix_s if self.record else self.end.time_unix_s, self.end.rank)

    def _how(self) -> str:
        code = self.end.code
        return f"was killed by {_signal(code)}" if code < 0 else f"exited with code {code}"

    def _blame(self, exit_code: int, evidence: str) -> Blame:
        number = self.end.code
        shown = self.traceback or "\n".join(self.tail.rstrip().splitlines()[-20:])
        killed = _signal(number) if number < 0 and not self.end.ended_by_us else None
        return Blame(self.end.rank, self.end.host, exit_code, killed, evidence, shown)

    def culprit(self) -> Blame:
        """With all that is known besides."""
        found = self._failed()
        known = (found.evidence, self.end.kernel, f"last: {self.last}" if self.last else "")
        return replace(found, evidence="; ".join(each for each in known if each))

    def _failed(self) -> Blame:
        if not self.end.ended_by_us:
            when = "its error record is the earliest" if self.record else "no rank died before it by itself"
            return self._blame(exit_code_of(self.end.code), f"{self._how()}; {when}")
        if self.record is not None:
            return self._blame(
                self.record.exit_code, "its error record is the earliest; it was ended while tearing down"
            )
        return self._blame(1, "its log holds a traceback; the ranks that died before it lost their connection")

    def stuck(self, hang: HangRecord) -> Blame:
        rank = self.end.rank
        part = hang.ranks.get(rank, "said nothing")
        return Blame(rank, self.end.host, EXIT_CODE, None, part, hang.stacks.get(rank, ""))

    def victim(self) -> Blame:
        if self.lost:
            why = f"lost its connection; {'was ended by the launcher' if self.end.ended_by_us else self._how()}"
        elif self.end.ended_by_us:
            why = "was ended by the launcher"
        else:
            why = f"{self._how()} later"
        return self._blame(exit_code_of(self.end.code), why)


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
