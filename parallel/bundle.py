"""The parameters of one stage as a schedule sees them: dense ones, experts sharded over other ranks, and those of one.

What all ranks compute with is sharded over `fsdp`, dealt experts over `edp`; experts that no other rank keeps are never
sharded. All come, go and are reduced together.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from meshwright.parallel.collectives import Groups
from meshwright.parallel.experts import ExpertStates
from meshwright.parallel.sharding import Sharding, shard_parameters
from meshwright.parallel.units import Unit

__all__ = ["Bundle", "Sharder"]


class Sharder:
    """Shards a model in place and makes bundles of its parameters.

    Args:
        module: the model, whole on every rank but for experts that are dealt.
        groups: process groups of the mesh.
        experts: that are dealt.
    """

    def __init__(self, module: nn.Module, groups: Groups, experts: ExpertStates) -> None:
        self._module = module
        self._groups = groups
        self._experts = experts
        self._dense, self._apart = Sharding.dense(groups), Sharding.experts(groups)
        shard_parameters(module, self._over)

    def _over(self, name: str) -> Sharding | None:
        return self._apart if self._experts.holds(name) else self._dense

    def bundle(self, names: Sequence[str]) -> "Bundle":
        """Those of a stage."""
        dense = [name for name in names if not self._experts.holds(name)]
        apart = [name for name in names if self._experts.holds(name)]
        units = [Unit(self._module, dense, self._groups, over=self._dense)]
        if apart and self._apart is not None:
            units.append(Unit(self._module, apart, self._groups, over=self._apart))
            apart = []
        held = dict(self._module.named_parameters())
        return Bundle(units, {name: held[name] for name in apart if held[name].requires_grad})


class Bundle:
    """Units that come, go and are reduced together.

    Args:
        units: sharded.
        alone: trained parameters that are whole and that no other rank keeps.
    """

    def __init__(self, units: Sequence[Unit], alone: dict[str, nn.Parameter]) -> None:
        self._units = units
        self._alone = alone

    @property
    def is_whole(self) -> bool:
        """Whether its parameters are whole now."""
        return any(unit.is_whole for unit in self._units)

    def gather(self) -> None:
        """Starts making the parameters whole."""
        for unit in self._units:
            unit.gather()

    def need(self) -> None:
        """Waits until they are."""
        for unit in self._units:
            unit.need()

    def free(self) -> None:
        """Gives their memory back."""
        for unit in self._units:
            unit.free()

    def reduce(self, ask_scale: Callable[[], Tensor]) -> list[str]:
        """Starts summing gradients, scaled, into shards; names those that this rank computed."""
        used = [name for unit in self._units for name in unit.reduce(ask_scale)]
        _scale([each.grad for each in self._alone.values()], ask_scale)
        return used + [name for name, each in self._alone.items() if each.grad is not None]

    def sum_over_replicas(self) -> None:
        """Waits for the sums over shards."""
        for unit in self._units:
            unit.sum_over_replicas()

    def finish(self, ask_scale: Callable[[], Tensor] | None = None) -> None:
        """Waits for all sums and adds them to the gradients of the shards; `ask_scale` where they left unscaled."""
        for unit in self._units:
            unit.finish(ask_scale)
        if ask_scale is not None:
            _scale([each.grad for each in self._alone.values()], ask_scale)

    def forget(self) -> None:
        """Drops gradients, of an unfinished step too."""
        for unit in self._units:
            unit.forget()
        for each in self._alone.values():
            each.grad = None


def _scale(gradients: Sequence[Tensor | None], ask_scale: Callable[[], Tensor]) -> None:
    held = [each for each in gradients if each is not None]
    if held:
        torch._foreach_mul_(held, ask_scale().to(held[0].device))
