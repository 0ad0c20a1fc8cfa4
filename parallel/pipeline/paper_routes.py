"""Routes of micro-batches through a pipeline whose ranks are all played by one process, on tensors without values.

Each rank probes as in a run (`probe`), in a coroutine of its own that stops where it tells the others something; what
one of them tells is handed to all. So what a neighbour would send has the shapes that its own blocks gave.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from meshwright.parallel.capture import captured
from meshwright.parallel.data import Unscheduled
from meshwright.parallel.pipeline.probe import keys_of, probe
from meshwright.parallel.pipeline.route import Route, Shape
from meshwright.parallel.pipeline.wire import Tag, Wire
from meshwright.parallel.stages import Stages

__all__ = ["routes_on_paper"]


def routes_on_paper(
    module: nn.Module, stages: Stages, parts: Sequence[Any], *, forward: Callable[[Any], Any]
) -> dict[Hashable, Route]:
    """The route of each shape of micro-batch, by `keys_of`.

    Args:
        module: with the blocks of all stages, dealt as on the rank that asks.
        stages: of it.
        parts: micro-batches.
        forward: of one of them; returns its loss and number of items.

    Raises:
        WrapError: see `probe`.
    """
    found: dict[Hashable, Route] = {}
    for key, part in zip(keys_of(module, parts), parts, strict=True):
        if key not in found:
            found[key] = _probed(module, stages, partial(forward, part))
    return found


class _Wire(Wire):
    """The pipeline axis as one of the played ranks sees it."""

    def __init__(self, rank: int) -> None:  # has no process groups
        self.rank = rank
        self.device = torch.device("cpu")

    def tell(self, value: Any, source: int) -> Any:
        """Stops until rank `source` has said what it tells."""
        parent = getcurrent().parent
        assert parent is not None, "told outside of a probe"
        return parent.switch((source, value))

    def send(self, values: Sequence[Tensor], to: int, tag: Tag) -> None:
        """Nothing is sent."""

    def receive(self, shapes: Sequence[Shape], source: int, tag: Tag) -> Callable[[], list[Tensor]]:
        """Tensors of the shapes that the other rank told."""
        return lambda: [shape.empty(self.device) for shape in shapes]

    def flush(self) -> None:
        """Nothing is on its way."""


class _Whole(Unscheduled):
    """States of a module that is not sharded."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def _probed(module: nn.Module, stages: Stages, run: Callable[[], Any]) -> Route:
    homes, states = stages.schedule.homes, _Whole(module)
    ranks = [greenlet(partial(probe, run, stages.stage_of, homes, states, _Wire(rank))) for rank in sorted(set(homes))]
    with captured(stages.blocks):
        try:
            told = [rank.switch() for rank in ranks]
            while not ranks[0].dead:
                source = told[0][0]
                said = told[source][1]
                told = [rank.switch(said) for rank in ranks]
        finally:
            for rank in ranks:
                rank.throw()
    route: Route = told[stages.rank]
    return route
