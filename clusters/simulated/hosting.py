"""What ranks of a job on paper move between their GPUs and the host's memory.

Inputs of recomputed blocks are copied by actions of the schedule, in order with the kernels before and after them, as
the runtime does it: nothing hides them. Shards that rest on the host travel beside what computes: parameters when they
are gathered, gradients once they are reduced. Where ranks compute on CPUs it is all one memory: inputs are copied once,
and come back by name.
"""

from typing import TYPE_CHECKING

from meshwright.parallel.pipeline.actions import Action, Kind

if TYPE_CHECKING:
    from meshwright.clusters.simulated.paper import Paper

__all__ = [
    "MOVES",
    "check_link",
    "inputs_away",
    "inputs_moved_s",
    "moved_bytes",
    "moves_s",
    "shards_away",
    "shards_moved_s",
    "updated_s",
]

MOVES = (Kind.OFFLOAD, Kind.FETCH)
"""Actions that move inputs."""


def check_link(paper: "Paper") -> None:
    """Refuses jobs that move something to the host over a link that nobody knows.

    Raises:
        WrapError: then.
    """
    if paper.shards_on_host or paper.schedule.has(Kind.OFFLOAD):
        paper.machine.efficiency.host_s(0.0, paper.machine.cluster.gpu)


def shards_away(paper: "Paper") -> bool:
    """Whether shards rest in a memory that is not the rank's."""
    return paper.shards_on_host and not paper.machine.is_host


def moved_bytes(paper: "Paper", action: Action) -> tuple[float, float]:
    """What an action makes of a rank's memory: bytes that it has more afterwards, and while it copies."""
    sizes = _inputs(paper, action.stage)
    if paper.machine.is_host:  # a copy takes the place of each
        return 0.0, max(sizes, default=0.0) if action.kind is Kind.OFFLOAD else 0.0
    return (-sum(sizes), 0.0) if action.kind is Kind.OFFLOAD else (sum(sizes), 0.0)


def inputs_away(paper: "Paper", rank: int) -> float:
    """The most bytes of inputs that are in the host's memory at once, of one rank."""
    away = most = 0.0
    for action in paper.schedule.ranks[rank]:
        if action.kind in MOVES:
            away -= moved_bytes(paper, action)[0]
            most = max(most, away)
    return most


def moves_s(paper: "Paper", stage: int) -> dict[Kind, float]:
    """Seconds of the two actions for one micro-batch of a stage."""
    if not any(map(paper.schedule.has, MOVES)):
        return {}
    machine = paper.machine
    one_s = machine.efficiency.host_s(sum(_inputs(paper, stage)), machine.cluster.gpu)
    return {Kind.OFFLOAD: one_s, Kind.FETCH: 0.0 if machine.is_host else one_s}


def inputs_moved_s(paper: "Paper", rank: int) -> float:
    """Seconds of all of them in a step of a rank."""
    return sum(paper.costs.of(action) for action in paper.schedule.ranks[rank] if action.kind in MOVES)


def shards_moved_s(paper: "Paper", hidden_by_s: float) -> float:
    """Seconds that are seen of shards on their way, one direction beside the other."""
    machine = paper.machine
    if not shards_away(paper):
        return 0.0
    sent = [each for each in paper.sent if each.axis == "fsdp"]
    ways = ("all_gather", "reduce_scatter")
    most = max(sum(each.size_bytes for each in sent if each.kind == kind) for kind in ways) / machine.mesh.fsdp
    moved_s = machine.efficiency.host_s(most, machine.cluster.gpu)
    return max(moved_s - hidden_by_s, machine.efficiency.links.exposed * moved_s)


def updated_s(paper: "Paper") -> float:
    """Seconds of the optimizer; on the host at the rate of the link, which its memory serves for all its GPUs."""
    efficiency, gpu = paper.machine.efficiency, paper.machine.cluster.gpu
    return (efficiency.host_s if shards_away(paper) else efficiency.memory_s)(paper.optimizer_bytes, gpu)


def _inputs(paper: "Paper", stage: int) -> list[float]:
    """Of each recomputed block of a stage, for one micro-batch."""
    return [each.input_bytes for name, each in paper.blocks(stage).items() if name in paper.recomputed]
