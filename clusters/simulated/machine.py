"""Ranks of a mesh on a cluster: what their works and collectives take, over the links that their places give them."""

from collections.abc import Iterable
from dataclasses import dataclass

from meshwright.clusters.simulated.cluster import Cluster, Group
from meshwright.clusters.simulated.efficiency import Efficiency
from meshwright.clusters.simulated.experts import Hop, ways_of
from meshwright.parallel.folding import FOLDS, ranks_along
from meshwright.parallel.mesh import AXES, Mesh
from meshwright.parallel.work import Passes, Sent, Work

__all__ = ["Machine", "Priced"]

_LAYER_OPERATIONS = 40
"""What one layer of the fitted runs starts in one direction, about; their host's time is said for a layer."""


@dataclass(frozen=True, kw_only=True)
class Priced:
    """Seconds of one rank by cause: computing, and collectives along axes that it waits for.

    Args:
        compute_s: with what the host adds.
        tp_s: along `tp`.
        cp_s: along `cp`, what attention does not hide.
        ep_s: along `ep`.
    """

    compute_s: float = 0.0
    tp_s: float = 0.0
    cp_s: float = 0.0
    ep_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All together."""
        return self.compute_s + self.tp_s + self.cp_s + self.ep_s

    def __add__(self, other: "Priced") -> "Priced":
        """One after the other."""
        return Priced(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def times(self, factor: float) -> "Priced":
        """So often."""
        return Priced(**{name: factor * value for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A mesh on a cluster.

    Args:
        mesh: of all ranks; neighbours share a node.
        cluster: with as many GPUs.
        efficiency: of its hardware.

    Raises:
        ValueError: for a mesh that does not cover the cluster.
    """

    mesh: Mesh
    cluster: Cluster
    efficiency: Efficiency

    def __post_init__(self) -> None:
        if self.mesh.world_size != self.cluster.num_gpus:
            raise ValueError(
                f"the mesh ({self.mesh}) has {self.mesh.world_size} ranks; the cluster has {self.cluster.num_gpus} GPUs"
            )

    @property
    def is_host(self) -> bool:
        """Whether ranks compute on CPUs, in the host's memory."""
        return self.cluster.gpu.generation == "cpu"

    def group(self, axis: str, *, consecutive: int = 0) -> Group:
        """The ranks that share a collective along an axis, all or so many side by side, and their links."""
        if axis not in FOLDS and axis not in AXES:
            return self.cluster.group(1)
        if axis in AXES:
            inner = AXES[AXES.index(axis) + 1 :]
            stride = 1
            for each in inner:
                stride *= self.mesh.degree(each)
            return self.cluster.group(consecutive or self.mesh.degree(axis), stride)
        ranks = ranks_along(self.mesh, 0, axis)
        return self.cluster.group(len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1)

    def sent_s(self, sent: Sent) -> float:
        """Seconds of one collective, of which nothing is hidden."""
        group = self.group(sent.axis, consecutive=sent.consecutive)
        if group.size == 1 or not sent.size_bytes:
            return 0.0
        if sent.kind == "hop":
            return self.efficiency.hop_s(sent.size_bytes, group)
        if sent.kind == "all_to_all":
            known = self.efficiency.measured_s(sent.kind, sent.size_bytes, group.size)
            if known is not None:
                return known
            each = sent.size_bytes / group.size
            away, within = group.size - group.per_node, group.per_node - 1
            hop = Hop(
                axis="ep",
                messages_away=away,
                messages_within=within,
                bytes_away=away * each,
                bytes_within=within * each,
            )
            return hop.took_s(ways_of(self.cluster))
        return self.efficiency.collective_s(sent.kind, sent.size_bytes, group)

    def priced(self, work: Work, *, backward: bool = False) -> Priced:
        """Seconds of a work; the host is a floor under all of it, and comes on top where it computes itself."""
        busy_s = self.efficiency.busy_s(work, self.cluster.gpu, backward=backward)
        found = Priced(
            compute_s=busy_s,
            tp_s=self._along(work.sent, "tp"),
            cp_s=self._beside(work, backward=backward),
            ep_s=sum(self._along(work.sent, fold) for fold in FOLDS),
        )
        if not found.total_s and not work.operations:
            return found
        floor_s = self.efficiency.floor_s(found.total_s, work.operations / _LAYER_OPERATIONS, in_series=self.is_host)
        return found + Priced(compute_s=floor_s - found.total_s)

    def both(self, passes: Passes) -> tuple[Priced, Priced]:
        """Forward and backward."""
        return self.priced(passes.forward), self.priced(passes.backward, backward=True)

    def hop_s(self, num_bytes: float, sender: int, receiver: int) -> float:
        """Seconds to send from one rank of the pipeline to another, each the first of its stage."""
        per_stage = self.mesh.world_size // self.mesh.pp
        node_of = [rank * per_stage // self.cluster.gpus_per_node for rank in (sender, receiver)]
        stride = 1 if node_of[0] == node_of[1] else self.cluster.gpus_per_node
        return self.efficiency.send_s(num_bytes, self.cluster, stride)

    def _along(self, sent: Iterable[Sent], axis: str) -> float:
        return sum(self.sent_s(each) for each in sent if each.axis == axis)

    def _beside(self, work: Work, *, backward: bool) -> float:
        """What is seen of what `cp` sends: all, but of hops, which travel beside attention, what that does not hide."""
        hops_s = self._along((each for each in work.sent if each.kind == "hop"), "cp")
        sent_s = self._along((each for each in work.sent if each.kind != "hop"), "cp")
        hidden_by = self.efficiency.busy_s(Work(attentions=work.attentions), self.cluster.gpu, backward=backward)
        return sent_s + (max(hops_s - hidden_by, self.efficiency.links.exposed * hops_s) if hops_s else 0.0)
