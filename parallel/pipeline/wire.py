"""Between the ranks of a pipeline: values, gradients, and what they tell each other once."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from meshwright.parallel.channels import Channels
from meshwright.parallel.collectives import Groups, Pending
from meshwright.parallel.connecting import connects_late
from meshwright.parallel.errors import RankError
from meshwright.parallel.pipeline.posting import EARLY
from meshwright.parallel.pipeline.route import Shape

__all__ = ["Tag", "Wire"]

Tag = int
"""Number that tells the messages of a step apart."""

_MOST_VALUES = 64
_let_others_run: Callable[[], None] = getattr(os, "sched_yield", lambda: None)
"""A message that is sent through this machine's own memory wakes the transport's thread of its receiver on the core of
its sender, where it would wait until the sender waits (docs/decisions/0013)."""


class Wire:
    """The pipeline axis as this rank sees it.

    Args:
        groups: process groups of the mesh.
        homes: stage -> rank of the pipeline.

    Attributes:
        early: see `EARLY`.
        begun: whether ranks have told each other something in this step, or are about to.
    """

    early = 0
    begun = False

    def __init__(self, groups: Groups, homes: Sequence[int]) -> None:
        self._groups = groups
        self._channels = Channels(groups, "pp", [(one, two) for one, two in pairwise(homes) if one != two])
        self.early = 0 if connects_late(groups.device_type) else EARLY
        self._running: dict[Tag, list[tuple[Tensor, Pending]]] = {}
        self._left = ""  # what a step was left with behind that
        self.rank = groups.mesh.coordinates(groups.rank)["pp"]
        self.device = torch.device(groups.device_type)
        if groups.device_type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Around the messages of a step.

        Raises:
            RankError: when a step before was left while messages were on their way: what comes now could be theirs.
        """
        if self._left:
            raise RankError(
                f"a step before ended with {self._left} while messages between ranks were on their way; a pipeline "
                "cannot go on behind that: start the ranks again, from a checkpoint"
            )
        self.begun = False
        try:
            yield
        except BaseException as error:
            if self.begun:
                self._left = type(error).__name__ + f": {error}".splitlines()[0][:200]
            raise

    def tell(self, value: Any, source: int) -> Any:
        """What rank `source` of the pipeline says; every rank must ask."""
        self.begun = True
        return self._groups.tell(value, "pp", source)

    def send(self, values: Sequence[Tensor], to: int, tag: Tag) -> None:
        """Starts sending; the receiver finds the values by their tag."""
        assert len(values) <= _MOST_VALUES, tag
        running = self._running.setdefault(tag, [])
        for place, value in enumerate(values):
            held = value.detach().contiguous()
            running.append((held, self._channels.send(held, to, tag=tag * _MOST_VALUES + place)))
        if values and self.early:
            _let_others_run()

    def receive(self, shapes: Sequence[Shape], source: int, tag: Tag) -> Callable[[], list[Tensor]]:
        """Starts receiving; what it returns waits for the values."""
        return self.receive_into([shape.empty(self.device) for shape in shapes], source, tag)

    def receive_into(self, values: list[Tensor], source: int, tag: Tag) -> Callable[[], list[Tensor]]:
        """The same with memory that is there."""
        running = [
            self._channels.receive(value, source, tag=tag * _MOST_VALUES + number)
            for number, value in enumerate(values)
        ]

        def wait() -> list[Tensor]:
            for each in running:
                each.wait()
            return values

        return wait

    def let_go(self, tag: Tag) -> None:
        """Forgets what was sent under a tag and has arrived."""
        for _, each in self._running.pop(tag, ()):
            each.finish()

    def flush(self) -> None:
        """Waits until all that was sent has left."""
        for running in self._running.values():
            for _, each in running:
                each.wait()
        self._running.clear()
