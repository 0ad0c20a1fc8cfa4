"""What the engines share whose parameters and gradients are in shards along `fsdp`."""

from collections.abc import Collection, Iterable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.parallel.data import LocalStates
from meshwright.parallel.shared import SharedFlags

__all__ = ["ShardedStates"]


class ShardedStates(LocalStates):
    """States as DTensors, sharded along dim 0."""

    def local(self) -> dict[str, tuple[nn.Parameter, Tensor | None]]:
        """Trained parameters and the local shard of their gradients."""
        found: dict[str, tuple[nn.Parameter, Tensor | None]] = {}
        for name, parameter in self._trained.items():
            gradient = parameter.grad
            found[name] = (parameter, _local(gradient) if gradient is not None else None)
        return found

    def whole(self, tensor: Tensor) -> Tensor:
        """The full tensor behind a parameter, gradient or state of this engine; every rank must ask."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def as_sharded(self, name: str, tensor: Tensor) -> Tensor:
        """How `tensor` (shaped like this rank's part of parameter `name`) is written to a checkpoint."""
        like = self._trained[name]
        if tensor.shape != _local(like).shape:
            return tensor
        if not isinstance(like, DTensor) or self._spread.is_dealt(name):
            return self._spread.part(name, like, tensor)
        return DTensor.from_local(
            tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def _shared_flags(self, used: Collection[str]) -> list[SharedFlags]:
        """Starts asking which parameters some rank computed a gradient for."""
        dense, experts = self._experts.parted(self.local())
        return [SharedFlags(dense, used, self._groups), SharedFlags(experts, used, self._groups, "edp")]

    def _drop_unused(self, flags: Iterable[SharedFlags]) -> None:
        """Leaves no gradient where no rank had one."""
        for each in flags:
            for name in each.unused():
                self._trained[name].grad = None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
