"""One optimizer step's gradients: micro-batches forward and backward, summed, normalised once.

The global loss is sum(loss_m * items_m) / sum(items_m) over all micro-batches of all data ranks. Gradients are summed
with weights items_m and divided by the same number once, which is known when the last loss has been computed, before
its backward.
"""

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from meshwright.parallel.agreement import check_buffers, check_losses
from meshwright.parallel.as_wrapped import AsWrapped
from meshwright.parallel.attributes import Attributes
from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.capture import captured
from meshwright.parallel.collectives import Groups
from meshwright.parallel.connecting import connect_groups
from meshwright.parallel.data import AskScale, DataEngine
from meshwright.parallel.errors import LossError
from meshwright.parallel.forwards import Forwards, Result
from meshwright.parallel.guide import Backward
from meshwright.parallel.mesh import DATA_AXES
from meshwright.parallel.microbatch import check_constant, split
from meshwright.parallel.options import Options
from meshwright.parallel.pipeline.actions import Kind, Schedule
from meshwright.parallel.pipeline.observe import both, watch_progress
from meshwright.parallel.pipeline.passes import Pass, Passes
from meshwright.parallel.pipeline.route import Route
from meshwright.parallel.pipeline.routes import Routes
from meshwright.parallel.pipeline.runtime import Watch, Work, execute, unwatched
from meshwright.parallel.pipeline.transfers import Transfers
from meshwright.parallel.pipeline.wire import Wire
from meshwright.parallel.progress import HERE, Words
from meshwright.parallel.randomness import draw_by_block
from meshwright.parallel.stages import Stages
from meshwright.parallel.totals import StepStats, Totals, stats_of, weighted

__all__ = ["Engine"]

_FORWARD, _BACKWARD = Words("forward of micro-batch {}"), Words("backward of micro-batch {}")
_GRADIENTS, _EVALUATES = Words("summing gradients and losses"), Words("forward without gradients")
_EVALUATED = Words("the program's own code after an evaluation")


