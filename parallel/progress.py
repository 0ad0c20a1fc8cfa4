"""What this rank is at: one attribute that the main thread sets and a daemon (`watchdog`) reads.

Saying so costs a tuple and a clock; words are made only when somebody asks. Nothing here locks, sends or writes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol

__all__ = ["HERE", "Call", "Doing", "Progress", "Spoken", "Waiting", "Words", "at_step", "doing", "patience", "told"]


@dataclass(frozen=True)
class Doing:
    """What a rank does.

    Attributes:
        words: for people.
        waits_for: ranks without which it cannot go on.
        call: the collective that all of these must come to; empty where they need not wait as well.
    """

    words: str
    waits_for: tuple[int, ...] = ()
    call: str = ""


class Spoken(Protocol):
    """Something that a rank can be at."""

    def tell(self, detail: Any) -> Doing:
        """What that is, in words."""
        ...


class Words:
    """Something that waits for nobody.

    Args:
        text: may hold one {} for a detail.

    >>> Words("forward of micro-batch {}").tell(2).words
    'forward of micro-batch 2'
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def tell(self, detail: Any) -> Doing:
        """The text with its detail."""
        return Doing(self._text.format(detail))


class Call:
    """Collectives of one kind over the same ranks; its details count them.

    Args:
        words: such as "all_reduce over dp".
        waits_for: the other ranks.
        together: False where the other one need not wait as well (a send).
    """

    __slots__ = ("_number", "_together", "_waits_for", "_words")

    def __init__(self, words: str, waits_for: tuple[int, ...], *, together: bool = True) -> None:
        self._words = words
        self._waits_for = waits_for
        self._together = together
        self._number = 0

    def begun(self) -> int:
        """The number of one more call."""
        self._number += 1
        return self._number

    def tell(self, detail: Any) -> Doing:
        """The call; of a collective, with its number."""
        if not self._together:
            return Doing(self._words, self._waits_for)
        call = f"{self._words} (number {detail})"
        return Doing(call, self._waits_for, call)


At = tuple[float, Spoken, Any, Any]
"""When (monotonic seconds), what, its detail, and what this is a part of (another one, or None)."""

_START = Words("its start")
_BEGIN = Words("the beginning")
_OWN = Words("the program's own code after step {}")


class Progress:
    """Where one process stands.

    Attributes:
        at: what it is at; a new tuple whenever it moves.
        step: optimizer step, None outside of steps.
        place: of this rank on the mesh, in words.
        patient: whether what it does may take long: it has not finished a step yet, or is in `patience`.
    """

    __slots__ = ("_rooms", "_stepped", "at", "place", "step")

    def __init__(self) -> None:
        self._rooms = 0
        self.restart()

    def restart(self) -> None:
        """Forgets all, for a process that joins other ranks."""
        self.at: At = (time.monotonic(), _START, None, None)
        self.step: int | None = None
        self.place = ""
        self._stepped = False

    @property
    def patient(self) -> bool:
        """Whether it may stand still for longer than others."""
        return not self._stepped or self._rooms > 0

    @property
    def words(self) -> str:
        """What it is at, with the step; empty before anything has begun."""
        return "" if self.at[1] is _START else at_step(told(self.at).words, self.step)

    def to(self, what: Spoken, detail: Any = None) -> None:
        """Moves on."""
        self.at = (time.monotonic(), what, detail, None)

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step
        self.at = (time.monotonic(), _BEGIN, None, None)

    def end(self) -> None:
        """The step is done; what follows is not ours."""
        self.at = (time.monotonic(), _OWN, self.step, None)
        self.step = None
        self._stepped = True

    @contextmanager
    def patience(self, words: str) -> Iterator[None]:
        """Does something that may take long without moving."""
        before = self.at
        self._rooms += 1
        self.to(Words(words.replace("{", "{{").replace("}", "}}")))
        try:
            yield
        finally:
            self._rooms -= 1
            self.at = (time.monotonic(), *before[1:])


HERE = Progress()
"""Of this process."""


class Waiting:
    """A context in which this rank waits in a call."""

    __slots__ = ("_before", "_call", "_number")

    def __init__(self, call: Call, number: int) -> None:
        self._call = call
        self._number = number

    def __enter__(self) -> None:
        self._before = HERE.at
        HERE.at = (time.monotonic(), self._call, self._number, self._before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        HERE.at = (time.monotonic(), *self._before[1:])


def told(at: At) -> Doing:
    """What a rank is at, in words; of a part, with the whole.

    >>> told((0.0, Call("all_reduce over dp", (1,)), 7, (0.0, Words("backward"), None, None)))
    Doing(words='backward: all_reduce over dp (number 7)', waits_for=(1,), call='all_reduce over dp (number 7)')
    """
    _, what, detail, whole = at
    found = what.tell(detail)
    return found if whole is None else replace(found, words=f"{told(whole).words}: {found.words}")


def at_step(words: str, step: int | None) -> str:
    """What a rank is at, with its optimizer step.

    >>> at_step("all_reduce over dp (number 41)", 7), at_step("its start", None)
    ('all_reduce over dp (number 41) in step 7', 'its start')
    """
    return words if step is None else f"{words} in step {step}"


def doing(words: str) -> None:
    """Says what this rank does outside of steps, which counts as progress.

    >>> doing("reading the next file")
    >>> told(HERE.at).words
    'reading the next file'
    """
    HERE.to(Words("{}"), words)


patience = HERE.patience
"""`with patience("saving"):` does something that may take long without moving."""
