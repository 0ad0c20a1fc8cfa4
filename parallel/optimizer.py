"""An ordinary torch optimizer over the tensors that this rank owns.

Sharded parameters are DTensors, on which every operator of an optimizer pays a dispatch; element-wise optimizers give
the same numbers on the local shards, which share memory with them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meshwright.parallel.part import Part

__all__ = ["BuildOptimizer", "GroupOf", "OwnedOptimizer", "Owner", "StepOptimizer", "grouped", "shares_memory"]

BuildOptimizer = Callable[[Iterable[Any]], Optimizer]
"""Makes an optimizer from parameters, or from dicts of groups."""

GroupOf = Callable[[str, Tensor], dict[str, Any]]
"""Sorts parameters into groups: (name, parameter) -> settings of its group, such as {"weight_decay": 0.0}."""


class StepOptimizer(Protocol):
    """An optimizer with its states under parameter names."""

    optimizer: Optimizer

    def states(self) -> dict[str, dict[str, Any]]:
        """Optimizer states by parameter name, in the form a checkpoint stores."""
        ...

    def make_states(self) -> None:
        """Creates empty states, so that a checkpoint has somewhere to be read into."""
        ...

    def load(self, states: dict[str, dict[str, Any]]) -> None:
        """Puts states back that a checkpoint held."""
        ...


class Owner(Protocol):
    """Whoever holds the tensors that an optimizer updates."""

    def local(self) -> dict[str, tuple[nn.Parameter, Tensor | None]]:
        """Trained parameters and the part of their gradients that this rank holds."""
        ...

    def as_sharded(self, name: str, tensor: Tensor) -> Tensor:
        """How a tensor shaped like this rank's part of a parameter is written to a checkpoint."""
        ...


def grouped(named: Mapping[str, Any], group_of: GroupOf | None) -> list[Any]:
    """Parameters as an optimizer takes them: a plain list, or one dict per group of equal settings.

    >>> grouped({"w": 1, "b": 2, "v": 3}, lambda name, _: {"weight_decay": 0.0 if name == "b" else 0.1})
    [{'params': [1, 3], 'weight_decay': 0.1}, {'params': [2], 'weight_decay': 0.0}]
    """
    if group_of is None:
        return list(named.values())
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in named.items():
        settings = group_of(name, parameter)
        group = groups.setdefault(tuple(sorted(settings.items())), {"params": [], **settings})
        group["params"].append(parameter)
    return list(groups.values())


class OwnedOptimizer:
    """Builds an optimizer on local shards and keeps names beside its states.

    Args:
        data: the data engine that holds parameters and gradients.
        build: makes the optimizer from parameters, or from dicts of groups where `group_of` is given.
        group_of: sorts parameters into groups; None makes one.
    """

    def __init__(self, data: Owner, build: BuildOptimizer, group_of: GroupOf | None) -> None:
        self._data = data
        self._owned = {name: _owned(parameter) for name, (parameter, _) in data.local().items()}
        self.optimizer = build(grouped(self._owned, group_of))
        self.optimizer.register_step_pre_hook(self._take_gradients)

    def states(self) -> dict[str, dict[str, Any]]:
        """Optimizer states by parameter name, in the form a checkpoint stores."""
        return {
            name: {
                key: self._data.as_sharded(name, value) if isinstance(value, Tensor) else value
                for key, value in self.optimizer.state[owned].items()
            }
            for name, owned in self._owned.items()
            if owned in self.optimizer.state
        }

    def make_states(self) -> None:
        """Creates empty states, so that a checkpoint has somewhere to be read into."""
        if self.optimizer.state:
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter, _ in self._data.local().values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for parameter, _ in self._data.local().values():
            parameter.grad = None
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def load(self, states: dict[str, dict[str, Any]]) -> None:
        """Puts states back that a checkpoint held; tensors were read in place already."""
        for name, owned in self._owned.items():
            if name in states:
                mine = self.optimizer.state[owned]
                for key, value in states[name].items():
                    if isinstance(mine.get(key), Tensor):
                        mine[key].copy_(_local(value))
                    else:
                        mine[key] = value

    def _take_gradients(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        for name, (parameter, gradient) in self._data.local().items():
            owned = self._owned[name]
            if owned is not parameter:
                local = _local(parameter).detach()
                if not shares_memory(local, owned):  # `Module.to` gave the parameter new memory
                    owned.data = local
            owned.grad = gradient


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in one piece of memory, also where they have none.

    >>> whole = torch.zeros(4)
    >>> shares_memory(whole, whole[2:]), shares_memory(whole, whole.clone())
    (True, False)
    """
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _local(tensor: Any) -> Tensor:
    if isinstance(tensor, Part):
        return tensor.local
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _owned(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.to_local().detach()) if isinstance(parameter, DTensor) else parameter
