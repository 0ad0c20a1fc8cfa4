"""Memory of a pass on shapes: what each block keeps, works with, and makes of gradients."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor

from meshwright.parallel.footprint import Live
from meshwright.parallel.operations import Tally, storage_of
from meshwright.parallel.work import Passes, Work

__all__ = ["Books"]


@dataclass
class _Since:
    """What happened since the start of a block.

    Attributes:
        grown_bytes: most alive at once, if all gradients stayed.
        held_bytes: the same, if all that was kept stayed.
        made_bytes: of gradients.
        left_bytes: of what was kept and let go.
    """

    grown_bytes: int = 0
    held_bytes: int = 0
    made_bytes: int = 0
    left_bytes: int = 0


class Books:
    """Follows storages from the start of one block in one direction to its end, again and again."""

    def __init__(self) -> None:
        self._live = Live()
        self._given: dict[str, dict[int, int]] = {}  # block -> storage of an input -> bytes
        self._reread: Counter[str] = Counter()
        self._trained: dict[int, int] = {}  # storages of parameters -> bytes
        self._users: dict[int, dict[str, None]] = {}  # and who used them, in order
        self._of_weights: set[int] = set()  # storages of parameters, and of what is made of nothing else
        self._waiting: Counter[str] = Counter()
        self._known: set[int] = set()
        self._start_bytes = 0
        self._since = _Since()
        self._refs: list[Any] = []

    def open(self, constant: Iterable[Tensor], trained: Iterable[Tensor]) -> None:
        """Before a pass.

        Args:
            constant: what lives anyway.
            trained: parameters, of which gradients are made.
        """
        self._known = {storage_of(each) for each in constant}
        self._trained = {storage_of(each): each.untyped_storage().nbytes() for each in trained}
        self._of_weights = set(self._trained)

    def note(self, made: Iterable[Tensor]) -> None:
        """Told of what an operation made."""
        for each in made:
            self._live.note(each.untyped_storage())
        since, now_bytes = self._since, self._live.now_bytes
        since.grown_bytes = max(since.grown_bytes, now_bytes + since.made_bytes)
        since.held_bytes = max(since.held_bytes, now_bytes + since.left_bytes)

    def use(self, name: str, given: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        """Told of what an operation of a block's forward reads and makes."""
        read = [*map(storage_of, given)]
        for storage in read:
            if storage in self._trained:
                users = self._users.setdefault(storage, {})
                users.pop(name, None)
                users[name] = None
        of_weights = [storage in self._of_weights for storage in read]
        if any(of_weights):
            for each in made:
                self._go_on(name, each, only=all(of_weights))

    def _go_on(self, name: str, made: Tensor, *, only: bool) -> None:
        """What is made of weights only is as they are; where others meet them, backward turns off to weights."""
        storage = storage_of(made)
        if not only:
            self._waiting[name] += made.numel() * made.itemsize  # the gradient that arrives there
        elif storage not in self._of_weights:
            self._of_weights.add(storage)
            self._refs.append(ref(made.untyped_storage(), lambda _: self._of_weights.discard(storage)))

    def give(self, name: str, inputs: Iterable[Tensor]) -> None:
        """Told of a block's inputs when it is first called."""
        if name not in self._given:
            self._given[name] = {
                storage_of(each): each.untyped_storage().nbytes() for each in inputs if each.requires_grad
            }

    def keep(self, name: str, tensor: Tensor, tally: Tally) -> None:
        """Told of a tensor that autograd keeps; memory that is kept already, or lives anyway, costs nothing more."""
        storage, size_bytes = storage_of(tensor), tensor.untyped_storage().nbytes()
        if storage in self._known:
            return
        self._known.add(storage)
        since, reread_bytes = self._since, size_bytes if storage in self._given.get(name, ()) else 0
        tally.saved_bytes += size_bytes
        self._reread[name] += reread_bytes

        def gone(_: Any) -> None:
            self._known.discard(storage)  # another may come to lie there
            if since is self._since:  # the history was dropped while the block still ran
                tally.saved_bytes -= size_bytes
                self._reread[name] -= reread_bytes
            else:
                self._since.left_bytes += size_bytes

        self._refs.append(ref(tensor.untyped_storage(), gone))

    def take(self, parameter: Tensor) -> None:
        """Told of a gradient, which is let go."""
        self._since.made_bytes += 0 if parameter.grad is None else parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    def turn(self, tally: Tally | None, *, was_backward: bool) -> None:
        """Closes the books of one block in one direction, if there was one, and opens those of the next."""
        live = self._live
        if tally is not None:
            base = self._start_bytes if was_backward else live.now_bytes
            tally.working_bytes = max(tally.working_bytes, live.peak_bytes - base)
            tally.growing_bytes = max(tally.growing_bytes, self._since.grown_bytes - base)
            tally.holding_bytes = max(tally.holding_bytes, self._since.held_bytes - base)
        self._start_bytes = live.peak_bytes = live.now_bytes
        self._since = _Since(live.now_bytes, live.now_bytes)

    def of(self, name: str, *, forward: Work, backward: Work) -> Passes:
        """A block in both directions."""
        last = [storage for storage, users in self._users.items() if next(reversed(users)) == name]
        return Passes(
            forward=forward,
            backward=backward,
            input_bytes=float(sum(self._given.get(name, {}).values())),
            reread_bytes=float(self._reread[name]),
            waiting_bytes=float(self._waiting[name]),
            made_bytes=float(sum(self._trained[storage] for storage in last)),
            is_tied=any(name in users and len(users) > 1 for users in self._users.values()),
        )
