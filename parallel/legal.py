"""Which meshes and options go together: asked before any rank starts, so without torch."""

from typing import TYPE_CHECKING, Protocol

from meshwright.parallel.errors import WrapError
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.pipeline.choose import ACROSS_RANKS, ON_ONE_RANK, name_of

if TYPE_CHECKING:
    from meshwright.parallel.options import Options

__all__ = ["LayoutSettings", "check_layout", "check_on_paper"]


class LayoutSettings(Protocol):
    """What `Options` and the `parallel:` block of a job have in common here."""

    @property
    def blockwise(self) -> object:
        """Sizes of blocks, or None."""
        ...

    @property
    def data_engine(self) -> str:
        """Who replicates and shards."""
        ...

    @property
    def offload(self) -> str:
        """Where sharded states rest."""
        ...

    @property
    def order(self) -> str | Schedule:
        """Order of micro-batches: a name, a file's, or a value."""
        ...

    @property
    def recompute(self) -> object:
        """Blocks of which only the inputs are kept."""
        ...

    @property
    def sequence_parallel(self) -> bool:
        """Whether the sequence is dealt over `tp`."""
        ...


def check_layout(mesh: Mesh, settings: LayoutSettings) -> None:
    """Refuses meshes that cannot be had.

    Raises:
        WrapError: naming the axis and the nearest legal layout.
    """
    _check_experts(mesh, settings)
    _check_context(mesh, settings)
    if settings.sequence_parallel and mesh.tp == 1:
        raise WrapError("sequence_parallel deals the sequence over the axis tp; give the mesh tp=2 or more")
    _check_blocks(mesh, settings)
    _check_deepspeed(mesh, settings)
    _check_schedule(mesh, settings)
    if settings.offload == "cpu" and settings.data_engine == "torch" and mesh.fsdp == 1:
        raise WrapError("offload='cpu' moves sharded states; give the mesh an axis fsdp, or data_engine='deepspeed'")


def _check_experts(mesh: Mesh, settings: LayoutSettings) -> None:
    if mesh.ep == 1:
        return
    by_blocks = [name for name in ("ffn_block", "layer_block") if getattr(settings.blockwise, name, None)]
    refused = {
        "data_engine='deepspeed'": settings.data_engine == "deepspeed",
        "offload='cpu'": settings.offload == "cpu",
        "blockwise: " + " and ".join(by_blocks): bool(by_blocks),
    }
    for option, given in refused.items():
        if given:
            raise WrapError(
                f"mesh axis ep={mesh.ep} does not go with {option}; nearest legal: the same mesh {mesh} without it"
            )


def _check_context(mesh: Mesh, settings: LayoutSettings) -> None:
    if mesh.cp == 1:
        return
    refused = {
        "sequence_parallel": settings.sequence_parallel,
        "data_engine='deepspeed'": settings.data_engine == "deepspeed",
    }
    for option, given in refused.items():
        if given:
            raise WrapError(
                f"mesh axis cp={mesh.cp} does not go with {option}; nearest legal: the same mesh {mesh} without it"
            )


def _check_blocks(mesh: Mesh, settings: LayoutSettings) -> None:
    given = [name for name in ("ffn_block", "layer_block", "loss_block") if getattr(settings.blockwise, name, None)]
    if given and given[0] != "loss_block" and settings.sequence_parallel:
        raise WrapError(f"blockwise: {given[0]} does not go with sequence_parallel; use one of them")
    if "layer_block" in given and mesh.cp > 1:
        raise WrapError(f"blockwise: layer_block does not go with cp={mesh.cp}; use ffn_block with it")
    if given and settings.data_engine == "deepspeed":
        raise WrapError(
            f"blockwise: {' and '.join(given)} compute with parameters after their module's call, when DeepSpeed has "
            "sharded them again; use data_engine='torch', or leave them out"
        )


def _check_schedule(mesh: Mesh, settings: LayoutSettings) -> None:
    fitting = ACROSS_RANKS if mesh.pp > 1 else ON_ONE_RANK
    order, name = settings.order, name_of(settings.order)
    if order in (*ACROSS_RANKS, *ON_ONE_RANK) and order not in fitting:
        nearest = "'modular'" if mesh.pp > 1 else "'layered'"
        if order == "accumulate":
            nearest += " with group_size=1, one micro-batch after the other"
        raise WrapError(
            f"schedule={name!r} does not go with pp={mesh.pp}; nearest legal: schedule={nearest} "
            f"(choose from: {', '.join(fitting)})"
        )
    if order == "accumulate":
        _check_whole(settings)
        return
    refused = {
        "data_engine='deepspeed'": settings.data_engine == "deepspeed",
        "offload='cpu'": settings.offload == "cpu",
    }
    for option, given in refused.items():
        if given:
            other = "accumulate" if mesh.pp == 1 else name
            raise WrapError(
                f"schedule={name!r} does not go with {option} by now; nearest legal: "
                f"schedule={other!r} on {mesh} without it"
            )


def check_on_paper(options: "Options", *, memory_of_host: bool = True) -> None:
    """Refuses what is not run on tensors without values.

    Args:
        options: of a wrap.
        memory_of_host: whether what is kept there may count as a rank's memory.

    Raises:
        WrapError: with what to ask for instead.
    """
    if options.data_engine == "deepspeed":
        raise WrapError(
            "data_engine='deepspeed' steps by code of its own, which is not run without values; ask for "
            "data_engine='torch' (dp for ZeRO 0, fsdp and zero_stage for 1 to 3), or count real ranks (ledger_step)"
        )
    moved = {"offload='cpu'": options.offload == "cpu", "offload_inputs": options.offload_inputs}
    for name in [name for name, given in moved.items() if given and not memory_of_host]:
        raise WrapError(
            f"{name} moves tensors to the host's memory, which is not told from a GPU's here; leave it out, which tells"
            " what is needed without"
        )


def _check_whole(settings: LayoutSettings) -> None:
    if settings.recompute:
        raise WrapError(
            "recompute goes with schedules that go block by block; use schedule='layered', or the model's own "
            "(gradient_checkpointing_enable() of transformers)"
        )


def _check_deepspeed(mesh: Mesh, settings: LayoutSettings) -> None:
    if settings.data_engine != "deepspeed":
        return
    if mesh.tp > 1:
        raise WrapError(
            f"data_engine='deepspeed' does not take the axis tp={mesh.tp}; use data_engine='torch' with "
            f"nearest legal layout: fsdp={mesh.data_degree} x tp={mesh.tp}"
        )
    if mesh.fsdp > 1 and mesh.dp > 1:
        raise WrapError(
            f"data_engine='deepspeed' shards over all data ranks, so it takes dp or fsdp, not {mesh}; "
            f"nearest legal layout: fsdp={mesh.data_degree}"
        )
