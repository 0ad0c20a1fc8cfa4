"""The plain run: the unwrapped model in one process, walking the micro-batches of all data ranks in order."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.blockwise.same_drops import drop_as_blocks_do
from meshwright.parallel.deferred import materialise
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.microbatch import call, share, split
from meshwright.parallel.optimizer import BuildOptimizer
from meshwright.parallel.options import Options
from meshwright.parallel.parity import Outcome
from meshwright.parallel.promote import Promote
from meshwright.parallel.randomness import draw_by_block, keyed

__all__ = ["Trial", "plain_outcome"]


@dataclass(frozen=True)
class Trial:
    """One step to be run both ways.

    Args:
        build_model: makes the model on CPU, equal at every call.
        build_batch: makes the global batch.
        build_optimizer: parameters -> optimizer for the weights after the step.
        mesh: how many data ranks share the batch.
        options: loss contract, micro-batches, seed.
        dtype: of parameters and floating inputs.
    """

    build_model: Callable[[], nn.Module]
    build_batch: Callable[[], Any]
    build_optimizer: BuildOptimizer
    mesh: Mesh
    options: Options
    dtype: torch.dtype

    def model(self) -> nn.Module:
        """The model in the trial's dtype; a deferred one stays deferred."""
        return self.build_model().to(dtype=self.dtype)

    def samples_of(self, data_rank: int) -> Any:
        """One data rank's share of the batch in the trial's dtype."""
        mine = share(self.build_batch(), data_rank, self.mesh.data_degree)
        return _cast(mine, self.dtype)

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which both runs work: float64 promotes casts inside the model."""
        return Promote() if self.dtype is torch.float64 else nullcontext()


def plain_outcome(trial: Trial) -> Outcome:
    """Runs the step on the unwrapped model; the reference of every comparison."""
    model = materialise(trial.model())
    draw_by_block(find_blocks(model, trial.options.blocks))
    if trial.options.sizes is not None or trial.mesh.cp > 1:
        with trial.precision():
            drop_as_blocks_do(model, _microbatches(trial, 0)[0][1])
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    shares: list[dict[str, Tensor]] = []
    losses: list[list[float]] = []
    loss_sum = items_sum = 0.0
    with trial.precision():
        for data_rank in range(trial.mesh.data_degree):
            shares.append({})
            losses.append([])
            for number, part in _microbatches(trial, data_rank):
                loss, items = _backward(trial, model, part, number)
                losses[-1].append(loss)
                loss_sum += loss * items if items else 0.0
                items_sum += items
                _collect(trained, shares[-1])
    _leave_mean(trained, shares, items_sum)
    gradients = {name: None if each.grad is None else each.grad.clone() for name, each in trained.items()}
    norm = torch.stack([each.double().norm() for each in gradients.values() if each is not None]).norm()
    trial.build_optimizer(list(trained.values())).step()
    weights = {name: each.detach() for name, each in trained.items()}
    return Outcome(loss_sum / items_sum, gradients, float(norm), weights, losses, shares)


def _microbatches(trial: Trial, data_rank: int) -> list[tuple[int, Any]]:
    parts = split(trial.samples_of(data_rank), trial.options.num_microbatches)
    first = data_rank * trial.options.num_microbatches
    return list(enumerate(parts, start=first))


def _backward(trial: Trial, model: nn.Module, part: Any, number: int) -> tuple[float, float]:
    with keyed(trial.options.seed, "step", 0, "microbatch", number):
        loss, items = trial.options.contract.run(lambda: call(model, part), part)
    loss.backward(gradient=items.to(loss.dtype))
    return float(loss.detach()), float(items)


def _collect(trained: Mapping[str, nn.Parameter], into: dict[str, Tensor]) -> None:
    for name, parameter in trained.items():
        if parameter.grad is not None:
            into[name] = into[name] + parameter.grad if name in into else parameter.grad
            parameter.grad = None


def _leave_mean(trained: Mapping[str, nn.Parameter], shares: list[dict[str, Tensor]], items_sum: float) -> None:
    for name, parameter in trained.items():
        parts = [mine[name] for mine in shares if name in mine]
        if parts:
            parameter.grad = torch.stack(parts).sum(0) / items_sum


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _cast(item, dtype) for key, item in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(_cast(item, dtype) for item in batch)
    return batch
