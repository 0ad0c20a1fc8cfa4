"""Which collectives one step runs, by formula: equal to what the ledger counts."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from meshwright.parallel.blocks import own_blocks, own_parameters
from meshwright.parallel.context.chosen import ContextWay, way_of
from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.plan import ContextPlan
from meshwright.parallel.context.predicted import DealtLoss, losses_of, microbatch_calls
from meshwright.parallel.dealt import summed_elements
from meshwright.parallel.layout import deal
from meshwright.parallel.ledger import Call
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.meta import without_values
from meshwright.parallel.options import Options
from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.replicate import cut_buckets
from meshwright.parallel.sharding import padded_rows
from meshwright.parallel.stages import stages_of
from meshwright.parallel.tensor import keep_shares, length_of
from meshwright.parallel.tensor_plan import TensorPlan

__all__ = ["Positions", "context_calls", "first_shares", "padded_elements", "predicted_calls", "tensor_calls"]


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
        of_units = _shard_calls if options.schedule == "accumulate" else _rotate_calls
        return calls + of_units(model, mesh, options)
    if mesh.dp > 1:
        calls += _replicate_calls(trained, mesh, options)
    return calls


@dataclass(frozen=True)
class Positions:
    """How `cp` deals the positions of a model.

    Args:
        plan: along `cp`.
        way: how keys and queries meet.
        losses: whose rows are dealt.
    """

    plan: ContextPlan
    way: ContextWay
    losses: tuple[DealtLoss, ...]

    @classmethod
    def of(
        cls, model: nn.Module, mine: nn.Module, *, mesh: Mesh, options: Options, plan: ContextPlan | None
    ) -> "Positions | None":
        """Those of a whole model, of which the first rank of `tp` holds `mine`; None without `cp`."""
        if plan is None or plan.degree == 1:
            return None
        way = way_of(options.cp_kind, plan.attends, degree=mesh.cp, tp=mesh.tp)
        return cls(plan, way, tuple(losses_of(plan, model, mine=mine, sizes=options.sizes)))

    def share_of(self, path: str, calls: Sequence[tuple[str, int]]) -> Sequence[tuple[str, int]]:
        """What is left of collectives of `tp` on whole sequences, where a rank has its positions only."""
        full = length_of(path, self.plan.lengths)
        if full:
            own = Dealing(self.way.dealing, self.plan.degree).size(full, 0)
            return [(kind, elements // full * own) for kind, elements in calls]
        for loss in self.losses:
            if loss.head == path:
                rows = deal(loss.scored.rows, self.plan.degree)[0][1]
                entering, *of_rows = calls
                return [entering, *((kind, elements // loss.scored.rows * rows) for kind, elements in of_rows)]
        return calls


def tensor_calls(
    model: nn.Module, mesh: Mesh, options: Options, plan: TensorPlan | None, *, positions: Positions | None = None
) -> Iterable[Call]:
    """The collectives of `tp`: those of each unit as its proof counted them on the example, and one sum at the end."""
    if plan is None or plan.degree == 1:
        return
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    size_bytes = next(iter(trained.values())).element_size()
    for path, calls in plan.calls.items():
        for kind, elements in calls if positions is None else positions.share_of(path, calls):
            yield from [Call("tp", kind, mesh.tp, elements * size_bytes)] * options.num_microbatches
    summed = summed_elements(plan, {name: tuple(each.shape) for name, each in trained.items()}, mesh.fsdp)
    if summed:
        yield Call("tp", "all_reduce", mesh.tp, summed * size_bytes)


def context_calls(mine: nn.Module, mesh: Mesh, options: Options, *, positions: Positions | None) -> Iterable[Call]:
    """The collectives of `cp` on the first rank: those of each micro-batch, and one sum at the end."""
    if positions is None:
        return
    trained = {name: each for name, each in mine.named_parameters() if each.requires_grad}
    itemsize = next(iter(trained.values())).element_size()
    found = microbatch_calls(positions.plan, positions.way, positions.losses, itemsize=itemsize, tp=mesh.tp)
    yield from [*found] * options.num_microbatches
    partial = {name: each for name, each in trained.items() if name in positions.plan.partial}
    for dtype in dict.fromkeys(each.dtype for each in partial.values()):
        shapes = {name: tuple(each.shape) for name, each in partial.items() if each.dtype is dtype}
        summed = summed_elements(positions.plan, shapes, mesh.fsdp) + len(shapes)  # and whether each was used
        yield Call("cp", "all_reduce", mesh.cp, summed * dtype.itemsize)


def first_shares(model: nn.Module, plan: TensorPlan) -> nn.Module:
    """The model as the first rank of `tp` holds it, without memory."""
    if plan.degree == 1:
        return model
    shares = without_values(model)
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


def _rotate_calls(model: nn.Module, mesh: Mesh, options: Options) -> list[Call]:
    stages = stages_of(model, mesh, 0, options)
    own, rest = own_parameters(model, stages.mine)
    gathers, reductions = (
        Counter(each.stage for each in stages.actions if each.kind is kind) for kind in (Kind.GATHER, Kind.REDUCE)
    )
    held = dict(model.named_parameters())
    calls: list[Call] = []
    for stage, unit in enumerate([*own.values(), rest]):
        members = [held[name] for name in unit]
        widest = max((each.itemsize for each in members), default=1)
        shards = -(-_unit_bytes(members, mesh.fsdp) // (mesh.fsdp * widest)) * widest
        calls += [Call("fsdp", "all_gather", mesh.fsdp, shards * mesh.fsdp)] * (gathers[stage] or 1 if shards else 0)
        for dtype in dict.fromkeys(each.dtype for each in members):
            reduced = _unit_bytes([each for each in members if each.requires_grad and each.dtype is dtype], mesh.fsdp)
            times = reductions[stage] or 1  # what stands around blocks is no stage
            calls += _sums_of(mesh, reduced) * times
    return calls


def _sums_of(mesh: Mesh, reduced_bytes: int) -> list[Call]:
    """One reduction of the gradients of a unit: over its shards, then over their replicas."""
    if not reduced_bytes:
        return []
    over_replicas = [Call("dp", "all_reduce", mesh.dp, reduced_bytes // mesh.fsdp)] if mesh.dp > 1 else []
    return [Call("fsdp", "reduce_scatter", mesh.fsdp, reduced_bytes), *over_replicas]


def _shard_calls(model: nn.Module, mesh: Mesh, options: Options) -> list[Call]:
    blocks = [list(block.parameters()) for block in own_blocks(model, options.blocks).values()]
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
    return sum(padded_elements(each.shape, degree) * each.element_size() for each in parameters)


def padded_elements(shape: tuple[int, ...], degree: int) -> int:
    """Elements of a parameter once its dim 0 is rounded up to a multiple of `degree`.

    >>> padded_elements((5, 3), 2)
    18
    """
    return padded_rows(shape, degree) * degree * prod(shape[1:]) if shape and degree > 1 else prod(shape)
