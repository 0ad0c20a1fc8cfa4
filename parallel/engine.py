"""One optimizer step's gradients: micro-batches forward and backward, summed, normalised once.

The global loss is sum(loss_m * items_m) / sum(items_m) over all micro-batches of all data ranks. Gradients are summed
with weights items_m and divided by the same number once, which is known when the last loss has been computed, before
its backward.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from meshwright.parallel.agreement import check_buffers
from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.capture import captured
from meshwright.parallel.collectives import Groups, Pending
from meshwright.parallel.data import AskScale, DataEngine
from meshwright.parallel.errors import LossError, WrapError
from meshwright.parallel.mesh import DATA_AXES
from meshwright.parallel.microbatch import call, num_samples, split, to_device
from meshwright.parallel.options import Options
from meshwright.parallel.pipeline.runtime import Pass, execute
from meshwright.parallel.randomness import keyed

__all__ = ["Engine", "StepStats"]


@dataclass(frozen=True)
class StepStats:
    """What one step found out: `loss` and `items` (0-dim, global), `microbatch_losses` of this rank ([micro-batch])."""

    loss: Tensor
    items: Tensor
    microbatch_losses: Tensor


class Engine:
    """Runs steps of one wrapped model on one rank."""

    def __init__(self, data: DataEngine, groups: Groups, options: Options) -> None:
        self.data = data
        self.options = options
        self.num_steps = 0
        self._buffers_checked = False
        self._groups = groups
        self._contract = options.contract
        self._blocks = find_blocks(data.module) if options.schedule == "layered" else {}
        self._stages = {name: stage for stage, name in enumerate(self._blocks)}
        if options.schedule == "layered" and not self._blocks:
            raise WrapError(
                "schedule='layered' goes block by block, but the model has no list of repeated blocks; "
                "use schedule='accumulate'"
            )
        self._schedule = options.local_schedule(groups.mesh, max(len(self._blocks), 1))
        self._data_rank = groups.mesh.data_rank(groups.rank)
        self._device = torch.device(groups.device_type)
        if groups.device_type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())

    def step(self, batch: Any) -> StepStats:
        """Leaves in every parameter the gradient of the global loss.

        Args:
            batch: this data rank's share of the global batch; dim 0 counts samples.

        Raises:
            LossError: when no micro-batch of any rank holds an item.
        """
        stats = self.accumulate(batch)
        if stats.items == 0:  # asked here and not before backward, where a GPU would have to stop for the answer
            raise LossError("no micro-batch of this step holds an item that counts in the loss; check labels and masks")
        if not self._buffers_checked:
            check_buffers(self.data.module, self._groups)
            self._buffers_checked = True
        self.num_steps += 1
        return stats

    def accumulate(self, batch: Any) -> StepStats:
        """A step that asks no tensor for its value, so that it also runs where tensors have none."""
        parts = split(batch, self.options.num_microbatches)
        self.data.begin()
        try:
            stats = self._layered(parts) if self._stages else self._in_turn(parts)
            self.data.finish()
        except BaseException:
            self.data.release()
            raise
        return stats

    def _in_turn(self, parts: list[Any]) -> StepStats:
        """One micro-batch after the other, forward and backward."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)  # losses times items, items
        losses: list[Tensor] = []
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            self.data.prepare(last)
            loss, items = self._forward(part, index)
            sums += torch.stack([_weighted(loss, items), items])
            if last:
                summed = self._groups.all_reduce(sums, *DATA_AXES)
            self.data.backward(loss, items.to(loss.dtype), _ask_scale(sums, summed) if last else None)
            losses.append(loss.detach().double())
        self.data.launch()
        summed.wait()
        return StepStats(sums[0] / sums[1], sums[1], torch.stack(losses))

    def _layered(self, parts: list[Any]) -> StepStats:
        """All micro-batches through a block before the next block (arXiv 2106.02679)."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        passes = [Pass(partial(self._forward, part, index), self._stages) for index, part in enumerate(parts)]
        summed = Pending(None)

        def turn() -> None:
            nonlocal summed
            for loss, items in (each.result for each in passes):
                sums.add_(torch.stack([_weighted(loss, items), items]))
            summed = self._groups.all_reduce(sums, *DATA_AXES)
            for each in passes:
                loss, items = each.result
                each.seed(self.data.weigh(items.to(loss.dtype), _ask_scale(sums, summed)))

        with captured(self._blocks):
            execute(self._schedule.ranks[0], passes, self.data, turn)
        self.data.launch()
        summed.wait()
        return StepStats(sums[0] / sums[1], sums[1], torch.stack([each.result[0].detach().double() for each in passes]))

    def evaluate(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Sum of losses and number of items of a batch over all data ranks (0-dim, float64), without gradients."""
        with torch.no_grad():
            loss, items = self._forward(batch, 0)
            sums = torch.stack([_weighted(loss, items), items])
            self._groups.all_reduce(sums, *DATA_AXES).wait()
        self.data.release()
        return sums[0], sums[1]

    def over_data_ranks(self, values: Tensor) -> list[list[float]]:
        """The same 1-dim tensor of every data rank, in order."""
        return [part.tolist() for part in self._groups.all_gather(values, *DATA_AXES)]

    def _forward(self, part: Any, index: int) -> tuple[Tensor, Tensor]:
        moved = to_device(part, self._device)
        number = self._data_rank * self.options.num_microbatches + index
        with keyed(self.options.seed, "step", self.num_steps, "microbatch", number):
            return self._contract.run(lambda: call(self.data.module, moved), moved, num_samples(moved))


def _ask_scale(sums: Tensor, summed: Pending) -> AskScale:
    """All losses are known before the last backward, so its gradients can leave divided; asking waits for the sum."""

    def ask() -> Tensor:
        summed.wait()
        return sums[1].reciprocal()

    return ask


def _weighted(loss: Tensor, items: Tensor) -> Tensor:
    """A mean times its count; a mean over nothing is NaN and counts as zero."""
    return torch.where(items > 0, loss.detach().double() * items, 0.0)
