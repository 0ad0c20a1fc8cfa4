"""What the engines share whose parameters and gradients are in shards along `fsdp`."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.parallel.data import LocalStates

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
        if self._dealt.is_dealt(name) and isinstance(like, DTensor) and tensor.shape == like.to_local().shape:
            return self._dealt.part(name, like, tensor)
        if not isinstance(like, DTensor) or tensor.shape != like.to_local().shape:
            return tensor
        return DTensor.from_local(
            tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
