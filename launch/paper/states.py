"""Bytes of states and of data-parallel collectives of a job on paper, rank by rank of its pipeline."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import nn

from meshwright.clusters.simulated.holding import States
from meshwright.clusters.simulated.paper import StageBytes
from meshwright.parallel.blocks import find_blocks, own_parameters
from meshwright.parallel.experts import ExpertPlan
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.options import Options
from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.pipeline.check import check
from meshwright.parallel.predicted import padded_elements, predicted_calls
from meshwright.parallel.stages import Stages
from meshwright.parallel.work import Sent

__all__ = ["block_parameters", "data_calls", "stage_bytes", "states_of"]

_WHOLE_AT_ONCE = 2
"""Blocks whose parameters or gradients are whole where others are sharded: one at work, one on its way."""


class _Sizes:
    """Bytes of the parameters that a rank of `tp` and `ep` has, before and after sharding."""

    def __init__(self, model: nn.Module, mesh: Mesh, experts: ExpertPlan) -> None:
        self._held = dict(model.named_parameters())
        self._mesh = mesh
        self._experts = experts

    def whole(self, names: Iterable[str], *, trained: bool = False) -> float:
        """Padded as shards need it."""
        return sum(self._padded(name)[0] for name in self._wanted(names, trained))

    def kept(self, names: Iterable[str], *, trained: bool = False) -> float:
        """Of one rank."""
        return sum(size / over for size, over in map(self._padded, self._wanted(names, trained)))

    def parted(self, names: Iterable[str]) -> tuple[float, float]:
        """Trained ones whole: dense, and of experts that are dealt."""
        wanted = list(self._wanted(names, True))
        dealt = [name for name in wanted if self._experts.degree > 1 and self._experts.holds(name)]
        return self.whole(set(wanted) - set(dealt)), self.whole(dealt)

    def _wanted(self, names: Iterable[str], trained: bool) -> Iterable[str]:
        return (name for name in names if self._held[name].requires_grad or not trained)

    def _padded(self, name: str) -> tuple[float, int]:
        parameter, over = self._held[name], self._mesh.fsdp
        if self._experts.degree > 1 and self._experts.holds(name) and over > 1:
            over = self._mesh.world_size // self._mesh.pp // self._mesh.ep
        shape = self._experts.local_shape(name, parameter.shape, 0)
        return padded_elements(shape, over) * parameter.element_size(), over


def states_of(model: nn.Module, mesh: Mesh, options: Options, *, stages: Stages, experts: ExpertPlan) -> list[States]:
    """What each rank of the pipeline keeps."""
    sizes = _Sizes(model, mesh, experts)
    own, rest = own_parameters(model, stages.homes)
    blocks = block_parameters(model, options)
    known = dict(model.named_parameters())
    largest = max((sizes.whole(name for name in names if name in known) for names in blocks), default=0.0)
    shows = stages.schedule.has(Kind.GATHER)
    peaks = check(stages.schedule).peak_gathered if shows else (0,) * mesh.pp
    found = []
    for rank in range(mesh.pp):
        names = [*own.get(rank, []), *rest]
        trained = sizes.kept(names, trained=True)
        gathered = 0.0
        if mesh.fsdp > 1:
            number = max(_WHOLE_AT_ONCE, peaks[rank]) if options.zero_stage == 3 else len(blocks)
            gathered = min(sizes.whole(names), number * largest + sizes.whole(rest if own else _outside(known, blocks)))
            gradients = sizes.whole(names, trained=True) if options.zero_stage == 1 else _WHOLE_AT_ONCE * largest
            gathered += min(gradients, sizes.whole(names, trained=True))
        found.append(States(parameters=sizes.kept(names), gradients=trained, optimizer=2 * trained, gathered=gathered))
    return found


def block_parameters(model: nn.Module, options: Options) -> list[list[str]]:
    """Names of the parameters of each block."""
    return [
        [f"{path}.{name}" for name, _ in block.named_parameters()]
        for path, block in find_blocks(model, options.blocks).items()
    ]


def _outside(known: Mapping[str, object], blocks: Iterable[Iterable[str]]) -> set[str]:
    return set(known) - {name for names in blocks for name in names}


def stage_bytes(
    model: nn.Module, mesh: Mesh, *, stages: Stages, experts: ExpertPlan
) -> tuple[dict[int, StageBytes], StageBytes, tuple[Sent, ...]]:
    """What each stage gathers and reduces, what stands around blocks does, and gathers that no schedule shows."""
    sizes = _Sizes(model, mesh, experts)
    own, rest = own_parameters(model, stages.stage_of)
    names: dict[int, list[str]] = defaultdict(list, own)
    shows = stages.schedule.has(Kind.GATHER)
    found, sent = {}, []
    for stage in range(stages.schedule.num_stages):
        dense, dealt = sizes.parted(names[stage])
        whole = sizes.whole(names[stage]) if mesh.fsdp > 1 else 0.0
        found[stage] = StageBytes(gathered=whole if shows else 0.0, reduced=dense)
        if dealt:
            sent.append(Sent("edp", "all_reduce", dealt))
        if whole and not shows and stages.schedule.homes[stage] == 0:
            sent.append(Sent("fsdp", "all_gather", whole))
    around = StageBytes(gathered=sizes.whole(rest) if mesh.fsdp > 1 else 0.0, reduced=sizes.whole(rest, trained=True))
    return found, around, tuple(sent)


def data_calls(model: nn.Module, mesh: Mesh, options: Options, *, experts: ExpertPlan) -> tuple[Sent, ...]:
    """The data-parallel collectives of a model that is stepped as a whole."""
    if mesh.ep == 1:
        calls = predicted_calls(model, mesh, options)
        return tuple(Sent(each.axis, each.kind, each.payload_bytes) for each in calls if each.axis in ("dp", "fsdp"))
    dense, dealt = _Sizes(model, mesh, experts).parted(dict(model.named_parameters()))
    axis = "fsdp" if mesh.fsdp > 1 else "dp"
    return Sent(axis, "all_reduce", dense), Sent("edp", "all_reduce", dealt)
