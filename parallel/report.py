"""The wrap report: per axis what was done, what was not, why, and which collectives one step will cost."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from math import prod

import torch
from torch import nn

from meshwright.parallel.blocks import own_blocks
from meshwright.parallel.dealt import summed_elements
from meshwright.parallel.errors import WrapError
from meshwright.parallel.footprint import Footprint, footprint
from meshwright.parallel.ledger import Call, LedgerSummary
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.options import Options
from meshwright.parallel.replicate import cut_buckets
from meshwright.parallel.tensor import keep_shares
from meshwright.parallel.tensor_plan import TensorPlan

__all__ = ["WrapReport", "describe", "first_shares", "predicted_calls"]


@dataclass(frozen=True)
class WrapReport:
    """What `parallelize` did to a model; prints as text, compares by value.

    Attributes:
        mesh: the mesh, printed.
        axes: (axis, what was done along it).
        notes: what a user may not expect: ties, replicated parts, frozen parameters.
        num_parameters: of the whole model.
        parameters_per_rank: largest number of elements a rank keeps between steps (padding included).
        bytes_per_rank: of them.
        collectives: predicted calls of one step, equal to what the ledger counts; those of `tp` for micro-batches
            shaped like the example.
        memory: of the first rank, if `predict_memory` asked for it and it can be told.
        table: module, placement and reason, where the mesh has `tp`.
    """

    mesh: str
    axes: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    num_parameters: int
    parameters_per_rank: int
    bytes_per_rank: int
    collectives: LedgerSummary | None
    table: str = ""
    memory: Footprint | None = None

    def as_dict(self) -> dict[str, object]:
        """A JSON-able copy."""
        return {
            "mesh": self.mesh,
            "axes": dict(self.axes),
            "notes": list(self.notes),
            "num_parameters": self.num_parameters,
            "parameters_per_rank": self.parameters_per_rank,
            "bytes_per_rank": self.bytes_per_rank,
            "memory": None if self.memory is None else asdict(self.memory),
            "collectives_per_step": None if self.collectives is None else self.collectives.as_dict(),
        }

    def __str__(self) -> str:
        lines = [
            f"mesh {self.mesh}: {self.num_parameters:,} parameters, {self.parameters_per_rank:,} "
            f"({self.bytes_per_rank:,} bytes) kept by one rank",
            *(f"  {axis:<5} {done}" for axis, done in self.axes),
            *(f"  note: {note}" for note in self.notes),
            *(f"  {row}" for row in self.table.splitlines()),
        ]
        if self.memory is not None:
            states_mb, peak_mb = (each / 1e6 for each in (self.memory.states_bytes, self.memory.peak_bytes))
            lines.append(
                f"memory of one rank (predicted, without optimizer states): {peak_mb:,.1f} MB at most in a step, "
                f"{states_mb:,.1f} MB between steps"
            )
        if self.collectives is not None:
            lines += [
                "collectives of one step (predicted):",
                *(f"  {row}" for row in str(self.collectives).splitlines()),
            ]
        return "\n".join(lines)


def describe(model: nn.Module, mesh: Mesh, options: Options, plan: TensorPlan | None = None) -> WrapReport:
    """Says what wrapping `model` on `mesh` will do, before it is done; `plan` is needed where the mesh has `tp`."""
    whole = sum(each.numel() for each in model.parameters())
    mine = model if plan is None else first_shares(model, plan)
    kept = {each: _padded(each.shape, mesh.fsdp) // mesh.fsdp for each in mine.parameters()}
    known = options.data_engine == "torch"
    memory, unknown = _memory(model, mesh, options, plan)
    calls = [*predicted_calls(mine, mesh, options), *_tensor_calls(mine, mesh, options, plan)] if known else None
    return WrapReport(
        mesh=str(mesh),
        axes=tuple(_axes(model, mesh, options, plan)),
        notes=(*_notes(model), *_padding(mine, mesh), *unknown),
        num_parameters=whole,
        parameters_per_rank=sum(kept.values()),
        bytes_per_rank=sum(number * each.element_size() for each, number in kept.items()),
        collectives=None if calls is None else LedgerSummary.of(calls),
        table="" if plan is None else plan.table(),
        memory=memory,
    )


def _memory(
    model: nn.Module, mesh: Mesh, options: Options, plan: TensorPlan | None
) -> tuple[Footprint | None, tuple[str, ...]]:
    if not options.predict_memory:
        return None, ()
    try:
        return footprint(model, mesh, options, plan or TensorPlan(degree=1)), ()
    except WrapError as error:
        return None, (f"peak memory is not predicted: {error}",)


def predicted_calls(model: nn.Module, mesh: Mesh, options: Options) -> list[Call]:
    """The collectives of the data axes in one step by formula (see `shard` and `replicate`), in no particular order."""
    trained = [each for each in model.parameters() if each.requires_grad]
    calls: list[Call] = []
    if mesh.data_degree > 1:
        axis = "+".join(axis for axis in ("dp", "fsdp") if mesh.degree(axis) > 1)
        calls.append(Call(axis, "all_reduce", mesh.data_degree, 16))  # loss and items
        if mesh.fsdp > 1:
            calls.append(Call(axis, "all_reduce", mesh.data_degree, 8 * len(trained)))  # use
    if mesh.fsdp > 1:
        return calls + _shard_calls(model, mesh, options)
    if mesh.dp > 1:
        calls += _replicate_calls(trained, mesh, options)
    return calls


def _tensor_calls(model: nn.Module, mesh: Mesh, options: Options, plan: TensorPlan | None) -> Iterable[Call]:
    """The collectives of `tp`: those of each unit as its proof counted them on the example, and one sum at the end."""
    if plan is None or plan.degree == 1:
        return
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    size_bytes = next(iter(trained.values())).element_size()
    for calls in plan.calls.values():
        for kind, elements in calls:
            yield from [Call("tp", kind, mesh.tp, elements * size_bytes)] * options.num_microbatches
    summed = summed_elements(plan, {name: tuple(each.shape) for name, each in trained.items()}, mesh.fsdp)
    if summed:
        yield Call("tp", "all_reduce", mesh.tp, summed * size_bytes)


def first_shares(model: nn.Module, plan: TensorPlan) -> nn.Module:
    """The model as the first rank of `tp` holds it, without memory."""
    if plan.degree == 1:
        return model
    memo: dict[int, object] = {}
    for each in model.parameters():
        memo[id(each)] = nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=each.requires_grad)
    memo.update({id(each): torch.empty_like(each, device="meta") for each in model.buffers()})
    shares = deepcopy(model, memo)
    keep_shares(shares, plan.splits, 0)
    return shares


def _replicate_calls(trained: list[nn.Parameter], mesh: Mesh, options: Options) -> list[Call]:
    calls: list[Call] = []
    backwards = list(reversed(trained))
    for dtype in dict.fromkeys(each.dtype for each in backwards):
        sizes = [each.numel() * dtype.itemsize for each in backwards if each.dtype == dtype]
        for bucket in cut_buckets(sizes, min(options.bucket_bytes, 1 << 20), options.bucket_bytes):
            calls.append(Call("dp", "all_reduce", mesh.dp, sum(sizes[index] + dtype.itemsize for index in bucket)))
    return calls


def _shard_calls(model: nn.Module, mesh: Mesh, options: Options) -> list[Call]:
    blocks = [list(block.parameters()) for block in own_blocks(model).values()]
    claimed = {id(each) for block in blocks for each in block}
    root = [each for each in model.parameters() if id(each) not in claimed]
    calls: list[Call] = []
    for position, unit in enumerate([*blocks, root]):
        held = position >= len(blocks) - 1  # the last block and the root stay whole until backward
        num_gathers = options.num_microbatches * (1 if held else 2) if options.zero_stage == 3 else 1
        num_reductions = 1 if options.zero_stage == 1 else options.num_microbatches
        gathered = _unit_bytes(unit, mesh.fsdp)
        reduced = _unit_bytes([each for each in unit if each.requires_grad], mesh.fsdp)
        calls += [Call("fsdp", "all_gather", mesh.fsdp, gathered)] * (num_gathers if gathered else 0)
        calls += [Call("fsdp", "reduce_scatter", mesh.fsdp, reduced)] * (num_reductions if reduced else 0)
        if mesh.dp > 1 and reduced:
            calls.append(Call("dp", "all_reduce", mesh.dp, reduced // mesh.fsdp))
    return calls


def _unit_bytes(parameters: Iterable[nn.Parameter], degree: int) -> int:
    return sum(_padded(each.shape, degree) * each.element_size() for each in parameters)


def _padded(shape: tuple[int, ...], degree: int) -> int:
    """Elements of a parameter once its dim 0 is rounded up to a multiple of `degree`."""
    if degree == 1:
        return prod(shape)
    first, rest = (shape[0], prod(shape[1:])) if shape else (1, 1)
    return -(-first // degree) * degree * rest


def _axes(model: nn.Module, mesh: Mesh, options: Options, plan: TensorPlan | None) -> Iterable[tuple[str, str]]:
    if plan is not None and plan.degree > 1:
        yield "tp", plan.summary()
    if options.data_engine == "deepspeed":
        yield (
            "data",
            f"DeepSpeed ZeRO stage {options.zero_stage} over {mesh.data_degree} ranks, offload {options.offload}",
        )
        return
    if mesh.dp > 1:
        yield (
            "dp",
            f"{mesh.dp} replicas, gradients summed in buckets of {options.bucket_bytes:,} bytes during backward",
        )
    if mesh.fsdp > 1:
        blocks = own_blocks(model)
        sharded = {
            1: "optimizer states",
            2: "optimizer states and gradients",
            3: "parameters, gradients, optimizer states",
        }
        yield (
            "fsdp",
            f"ZeRO {options.zero_stage}: {sharded[options.zero_stage]} sharded over {mesh.fsdp} ranks, "
            f"{len(blocks) + 1} units ({len(blocks)} blocks and the rest)",
        )


def _padding(model: nn.Module, mesh: Mesh) -> Iterable[str]:
    """What `fsdp` adds to parameters whose dim 0 it does not divide."""
    added = {name: _padded(each.shape, mesh.fsdp) - each.numel() for name, each in model.named_parameters()}
    padded = [name for name, number in added.items() if number]
    if padded:
        yield f"padded along fsdp: {len(padded)} parameters by {sum(added.values()):,} elements, first {padded[0]}"


def _notes(model: nn.Module) -> Iterable[str]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        if len(names) > 1:
            yield f"tied, kept as one parameter: {', '.join(names)}"
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        yield f"frozen, no gradient: {len(frozen)} parameters, first {frozen[0]}"
