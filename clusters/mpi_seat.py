"""Where a process of MPI sits among the ranks of a job. Pure."""

from dataclasses import dataclass

__all__ = ["Seat", "seat_of"]


@dataclass(frozen=True)
class Seat:
    """Where a process sits.

    Args:
        node: index of its node.
        local_rank: among the ranks of its node.
        local_size: number of them.
        rank: of all, counted node by node.
        sizes: ranks of every node.
    """

    node: int
    local_rank: int
    local_size: int
    rank: int
    sizes: tuple[int, ...]

    def as_torchrun(self, address: str, port: int, *, run_id: str, attempt: int, most: int) -> dict[str, str]:
        """What torchrun would tell a rank.

        Args:
            address: of the ranks' store.
            port: of the ranks' store.
            run_id: of the run.
            attempt: from 0.
            most: restarts that the run may have.
        """
        num_ranks = sum(self.sizes)
        counts = {"RANK": self.rank, "LOCAL_RANK": self.local_rank, "WORLD_SIZE": num_ranks}
        counts |= {"LOCAL_WORLD_SIZE": self.local_size, "GROUP_RANK": self.node, "GROUP_WORLD_SIZE": len(self.sizes)}
        counts |= {"ROLE_RANK": self.rank, "ROLE_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        counts |= {"TORCHELASTIC_RESTART_COUNT": attempt, "TORCHELASTIC_MAX_RESTARTS": most}
        words = {"MASTER_ADDR": address, "TORCHELASTIC_RUN_ID": run_id}
        agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # ranks connect to the store, rank 0 starts none
        return {**{name: str(value) for name, value in counts.items()}, **words, **agent}


def seat_of(leader: int, local_rank: int, leaders: list[int], *, places: list[int | None] | None = None) -> Seat:
    """The seat of a process from what MPI says of shared memory; pure.

    Nodes are in the order of their hosts, where every leader knows which of the planned ones it is on.

    Args:
        leader: lowest rank of the world that shares memory with this process.
        local_rank: among those.
        leaders: of every process of the world.
        places: index of the planned host that each process of the world is on; None where that is not known.

    >>> seat_of(1, 1, [0, 1, 0, 1])  # dealt in turn to two nodes
    Seat(node=1, local_rank=1, local_size=2, rank=3, sizes=(2, 2))
    >>> seat_of(1, 0, [0, 1], places=[1, 0])  # mpiexec began with the second host
    Seat(node=0, local_rank=0, local_size=1, rank=0, sizes=(1, 1))
    """
    nodes = _in_order(sorted(set(leaders)), places or [None] * len(leaders))
    node, sizes = nodes.index(leader), tuple(leaders.count(each) for each in nodes)
    return Seat(node, local_rank, sizes[node], sum(sizes[:node]) + local_rank, sizes)


def _in_order(leaders: list[int], places: list[int | None]) -> list[int]:
    known = {place: leader for leader in leaders if (place := places[leader]) is not None}
    return [known[place] for place in sorted(known)] if len(known) == len(leaders) else leaders
