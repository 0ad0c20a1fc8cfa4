"""What every data engine must do, and the choice between them."""

from typing import Protocol

from torch import Tensor, nn

from meshwright.parallel.collectives import Groups
from meshwright.parallel.options import Options

__all__ = ["DataEngine", "build_data_engine"]


class DataEngine(Protocol):
    """Turns gradients of local micro-batches into global ones.

    One step is begin, (prepare, backward) per micro-batch, launch, finish.
    """

    module: nn.Module
    norm_axes: tuple[str, ...]

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        ...

    def prepare(self, last: bool) -> None:
        """Says whether the next micro-batch is the last of its step."""
        ...

    def backward(self, loss: Tensor, items: Tensor) -> None:
        """Adds `items` times the gradient of `loss`."""
        ...

    def used(self) -> list[bool]:
        """For each trained parameter, whether this rank computed a gradient for it in this step."""
        ...

    def launch(self) -> None:
        """Starts the reductions that backward did not."""
        ...

    def finish(self, scale: Tensor, used: list[bool]) -> None:
        """Waits for the sums and multiplies them by `scale`; parameters no rank used keep no gradient."""
        ...

    def release(self) -> None:
        """Frees whole parameters that a forward pass without backward left behind."""
        ...

    def local(self) -> dict[str, tuple[nn.Parameter, Tensor | None]]:
        """Trained parameters and their gradients as this rank holds them."""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """The full tensor behind a parameter or gradient; every rank must ask."""
        ...

    def as_sharded(self, name: str, tensor: Tensor) -> Tensor:
        """How a tensor shaped like this rank's part of a parameter is written to a checkpoint."""
        ...


def build_data_engine(module: nn.Module, groups: Groups, options: Options) -> DataEngine:
    """Picks the data engine that a mesh and options ask for and hands it the model."""
    if groups.mesh.fsdp > 1:
        from meshwright.parallel.shard import Shard

        return Shard(module, groups, zero_stage=options.zero_stage, offload=options.offload == "cpu")
    from meshwright.parallel.replicate import Replicate

    return Replicate(module, groups, bucket_bytes=options.bucket_bytes)
