"""The axis `fsdp` in a layered step: few stages are whole at a time, and each is reduced once (ZeRO, arXiv 1910.02054).

For L blocks, B of them whole at once, whatever the number of micro-batches:

  stage   parameters between uses   gradients                       gathers per step   reductions per step
  1, 2    whole for the step        of one or two blocks are whole  L                  L
  3       sharded                   the same                        2 L - B            L

and one of each for the rest of the model, which is whole for the step. When, the schedule says; the sum of a block's
gradients is under way while the block before it goes back. Schedules that come back to a block reduce it more often.
"""

from collections import Counter, deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from meshwright.parallel.blocks import own_parameters
from meshwright.parallel.bundle import Bundle, Sharder
from meshwright.parallel.collectives import Groups
from meshwright.parallel.data import AskScale
from meshwright.parallel.errors import WrapError
from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.sharded import ShardedStates
from meshwright.parallel.shared import SharedFlags
from meshwright.parallel.spread import Spread

__all__ = ["Rotate"]


class Rotate(ShardedStates):
    """Data engine for sharded states that follow a schedule.

    Args:
        module: the model, whole on every rank; it is sharded in place.
        groups: process groups of `dp` and `fsdp`.
        spread: what `tp` and `pp` add.
        zero_stage: 1, 2 or 3.
        num_buffers: sums of gradients under way at once; the schedule says how many blocks are whole.
    """

    def __init__(self, module: nn.Module, groups: Groups, spread: Spread, *, zero_stage: int, num_buffers: int) -> None:
        sharder = Sharder(module, groups, spread.experts)
        super().__init__(module, groups, norm_axes=("fsdp",), spread=spread)
        stages = spread.stages
        own, rest = own_parameters(module, stages.mine)
        self._units = {stage: sharder.bundle(names) for stage, names in own.items()}
        self._rest = sharder.bundle(rest)
        self._used: set[str] = set()
        self._reducing: deque[Bundle] = deque()
        self._num_buffers = num_buffers
        self._flags: list[SharedFlags] = []
        reductions = Counter(each.stage for each in stages.actions if each.kind is Kind.REDUCE)
        self._often = {stage for stage, number in reductions.items() if number > 1}
        self._stays = zero_stage < 3
        self._stepping = False
        self._turn = 0
        for name, stage in stages.mine.items():
            self._serve(stages.blocks[name], self._units[stage], name, stage)
        self._serve(module, self._rest, "", None)

    @property
    def num_whole(self) -> int:
        """How many stages are whole on this rank now."""
        return sum(unit.is_whole for unit in self._units.values())

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        self.release()
        self._used.clear()
        for unit in self._all():
            unit.forget()

    def open(self) -> None:
        """Starts gathering what stays whole for the pass."""
        self.release()
        self._stepping = True
        self._rest.gather()
        for unit in self._units.values() if self._stays else ():
            unit.gather()

    def backward(self, loss: Tensor, items: Tensor, ask_scale: AskScale | None) -> None:
        """Whole losses would need the whole model."""
        raise WrapError(f"{type(self).__name__} goes back block by block; use schedule='layered'")

    def follow(self, ask_scale: AskScale, num_microbatches: int) -> None:
        """Gradients are divided when they leave; if they leave more than once, when all have come.

        The first of several times comes before the last losses, and to wait for those would keep other ranks waiting.
        """
        del num_microbatches
        self._ask_scale = ask_scale

    def gather(self, stage: int) -> None:
        """Starts making a stage whole."""
        self._units[stage].gather()

    def need(self, stage: int) -> None:
        """Waits until a stage may compute."""
        self._turn = stage
        self._rest.need()
        self._units[stage].need()

    def free(self, stage: int) -> None:
        """Gives back the memory of whole parameters."""
        self._units[stage].free()

    def reduce(self, stage: int) -> None:
        """Starts summing the gradients of a stage."""
        self._reduce(self._units[stage], _as_they_are if stage in self._often else self._ask_scale)

    def launch(self) -> None:
        """Starts the last sums, and says which parameters were used."""
        self._reduce(self._rest, self._ask_scale)
        self._flags = self._shared_flags(self._used)

    def finish(self) -> None:
        """Waits for the sums; parameters no rank used keep no gradient."""
        assert self._flags, "launch comes first"
        for stage, unit in self._units.items():
            unit.finish(self._ask_scale if stage in self._often else None)
        self._rest.finish()
        self._drop_unused(self._flags)
        self.release()
        self._sum_over_copies()

    def release(self) -> None:
        """Frees everything whole."""
        self._stepping = False
        self._reducing.clear()
        for unit in self._all():
            unit.free()

    def _reduce(self, unit: Bundle, ask_scale: AskScale) -> None:
        """Starts a sum; no more are under way than there are buffers, so that gradients do not pile up."""
        if len(self._reducing) == self._num_buffers:
            self._reducing.popleft().sum_over_replicas()
        self._used.update(unit.reduce(ask_scale))
        self._reducing.append(unit)

    def _all(self) -> Iterator[Bundle]:
        yield from self._units.values()
        yield self._rest

    def _serve(self, block: nn.Module, unit: Bundle, name: str, stage: int | None) -> None:
        """Makes a module whole while it runs outside of steps, as in evaluation."""

        def before(module: nn.Module, args: object) -> None:
            del module, args
            if self._stepping:
                if stage is None:
                    unit.need()
                elif stage != self._turn and not self._stays:
                    raise WrapError(
                        f"block {name} is called again in stage {self._turn}, when its parameters are sharded; "
                        "use zero_stage=2, or schedule='accumulate'"
                    )
                return
            if torch.is_grad_enabled():
                raise WrapError(
                    "a model whose states are sharded runs with gradients in step() only; "
                    "call it under torch.no_grad(), or evaluate()"
                )
            unit.gather()
            unit.need()

        def after(module: nn.Module, args: object, output: object) -> None:
            del module, args, output
            if not self._stepping:
                unit.free()

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after, always_call=True)


def _as_they_are() -> Tensor:
    return torch.ones(())
