"""Which ranks a doctor's all-reduce has, and where they meet: a plan made from what nodes told. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meshwright.clusters.evidence import Endpoint, Evidence, Wishes, endpoint_of
from meshwright.clusters.inventory import NodeFacts

__all__ = ["Reduction", "planned_reduction"]

_BYTES = {"gloo": 64 << 20, "nccl": 1 << 30}


@dataclass(frozen=True)
class Reduction:
    """A planned all-reduce.

    Args:
        backend: "gloo" or "nccl".
        num_bytes: what is reduced.
        nodes: that take part; ranks of the first one come first.
        ranks_per_node: as many on each.
        interfaces: of each node.
        meeting: where the first node listens.
    """

    backend: str
    num_bytes: int
    nodes: tuple[str, ...]
    ranks_per_node: int
    interfaces: tuple[str, ...]
    meeting: Endpoint

    @property
    def num_ranks(self) -> int:
        """Ranks of all nodes."""
        return len(self.nodes) * self.ranks_per_node

    def questions(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        """What each node is asked to do."""
        alike = {
            "ask": "allreduce",
            "backend": self.backend,
            "bytes": self.num_bytes,
            "world": self.num_ranks,
            "address": self.meeting.address,
            "port": self.meeting.port,
            "timeout_s": timeout_s,
        }
        each = self.ranks_per_node
        return {
            node: {**alike, "interface": interface, "ranks": list(range(index * each, (index + 1) * each))}
            for index, (node, interface) in enumerate(zip(self.nodes, self.interfaces, strict=True))
        }


def planned_reduction(evidence: Evidence, wishes: Wishes, nodes: Sequence[str]) -> Reduction | None:
    """The all-reduce of some nodes; None where there is only one GPU, or they cannot meet.

    GPUs take part through NCCL where every node has equally many and a torch that can use them. Nodes that are
    pretended on one machine share its GPUs, and NCCL refuses two ranks on one: there it is gloo.
    """
    met = [endpoint_of(node, evidence) for node in nodes]
    endpoints = [each for each in met if each is not None]
    if len(endpoints) < len(nodes):
        return None
    shared = len(nodes) > 1 and all(reach.by == "here" for reach in evidence.reaches)
    gpus = 0 if shared else _gpus_of_each([evidence.facts[node] for node in nodes])
    per_node = gpus or (2 if len(nodes) == 1 else 1)
    if len(nodes) * per_node < 2:
        return None
    backend = "nccl" if gpus else "gloo"
    return Reduction(
        backend=backend,
        num_bytes=wishes.allreduce_bytes or _BYTES[backend],
        nodes=tuple(nodes),
        ranks_per_node=per_node,
        interfaces=tuple(each.interface for each in endpoints),
        meeting=endpoints[0],
    )


def _gpus_of_each(facts: Sequence[NodeFacts]) -> int:
    """GPUs that every node has alike and torch can use; 0 where they differ."""
    counts = {0 if _cpu_only(each) else sum(gpu.error is None for gpu in each.gpus.gpus) for each in facts}
    return counts.pop() if len(counts) == 1 else 0


def _cpu_only(facts: NodeFacts) -> bool:
    return (facts.versions.get("torch") or "+cpu").endswith("+cpu")
