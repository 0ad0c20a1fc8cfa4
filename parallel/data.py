"""What every data engine must do, and the choice between them."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.parallel.collectives import Groups
from meshwright.parallel.deferred import allocate
from meshwright.parallel.errors import WrapError
from meshwright.parallel.experts import square_of
from meshwright.parallel.optimizer import BuildOptimizer, GroupOf, OwnedOptimizer, StepOptimizer
from meshwright.parallel.options import Options
from meshwright.parallel.part import Part
from meshwright.parallel.pipeline.runtime import States
from meshwright.parallel.spread import Spread
from meshwright.parallel.weights import boxes_of

__all__ = ["AskScale", "DataEngine", "LocalStates", "Unscheduled", "build_data_engine"]


AskScale = Callable[[], Tensor]
"""Asks for the number (0-dim) that multiplies a step's gradients; waits for the other ranks, so it is called late."""


class DataEngine(States, Protocol):
    """Turns gradients of local micro-batches into global ones and holds what the optimizer owns.

    One step is begin, (prepare, backward) per micro-batch, launch, finish.
    """

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        ...

    def prepare(self, last: bool) -> None:
        """Says whether the next whole backward is the last one of its step."""
        ...

    def backward(self, loss: Tensor, items: Tensor, ask_scale: AskScale | None) -> None:
        """Adds `items` times the gradient of `loss`; `ask_scale` is given with the last backward of a step."""
        ...

    def follow(self, ask_scale: AskScale, num_microbatches: int) -> None:
        """Says that a schedule makes the gradients of this step, without `backward`.

        Args:
            ask_scale: what multiplies them before they are reduced.
            num_microbatches: that each add at most once to a parameter's gradient.
        """
        ...

    def launch(self) -> None:
        """Starts the reductions that backward did not."""
        ...

    def finish(self) -> None:
        """Waits for the sums; parameters no rank used keep no gradient."""
        ...

    def release(self) -> None:
        """Frees whole parameters that a forward pass without backward left behind."""
        ...

    def clip(self, max_norm: float | None) -> Tensor:
        """Scales gradients to a global L2 norm of at most `max_norm`; returns the norm before (0-dim, float64)."""
        ...

    def full_parameters(self) -> dict[str, Tensor]:
        """Whole trained parameters by name; every rank must ask."""
        ...

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Whole gradients by name, None where no rank computed one; every rank must ask."""
        ...

    def make_optimizer(self, build: BuildOptimizer, group_of: GroupOf | None) -> StepOptimizer:
        """Builds the optimizer of what this rank owns."""
        ...

    def model_state(self) -> dict[str, Any]:
        """Parameters and buffers for a checkpoint, under names that no layout changes."""
        ...

    def load_model_state(self, state: dict[str, Any]) -> None:
        """Takes back what `model_state` gave."""
        ...


class Unscheduled:
    """Answers to a schedule of engines whose parameters are whole at every use without it."""

    def follow(self, ask_scale: AskScale, num_microbatches: int) -> None:
        """Says that a schedule makes the gradients of this step, without `backward`."""
        raise WrapError(f"{type(self).__name__} goes back through whole losses only; use schedule='accumulate'")

    def open(self) -> None:
        """Nothing to do where parameters are always whole."""

    def prepare(self, last: bool) -> None:
        """Nothing depends on it."""

    def gather(self, stage: int) -> None:
        """Nothing to do where parameters are always whole."""

    def need(self, stage: int) -> None:
        """Nothing to wait for."""

    def free(self, stage: int) -> None:
        """Nothing to give back."""

    def reduce(self, stage: int) -> None:
        """Nothing to sum."""


class LocalStates(Unscheduled):
    """What the engines share whose parameters and gradients are tensors on the module itself."""

    def __init__(self, module: nn.Module, groups: Groups, norm_axes: tuple[str, ...], spread: Spread) -> None:
        self.module = module
        self._groups = groups
        self._norm_axes = (*norm_axes, "tp", "pp")
        self._spread = spread
        self._dealt = spread.dealt
        self._context = spread.context
        self._staged = spread.staged
        self._experts = spread.experts
        allocate(module, lambda name, held: boxes_of(self._saved(name, held, held))[1])
        self._trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self._ask_scale: AskScale = lambda: torch.ones(())

    def local(self) -> dict[str, tuple[nn.Parameter, Tensor | None]]:
        """Trained parameters and the part of their gradients that this rank holds."""
        return {name: (each, each.grad) for name, each in self._trained.items()}

    def whole(self, tensor: Tensor) -> Tensor:
        """The full tensor behind a parameter or gradient; every rank must ask."""
        return tensor

    def as_sharded(self, name: str, tensor: Tensor) -> Tensor:
        """How `tensor` (shaped like this rank's part of parameter `name`) is written to a checkpoint."""
        parameter = self._trained[name]
        return self._spread.part(name, parameter, tensor) if tensor.shape == parameter.shape else tensor

    def release(self) -> None:
        """Nothing to free where parameters are always whole."""

    def clip(self, max_norm: float | None) -> Tensor:
        """Scales gradients to a global L2 norm of at most `max_norm`; returns the norm before (0-dim, float64)."""
        local = self.local()
        gradients = [gradient for _, gradient in local.values() if gradient is not None]
        dense, experts = self._experts.parted(self._staged.counted(local))
        square = square_of(self._dealt.counted(dense), self._groups.device_type)
        if self._experts.plan.degree > 1:
            of_experts, here = self._experts.square(experts), self._groups.mesh.coordinates(self._groups.rank)
            if not any(here[axis] for axis in self._norm_axes if axis != "pp"):  # counted once
                square += of_experts
        self._groups.all_reduce(square, *self._norm_axes).wait()
        norm = square.sqrt()
        if max_norm is not None and gradients:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def full_parameters(self) -> dict[str, Tensor]:
        """Whole trained parameters by name; every rank must ask."""
        mine = {name: self._spread.whole(name, self.whole(each.detach())) for name, each in self._trained.items()}
        return self._staged.gathered(self._experts.gathered(mine))

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Whole gradients by name, None where no rank computed one; every rank must ask."""
        mine = {
            name: None if each.grad is None else self._spread.whole(name, self.whole(each.grad))
            for name, each in self._trained.items()
        }
        return self._staged.gathered(self._experts.gathered(mine))

    def whole_states(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters and buffers, tied ones once; every rank must take them all."""
        held = dict(self.module.named_parameters(remove_duplicate=False))
        saved = self.module.state_dict()

        def whole(name: str) -> Tensor:
            values: Tensor | None = saved.get(name)
            if name in held:
                values = self._spread.whole(name, self.whole(held[name].detach()))
            return self._experts.told(name, values)

        return self._staged.wholes(whole)

    def _sum_over_copies(self) -> None:
        """Sums gradients of what ranks of `cp`, `tp` or `pp` hold several times, or in parts that add up."""
        self._context.fill(self._trained)
        self._context.sum(self.local())
        self._staged.fill(self._trained)
        self._dealt.sum_gradients(self._experts.parted(self.local())[0])
        self._staged.sum_gradients(self.local())

    def make_optimizer(self, build: BuildOptimizer, group_of: GroupOf | None) -> StepOptimizer:
        """Builds an ordinary torch optimizer on the local parts."""
        return OwnedOptimizer(self, build, group_of)

    def model_state(self) -> dict[str, Any]:
        """Parameters and buffers of the module, sharded ones as DTensors."""
        held = dict(self.module.named_parameters(remove_duplicate=False))
        return {
            name: self._saved(name, held.get(name, values), values) for name, values in self.module.state_dict().items()
        }

    def _saved(self, name: str, parameter: Tensor, values: Tensor) -> Tensor:
        """How a parameter or buffer is written to a checkpoint."""
        return self._spread.part(name, parameter, _local(values)) if self._spread.is_dealt(name) else values

    def load_model_state(self, state: dict[str, Any]) -> None:
        """Takes back what `model_state` gave."""
        self.release()
        mine = self.module.state_dict()
        for name, values in state.items():
            if isinstance(values, Part):
                _local(mine[name]).copy_(values.local)
        rest = {name: mine[name] if isinstance(values, Part) else values for name, values in state.items()}
        self.module.load_state_dict(rest)


def build_data_engine(module: nn.Module, groups: Groups, options: Options, spread: Spread) -> DataEngine:
    """Picks the data engine that a mesh and options ask for and hands it the model, spread already."""
    makers: dict[str, Callable[[nn.Module, Groups, Options, Spread], DataEngine]] = {
        "deepspeed": _deepspeed,
        "torch": _shard if groups.mesh.fsdp > 1 else _replicate,
    }
    return makers[options.data_engine](module, groups, options, spread)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _replicate(module: nn.Module, groups: Groups, options: Options, spread: Spread) -> DataEngine:
    from meshwright.parallel.replicate import Replicate

    return Replicate(module, groups, spread, bucket_bytes=options.bucket_bytes)


def _shard(module: nn.Module, groups: Groups, options: Options, spread: Spread) -> DataEngine:
    if options.schedule != "accumulate":
        from meshwright.parallel.rotate import Rotate

        return Rotate(module, groups, spread, zero_stage=options.zero_stage, num_buffers=options.num_buffers)
    from meshwright.parallel.shard import Shard

    offload = options.offload == "cpu"
    return Shard(module, groups, spread, zero_stage=options.zero_stage, offload=offload, blocks=options.blocks)


def _deepspeed(module: nn.Module, groups: Groups, options: Options, spread: Spread) -> DataEngine:
    del spread  # refused together with tp and pp
    from meshwright.parallel.deepspeed_engine import DeepSpeedStates

    return DeepSpeedStates(module, groups, zero_stage=options.zero_stage, offload=options.offload == "cpu")
