"""What one rank does for one stage, and lists of such actions: the one description of a schedule.

The text form is that of `torch.distributed.pipelining` ("2F0", "1UNSHARD", "3SEND_F1"), with three words added.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from meshwright.parallel.errors import ScheduleError

__all__ = ["COMPUTE", "Action", "Kind", "Schedule"]


class Kind(StrEnum):
    """Kinds of actions; values are the words of the text form."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    SEND_ACTIVATION = "SEND_F"
    RECEIVE_ACTIVATION = "RECV_F"
    SEND_GRADIENT = "SEND_B"
    RECEIVE_GRADIENT = "RECV_B"
    GATHER = "UNSHARD"
    FREE = "RESHARD"
    REDUCE = "REDUCE_GRAD"
    RECOMPUTE = "RECOMPUTE"
    OFFLOAD = "OFFLOAD"
    FETCH = "FETCH"


COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.RECOMPUTE})
"""Kinds that occupy the processor of a rank."""

_OF_STAGES = frozenset({Kind.GATHER, Kind.FREE, Kind.REDUCE})
_WORDS = "|".join(sorted(Kind, key=len, reverse=True))
_TEXT = re.compile(rf"(\d+)({_WORDS})(\d*)")
_TOGETHER = re.compile(r"\((.*)\)OVERLAP_F_B")


@dataclass(frozen=True)
class Action:
    """One action of one stage.

    Args:
        stage: 0 is the first of the model.
        kind: what to do.
        microbatch: None for what concerns a stage as a whole (gather, free, reduce).

    Raises:
        ScheduleError: for a micro-batch where there is none, or none where there must be one.

    >>> str(Action(2, Kind.FORWARD, 0)), Action.parse("1UNSHARD")
    ('2F0', Action(stage=1, kind=<Kind.GATHER: 'UNSHARD'>, microbatch=None))
    """

    stage: int
    kind: Kind
    microbatch: int | None = None

    def __post_init__(self) -> None:
        if (self.microbatch is None) != (self.kind in _OF_STAGES):
            needs = "no micro-batch" if self.kind in _OF_STAGES else "a micro-batch"
            raise ScheduleError(f"action {self.kind.value} of stage {self.stage} takes {needs}, not {self.microbatch}")

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Reads one action.

        Raises:
            ScheduleError: when the text is none.
        """
        found = _TEXT.fullmatch(text.strip())
        if found is None:
            raise ScheduleError(f"{text!r} is no action; write stage, kind and micro-batch, such as 2F0 or 1UNSHARD")
        stage, word, microbatch = found.groups()
        return cls(int(stage), Kind(word), int(microbatch) if microbatch else None)

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{'' if self.microbatch is None else self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """What every rank of a pipeline does in one step.

    Args:
        name: of the kind of schedule.
        homes: stage -> rank that runs it.
        num_microbatches: of one step.
        ranks: rank -> its actions in order.

    Raises:
        ScheduleError: when an action stands on a rank that does not run its stage, or names what does not exist.
    """

    name: str
    homes: tuple[int, ...]
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        if not self.ranks or not self.homes or self.num_microbatches < 1:
            raise ScheduleError(
                f"a schedule needs ranks, stages and micro-batches; {self.name} has {len(self.ranks)}, "
                f"{len(self.homes)} and {self.num_microbatches}"
            )
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                self._check(rank, action)

    @property
    def num_ranks(self) -> int:
        """Degree of the pipeline."""
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """Stages of all ranks."""
        return len(self.homes)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages that a rank runs, ascending."""
        return tuple(stage for stage, home in enumerate(self.homes) if home == rank)

    def count(self, kind: Kind, rank: int | None = None) -> int:
        """How many actions of a kind there are, on one rank or on all.

        >>> Schedule.read("0F0,0B0", name="plain").count(Kind.FORWARD)
        1
        """
        chosen = self.ranks if rank is None else self.ranks[rank : rank + 1]
        return sum(action.kind is kind for actions in chosen for action in actions)

    def has(self, kind: Kind) -> bool:
        """Whether any rank does such an action."""
        return kind in self._kinds

    @cached_property
    def _kinds(self) -> frozenset[Kind]:
        return frozenset(action.kind for row in self.ranks for action in row)

    def only(self, *kinds: Kind) -> "Schedule":
        """The same schedule without all other kinds."""
        return replace(self, ranks=tuple(tuple(each for each in row if each.kind in kinds) for row in self.ranks))

    def write(self) -> str:
        """The text form: one line of comma-separated actions for each rank."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([map(str, actions) for actions in self.ranks])
        return text.getvalue()

    @classmethod
    def read(cls, text: str, *, name: str = "read") -> "Schedule":
        """Reads the text form, torch's files included: empty cells are idle time, and overlapped pairs two actions.

        Raises:
            ScheduleError: for text that is no schedule; names line and column.
        """
        rows = [tuple(_cells(cells, number + 1)) for number, cells in enumerate(csv.reader(io.StringIO(text)))]
        homes: dict[int, int] = {}
        for rank, row in enumerate(rows):
            homes.update({action.stage: rank for action in row if action.kind is Kind.FORWARD})
        missing = sorted(set(range(max(homes, default=0) + 1)) - set(homes))
        if missing:
            raise ScheduleError(f"no rank runs forward of stages {missing}")
        microbatches = [action.microbatch for row in rows for action in row if action.microbatch is not None]
        return cls(name, tuple(homes[stage] for stage in sorted(homes)), max(microbatches, default=0) + 1, tuple(rows))

    def _check(self, rank: int, action: Action) -> None:
        if not 0 <= action.stage < self.num_stages:
            raise ScheduleError(f"{action} on rank {rank}: there are {self.num_stages} stages")
        if self.homes[action.stage] != rank:
            raise ScheduleError(
                f"{action} on rank {rank}: stage {action.stage} is run by rank {self.homes[action.stage]}"
            )
        if action.microbatch is not None and action.microbatch >= self.num_microbatches:
            raise ScheduleError(f"{action} on rank {rank}: there are {self.num_microbatches} micro-batches")


def _cells(cells: Sequence[str], line: int) -> Iterator[Action]:
    for column, cell in enumerate(cells):
        together = _TOGETHER.fullmatch(cell.strip())
        for part in together[1].split(";") if together else [cell]:
            if not part.strip():
                continue
            try:
                yield Action.parse(part)
            except ScheduleError as error:
                raise ScheduleError(f"line {line}, cell {column + 1}: {error}") from error
