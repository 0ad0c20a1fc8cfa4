"""The wrap report: per axis what was done, what was not, why, and which collectives one step will cost."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch import nn

from meshwright.parallel.blocks import find_blocks, own_blocks, own_parameters
from meshwright.parallel.context.chosen import way_of
from meshwright.parallel.context.predicted import reason_unknown
from meshwright.parallel.costs import settled
from meshwright.parallel.errors import WrapError
from meshwright.parallel.experts import ExpertPlan
from meshwright.parallel.footprint import Footprint
from meshwright.parallel.ledger import Call, LedgerSummary
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.options import Options
from meshwright.parallel.plan import Plans
from meshwright.parallel.predicted import (
    Positions,
    context_calls,
    first_shares,
    padded_elements,
    predicted_calls,
    tensor_calls,
)
from meshwright.parallel.stages import stages_of
from meshwright.parallel.tensor_plan import TensorPlan

__all__ = ["WrapReport", "describe", "kept_elements"]


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
        collectives: predicted calls of one step of the first rank, equal to what the ledger counts; those of `tp` and
            `cp` for micro-batches shaped like the example.
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


def describe(model: nn.Module, mesh: Mesh, options: Options, plans: Plans | None = None) -> WrapReport:
    """Says what wrapping `model` on `mesh` will do, before it is done.

    Args:
        model: unwrapped.
        mesh: of all ranks.
        options: of the wrap.
        plans: needed where the mesh has `tp`, `cp` or `ep`.
    """
    plans = plans or Plans()
    options = settled(options, model)
    mine = first_shares(model, plans.tensor)
    kept = kept_elements(mine, mesh, options, experts=plans.experts)
    memory, unknown = _memory(model, mesh, options, plans)
    positions = Positions.of(model, mine, mesh=mesh, options=options, plan=plans.context)
    calls = _calls(mine, mesh, options, plan=plans.tensor, positions=positions)
    notes = (*_notes(model), *_padding(mine, mesh), *unknown, *_untold(mesh, options, positions))
    return WrapReport(
        mesh=str(mesh),
        axes=(*_dealt_axes(plans, mesh, options), *_axes(model, mesh, options, plans.tensor)),
        notes=(*notes, *plans.experts.notes),
        num_parameters=sum(each.numel() for each in model.parameters()),
        parameters_per_rank=sum(kept.values()),
        bytes_per_rank=sum(number * each.element_size() for each, number in kept.items()),
        collectives=None if calls is None else LedgerSummary.of(calls),
        table="\n".join(each.table() for each in (plans.tensor, plans.context) if each is not None and each.decisions),
        memory=memory,
    )


def _most_held(model: nn.Module, mesh: Mesh, options: Options) -> list[nn.Parameter]:
    """Parameters of the rank of the pipeline that holds most of them."""
    held = dict(model.named_parameters())
    own, rest = own_parameters(model, stages_of(model, mesh, 0, options).homes)
    names = max(own.values(), key=lambda names: sum(held[name].numel() for name in names), default=[])
    return [held[name] for name in (*names, *rest)]


def kept_elements(model: nn.Module, mesh: Mesh, options: Options, *, experts: ExpertPlan) -> dict[nn.Parameter, int]:
    """Elements of each parameter that a rank keeps between steps."""
    names = {each: name for name, each in model.named_parameters()}
    found: dict[nn.Parameter, int] = {}
    for each in _most_held(model, mesh, options):
        name, over = names[each], mesh.fsdp
        if experts.degree > 1 and experts.holds(name) and over > 1:
            over = _copies(mesh)
        found[each] = padded_elements(experts.local_shape(name, each.shape, 0), over) // over
    return found


def _copies(mesh: Mesh) -> int:
    """Ranks of a stage that keep the same experts."""
    return mesh.world_size // mesh.pp // mesh.ep


def _memory(model: nn.Module, mesh: Mesh, options: Options, plans: Plans) -> tuple[Footprint | None, tuple[str, ...]]:
    from meshwright.parallel.fake_rank import first_footprint  # which builds an engine, whose parts report

    if not options.predict_memory:
        return None, ()
    assumed = ("peak memory is that of tokens spread evenly over experts",) if mesh.ep > 1 else ()
    try:
        return first_footprint(model, mesh, options, plans=plans), assumed
    except WrapError as error:
        return None, (f"peak memory is not predicted: {error}",)


def _untold(mesh: Mesh, options: Options, positions: Positions | None) -> Iterable[str]:
    """Why collectives along `tp` and `cp` are not predicted."""
    if mesh.pp > 1 or mesh.tp == mesh.cp == mesh.ep == 1:
        return
    if mesh.ep > 1:
        yield "collectives are not predicted: what ranks of ep send depends on the routing"
        return
    reason = None if positions is None else reason_unknown(positions.plan, positions.way, options.sizes)
    spans = [name for name in ("ffn_block", "layer_block") if getattr(options.sizes, name, None) and mesh.tp > 1]
    if options.recompute:
        reason = "recompute runs those of forward again"
    elif spans:
        reason = f"{spans[0]} runs those of tp for so many positions at a time"
    if reason is not None:
        yield f"collectives are not predicted: {reason}"


def _calls(
    mine: nn.Module, mesh: Mesh, options: Options, *, plan: TensorPlan | None, positions: Positions | None
) -> list[Call] | None:
    """The collectives of a step on the first rank; None where they are not known."""
    if options.data_engine != "torch" or mesh.pp > 1 or any(_untold(mesh, options, positions)):
        return None
    of_tensors = tensor_calls(mine, mesh, options, plan, positions=positions)
    return [
        *predicted_calls(mine, mesh, options),
        *of_tensors,
        *context_calls(mine, mesh, options, positions=positions),
    ]


def _dealt_axes(plans: Plans, mesh: Mesh, options: Options) -> Iterable[tuple[str, str]]:
    if plans.experts.degree > 1:
        copies = _copies(mesh)
        same = "no other rank of a stage keeps the same ones" if copies == 1 else f"{copies} ranks keep the same ones"
        yield "ep", f"{plans.experts.summary}; {same}"
    context = plans.context
    if context is not None and context.degree > 1:
        way = way_of(options.cp_kind, context.attends, degree=mesh.cp, tp=mesh.tp)
        said = [f"positions of each sequence over {mesh.cp} ranks, {way.dealing}", way.reason, context.between()]
        yield "cp", "; ".join([*filter(None, said), _around(options)])


def _around(options: Options) -> str:
    if options.sizes is None or options.sizes.loss_block is None:
        return "what stands around blocks runs whole on each, head and loss too (loss_block of blockwise= shares these)"
    return "what stands around blocks runs whole on each, but the rows of the loss are shared"


def _axes(model: nn.Module, mesh: Mesh, options: Options, plan: TensorPlan | None) -> Iterable[tuple[str, str]]:
    if mesh.pp > 1:
        stages = stages_of(model, mesh, 0, options)
        yield (
            "pp",
            f"{options.schedule_name}: {len(stages.blocks)} blocks in {stages.schedule.num_stages} stages on {mesh.pp} "
            "ranks, what stands around blocks on all of them",
        )
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
        sharded = {
            1: "optimizer states",
            2: "optimizer states and gradients",
            3: "parameters, gradients, optimizer states",
        }
        layered = options.schedule != "accumulate"
        number = len((find_blocks if layered else own_blocks)(model, options.blocks))
        whole = (
            f", at most {min(number, options.num_buffers)} blocks whole" if layered and options.zero_stage == 3 else ""
        )
        yield (
            "fsdp",
            f"ZeRO {options.zero_stage}: {sharded[options.zero_stage]} sharded over {mesh.fsdp} ranks, "
            f"{number + 1} units ({number} blocks and the rest){whole}",
        )


def _padding(model: nn.Module, mesh: Mesh) -> Iterable[str]:
    """What `fsdp` adds to parameters whose dim 0 it does not divide."""
    added = {name: padded_elements(each.shape, mesh.fsdp) - each.numel() for name, each in model.named_parameters()}
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
