"""The routes of a model's micro-batches, each found once for every shape."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from meshwright.parallel.collectives import Groups
from meshwright.parallel.pipeline.probe import keys_of, probe
from meshwright.parallel.pipeline.route import Route
from meshwright.parallel.pipeline.runtime import States
from meshwright.parallel.pipeline.wire import Wire
from meshwright.parallel.stages import Stages

__all__ = ["Routes"]


class Routes:
    """Finds routes by sending a micro-batch through the pipeline.

    Args:
        stages: of the model.
        states: of these stages.
        groups: process groups of the mesh.
        wire: to the other ranks of the pipeline.
        known: the routes of all shapes that will come on any rank, where that is known.
    """

    def __init__(
        self,
        stages: Stages,
        states: States,
        *,
        groups: Groups,
        wire: Wire,
        known: Mapping[Hashable, Route] | None = None,
    ) -> None:
        self._stages = stages
        self._states = states
        self._groups = groups
        self._wire = wire
        self._known: dict[Hashable, Route] = {**(known or {})}
        self._looks = known is None
        self._together = ("fsdp",) if groups.mesh.ep == 1 else ("dp", "fsdp", "cp", "tp")
        groups.group(*self._together)  # made now, since making one needs all ranks at once
        self._alone = all(groups.mesh.degree(axis) == 1 for axis in self._together)

    def of(self, parts: Sequence[Any], forward: Callable[[Any], Any]) -> list[Route]:
        """The route of each micro-batch, looked for where none of its shape came before.

        Ranks that share parameters or experts look at the same time, whatever the shapes of their own micro-batches.

        Args:
            parts: micro-batches.
            forward: of one micro-batch; returns its loss and number of items.
        """
        keys = keys_of(self._states.module, parts)
        found = [self._known.get(key) for key in keys]
        known = [each for each in found if each is not None]
        if self._alone and len(known) == len(keys):
            return known
        first = [key not in self._known and key not in keys[:index] for index, key in enumerate(keys)]
        for index, wanted in enumerate(self._wanted(first)):
            if wanted:
                self._known[keys[index]] = self._probe(partial(forward, parts[index]))
        return [self._known[key] for key in keys]

    def _wanted(self, first: list[bool]) -> Sequence[float]:
        """Which micro-batches some rank has to look at."""
        unknown = torch.tensor(first, dtype=torch.float32, device=self._wire.device)
        self._groups.all_reduce(unknown, *self._together).wait()
        found: list[float] = unknown.tolist() if self._looks else []
        return found

    def _probe(self, run: Callable[[], Any]) -> Route:
        self._states.open()
        return probe(run, self._stages.stage_of, self._stages.schedule.homes, self._states, self._wire)