class Engine:
    """Runs steps of one wrapped model on one rank."""

    def __init__(
        self,
        data: DataEngine,
        groups: Groups,
        options: Options,
        stages: Stages,
        *,
        routes: Mapping[Hashable, Route] | None = None,
    ) -> None:
        self.data = data
        self.options = options
        self.num_steps = 0
        self.watch: Watch = unwatched
        self._buffers_checked = False
        self._groups = groups
        self._stages = stages
        groups.group(*DATA_AXES, "pp")  # made now, since making one needs all ranks at once
        self._routes: Routes | None = None
        self._wire: Wire | None = None
        if groups.mesh.pp > 1:
            connect_groups(groups)
            self._wire = Wire(groups, stages.schedule.homes)
        self._routes = (
            None if self._wire is None else Routes(stages, data, groups=groups, wire=self._wire, known=routes)
        )
        self.wrapped = AsWrapped(data.module, deals=groups.mesh.tp > 1 or groups.mesh.cp > 1)
        draw_by_block(find_blocks(data.module, options.blocks))
        self._device = torch.device(groups.device_type)
        if groups.device_type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        first = groups.mesh.data_rank(groups.rank) * options.num_microbatches
        self._forwards = Forwards(data, options.contract, device=self._device, seed=options.seed, first=first)

    @property
    def schedule(self) -> Schedule | None:
        """What ranks do in one step; None where the model is stepped as a whole."""
        return self._stages.schedule if self._stages.blocks else None

    @property
    def _has_loss(self) -> bool:
        return self._stages.schedule.homes[-1] == self._stages.rank

    def step(self, batch: Any) -> StepStats:
        """Leaves in every parameter the gradient of the global loss.

        Args:
            batch: this data rank's share of the global batch; dim 0 counts samples.

        Raises:
            LossError: when no micro-batch of any rank holds an item.
        """
        HERE.begin(self.num_steps + 1)
        self.wrapped.check()
        stats = self.accumulate(batch)
        if not stats.items:  # asked here and not before backward, where a GPU would have to stop for the answer
            raise LossError("no micro-batch of this step holds an item that counts in the loss; check labels and masks")
        if not self._buffers_checked:
            check_buffers(self.data.module, self._groups)
            check_losses(stats.microbatch_losses, self._groups)
            self._buffers_checked = True
        self.num_steps += 1
        HERE.end()
        return stats

    def accumulate(self, batch: Any) -> StepStats:
        """A step that asks no tensor for its value, so that it also runs where tensors have none."""
        if self._stages.blocks:
            check_constant(batch)
        parts = split(batch, self.options.num_microbatches)
        self.data.begin()
        try:
            stats = self._scheduled(parts) if self._stages.blocks else self._in_turn(parts)
            self.data.finish()
        except BaseException:
            self.data.release()
            raise
        return stats

    @cached_property
    def _watch(self) -> Watch:
        return watch_progress(HERE, self._stages.schedule.homes, self._groups.mesh.group(self._groups.rank, "pp"))

    def _attributes(self) -> Attributes | None:
        return None if self.num_steps else Attributes(self.data.module)

    def _watching(self) -> Watch:
        return self._watch if self.watch is unwatched else both(self._watch, self.watch)

    def _in_turn(self, parts: list[Any]) -> StepStats:
        """One micro-batch after the other, forward and backward."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)  # losses times items, items
        losses: list[Tensor] = []
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            self.data.prepare(last)
            HERE.to(_FORWARD, index)
            loss, items = self._forwards.now(part, step=self.num_steps, index=index)
            sums += torch.stack([weighted(loss, items), items])
            if last:
                summed = self._groups.all_reduce(sums, *DATA_AXES)
            HERE.to(_BACKWARD, index)
            self.data.backward(loss, items.to(loss.dtype), _ask_scale(sums, summed.wait) if last else None)
            losses.append(loss.detach().double())
        HERE.to(_GRADIENTS)
        self.data.launch()
        summed.wait()
        return stats_of(sums, torch.stack(losses))

    def _scheduled(self, parts: list[Any]) -> StepStats:
        """Block by block, in the order of the schedule."""
        totals = Totals(
            len(parts), self._groups, self._wire, source=self._stages.schedule.homes[-1], device=self._device
        )
        self.data.follow(totals.scale, len(parts))
        with _messages(self._wire):
            with captured(self._stages.blocks):
                passes, routes = self._passes(parts)
                transfers = Transfers(self._stages.timetable, routes, self._wire) if self._wire else None
                self.data.open()
                results = partial(_results, passes)
                then, weight = partial(totals.forwarded, results), _weight_of() if self._has_loss else _no_weight
                work = Work(passes, self.data, transfers, then, weight, self._watching(), self._attributes())
                execute(self._stages.actions, work)
                totals.ended(results)
            self.data.launch()
            stats = totals.stats()
            if self._wire is not None:
                self._wire.flush()
        return stats

    def evaluate(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Sum of losses and number of items of a batch over all data ranks (0-dim, float64), without gradients."""
        self.wrapped.check()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        HERE.to(_EVALUATES)
        try:
            with torch.no_grad():
                if self._wire is None:
                    found: Result | None = self._forwards.now(batch, step=self.num_steps, index=0)
                else:
                    found = self._forward_across(batch)
                if found is not None:
                    sums += torch.stack([weighted(*found), found[1]])
                self._groups.all_reduce(sums, *DATA_AXES, "pp").wait()
        finally:
            self.data.release()
        HERE.to(_EVALUATED)
        return sums[0], sums[1]

    def _forward_across(self, batch: Any) -> tuple[Tensor, Tensor] | None:
        """Forward of one batch through all stages; the rank of the last one gets loss and items."""
        actions = self._stages.forward_actions
        with _messages(self._wire), captured(self._stages.blocks):
            passes, routes = self._passes([batch])
            transfers = Transfers(self._stages.forward_timetable, routes, self._wire) if self._wire else None
            self.data.open()
            execute(actions, Work(passes, self.data, transfers, _nothing, _no_weight, self._watch))
        if self._wire is not None:
            self._wire.flush()
        return passes[0].result if self._has_loss else None

    def _passes(self, parts: list[Any]) -> tuple[Passes, list[Route]]:
        """A pass for each micro-batch, and their routes."""
        routes: list[Route] = []
        if self._routes is not None:
            routes = self._routes.of(parts, lambda part: self._forwards.later(part, step=self.num_steps, index=0)())
        mine = sorted(set(self._stages.mine.values()))
        later = self._forwards.of_step(self.num_steps)
        backward = Backward(self._stages.recomputed, self._stages.schedule.has(Kind.INPUT_GRADIENT))

        def make(index: int) -> Pass:
            return Pass(
                later(parts[index], index),
                self._stages.stage_of,
                mine=mine,
                route=routes[index] if routes else None,
                device=self._device,
                backward=backward,
            )

        return Passes(make, len(parts)), routes

    def over_data_ranks(self, values: Tensor) -> list[list[float]]:
        """The same 1-dim tensor of every data rank, in order."""
        return [part.tolist() for part in self._groups.all_gather(values, *DATA_AXES)]


def _messages(wire: Wire | None) -> AbstractContextManager[None]:
    return nullcontext() if wire is None else wire.unbroken()


def _ask_scale(sums: Tensor, wait: Callable[[], None]) -> AskScale:
    """All losses are known before the last backward, so its gradients can leave divided; asking waits for the sum."""

    def ask() -> Tensor:
        wait()
        return sums[1].reciprocal()

    return ask


def _results(passes: Passes) -> list[Result]:
    return [each.result for each in passes]


def _weight_of() -> Callable[[Pass], Tensor]:
    """What the loss of a pass counts, as its dtype has it; worked out once where numbers are shared."""
    weight = cache(Tensor.to)

    def of(each: Pass) -> Tensor:
        loss, items = each.result
        return weight(items, loss.dtype)

    return of


def _nothing() -> None:
    """Where nobody waits for the end of all forwards."""


def _no_weight(each: Pass) -> None:
    """Where another rank has the losses."""
    del each
