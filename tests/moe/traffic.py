"""What transports should send, from nothing but choices: written apart from the code."""

import torch
from torch import Tensor

from tests.moe.real import EACH, TRAFFIC, leaves, routed

__all__ = ["GRID", "RANKS", "K", "choices", "rows_between", "visits_between"]

GRID = (2, 2)
RANKS = GRID[0] * GRID[1]
K = 6


def choices() -> Tensor:
    """int64 [ranks, experts]: rows of each rank for each expert."""
    found = torch.zeros(RANKS, RANKS * EACH, dtype=torch.int64)
    for rank in range(RANKS):
        experts = routed(TRAFFIC, GRID, leaves(TRAFFIC, GRID, rank)[1]).experts
        assert experts.shape[1] == K
        for expert in experts.flatten().tolist():
            found[rank, expert] += 1
    return found


def rows_between() -> Tensor:
    """int64 [a, b, A, B]: rows from node a, local rank b to node A, local rank B."""
    return choices().view(*GRID, *GRID, EACH).sum(-1)


def visits_between() -> Tensor:
    """int64 [a, b, A]: (token, node) pairs."""
    found = torch.zeros(*GRID, GRID[0], dtype=torch.int64)
    for rank in range(RANKS):
        experts = routed(TRAFFIC, GRID, leaves(TRAFFIC, GRID, rank)[1]).experts
        for token in experts.tolist():
            for node in {expert // (EACH * GRID[1]) for expert in token}:
                found[rank // GRID[1], rank % GRID[1], node] += 1
    return found
