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

    def as_torchrun(self, address: str, port: int, run_id: str) -> dict[str, str]:
        """What torchrun would tell a rank.

        Args:
            address: of the ranks' store.
            port: of the ranks' store.
            run_id: of the run.
        """
        num_ranks = sum(self.sizes)
        counts = {"RANK": self.rank, "LOCAL_RANK": self.local_rank, "WORLD_SIZE": num_ranks}
        counts |= {"LOCAL_WORLD_SIZE": self.local_size, "GROUP_RANK": self.node, "GROUP_WORLD_SIZE": len(self.sizes)}
        counts |= {"ROLE_RANK": self.rank, "ROLE_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        counts |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
        words = {"MASTER_ADDR": address, "TORCHELASTIC_RUN_ID": run_id}
        agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # ranks connect to the store, rank 0 starts none
        return {**{name: str(value) for name, value in counts.items()}, **words, **agent}


def seat_of(leader: int, local_rank: int, leaders: list[int]) -> Seat:
    """The seat of a process from what MPI says of shared memory; pure.

    Args:
        leader: lowest rank of the world that shares memory with this process.
        local_rank: among those.
        leaders: of every process of the world.

    >>> seat_of(1, 1, [0, 1, 0, 1])  # dealt in turn to two nodes
    Seat(node=1, local_rank=1, local_size=2, rank=3, sizes=(2, 2))
    """
    nodes = sorted(set(leaders))
    node, sizes = nodes.index(leader), tuple(leaders.count(each) for each in nodes)
    return Seat(node, local_rank, sizes[node], sum(sizes[:node]) + local_rank, sizes)
