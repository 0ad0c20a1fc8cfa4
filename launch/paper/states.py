"""Bytes of states and of data-parallel collectives of a job on paper, rank by rank of its pipeline."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import nn

from meshwright.clusters.simulated.keeping import Share, States
from meshwright.clusters.simulated.paper import StageBytes
from meshwright.parallel.blocks import find_blocks, own_parameters
from meshwright.parallel.experts import ExpertPlan
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.options import Options
from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.predicted import padded_elements, predicted_calls
from meshwright.parallel.stages import Stages
from meshwright.parallel.work import Sent

__all__ = ["block_parameters", "data_calls", "stage_bytes", "states_of"]


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

    def share(self, names: Sequence[str]) -> Share:
        """What is sharded of some."""
        padded = {name: self._padded(name) for name in names}
        sharded = [name for name, (_, over) in padded.items() if over > 1]
        trained = list(self._wanted(sharded, True))
        return Share(
            whole=sum(padded[name][0] for name in sharded),
            trained=sum(padded[name][0] for name in trained),
            shard=sum(padded[name][0] / padded[name][1] for name in trained),
        )

    def alone(self, names: Sequence[str]) -> float:
        """Gradients that nobody else has, of trained ones."""
        mesh = self._mesh
        replicas = mesh.world_size // mesh.pp // mesh.ep
        return self.parted(names)[1] if replicas == 1 else 0.0

    def bucketed(self, names: Sequence[str]) -> float:
        """Gradients that are sent from buckets, where they are not sharded."""
        if self._mesh.fsdp > 1 or self._mesh.dp == 1:
            return 0.0
        return self.whole(names, trained=True) - self.alone(names)

    def _wanted(self, names: Iterable[str], trained: bool) -> Iterable[str]:
        return (name for name in names if self._held[name].requires_grad or not trained)

    def _padded(self, name: str) -> tuple[float, int]:
        parameter, over = self._held[name], self._mesh.fsdp
        if self._experts.degree > 1 and self._experts.holds(name) and over > 1:
            over = self._mesh.world_size // self._mesh.pp // self._mesh.ep
        shape = self._experts.local_shape(name, parameter.shape, 0)
        return padded_elements(shape, over) * parameter.element_size(), over


def states_of(model: nn.Module, mesh: Mesh, options: Options, *, stages: Stages, experts: ExpertPlan) -> list[States]:
    """What each rank of the pipeline keeps, and how it comes and goes."""
    sizes = _Sizes(model, mesh, experts)
    own, rest = own_parameters(model, stages.homes)
    blocks, known = block_parameters(model, options), dict(model.named_parameters())
    parts = {path: [name for name in names if name in known] for path, names in blocks.items()}
    inside = set().union(*parts.values())
    parts[""] = [name for name in known if name not in inside]
    found = []
    for rank in range(mesh.pp):
        names = [*own.get(rank, []), *rest]
        trained = sizes.kept(names, trained=True)
        found.append(
            States(
                parameters=sizes.kept(names),
                gradients=trained,
                optimizer=2 * trained,
                buckets=sizes.bucketed(names),
                alone={path: sizes.alone(each) for path, each in parts.items() if path},
                shares={path: sizes.share(each) for path, each in parts.items()} if mesh.fsdp > 1 else {},
                follows=bool(stages.blocks),
                zero_stage=options.zero_stage,
                num_buffers=options.num_buffers,
            )
        )
    return found


def block_parameters(model: nn.Module, options: Options) -> dict[str, list[str]]:
    """Block -> names of its parameters."""
    return {
        path: [f"{path}.{name}" for name, _ in block.named_parameters()]
        for path, block in find_blocks(model, options.blocks).items()
    }


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
