"""What ranks do in tests of transports, and what one process makes of all of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.bilevel import BiLevel
from meshwright.moe.capacity import Capacity
from meshwright.moe.expert_choice import ExpertChoice
from meshwright.moe.experts import FeedForward
from meshwright.moe.hashing import HashRouter
from meshwright.moe.routing import Routing
from meshwright.moe.top_k import TopK
from meshwright.moe.transport import Transport
from meshwright.moe.transports import TransportKind
from meshwright.parallel.ledger import LedgerSummary
from meshwright.parallel.mesh import Mesh
from tests.moe.simulated import dense

__all__ = [
    "CASES",
    "EACH",
    "TRAFFIC",
    "WIDTH",
    "Case",
    "Found",
    "carried",
    "carried_by_all",
    "carried_once",
    "counted",
    "drawn",
    "expected",
    "leaves",
    "mesh_of",
    "routed",
    "weights_of",
]

WIDTH = 5
EACH = 2  # experts of a rank

Found = tuple[Tensor, ...]
"""Of a rank: output, and gradients of tokens, logits and each of its experts."""


@dataclass(frozen=True)
class Case:
    """Tokens of each rank, repeated for grids of more ranks, and how they are routed."""

    router: str
    shares: tuple[int, ...]

    def share(self, rank: int) -> int:
        return self.shares[rank % len(self.shares)]


CASES = [
    Case("drops", (7, 0, 3, 12)),  # with padding, and a rank without tokens
    Case("two levels", (4, 9, 1, 5)),
    Case("one expert", (6, 0, 2, 3)),
    Case("many", (8, 5, 0, 11)),
    Case("many", (0,)),  # nobody has anything
    Case("first rank only", (0, 0, 5, 0)),
    Case("expert choice", (9, 2, 0, 5)),  # whose k differs from rank to rank
    Case("hash", (3, 7, 0, 1)),  # without gradients of weights
]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(case: Case, grid: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a rank."""
    number = case.share(rank)
    width = grid[0] + EACH * grid[1] if case.router == "two levels" else EACH * grid[0] * grid[1]
    logits = drawn(number, width, seed=900 + rank)
    if case.router == "one expert":
        logits[:, -2] += 100.0
    if case.router == "first rank only":
        logits[:, :EACH] += 100.0
    return drawn(number, WIDTH, seed=500 + rank).requires_grad_(), logits.requires_grad_()


def routed(case: Case, grid: tuple[int, int], logits: Tensor) -> Routing:
    nodes, local = grid
    num_experts = nodes * local * EACH
    if case.router == "two levels":
        router = BiLevel(num_nodes=nodes, num_local=EACH * local, k_nodes=min(2, nodes), k_local=2)
        return router.route(logits[:, :nodes], logits[:, nodes:])
    if case.router == "drops":
        real = drawn(len(logits), seed=len(logits)) < 0.9
        return TopK(num_experts=num_experts, k=2, capacity=Capacity(factor=0.9)).route(logits, real=real)
    if case.router == "expert choice":
        return ExpertChoice(num_experts=num_experts, factor=1.5).route(logits)
    if case.router == "hash":
        return HashRouter.random(vocabulary=30, num_experts=num_experts, k=2).route(torch.arange(len(logits)))
    k = {"one expert": 1, "many": min(6, num_experts), "first rank only": 2}[case.router]
    return TopK(num_experts=num_experts, k=k).route(logits)


def weights_of(expert: int) -> Tensor:
    return drawn(WIDTH, WIDTH, seed=expert).requires_grad_()


def by_matrix(rows: Tensor, weight: Tensor) -> Tensor:
    return (rows @ weight).tanh()


def carried(grid: tuple[int, int], kinds: tuple[TransportKind, ...]) -> list[dict[str, Found]]:
    """On a rank: what each transport gives in each case."""
    from meshwright.moe.axes import expert_axes
    from meshwright.parallel.collectives import Groups

    groups = Groups(mesh_of(grid))
    axes = expert_axes(groups)
    return [carried_by_all(case, grid, groups.rank, axes, kinds) for case in CASES]


def carried_by_all(
    case: Case, grid: tuple[int, int], rank: int, axes: ExpertAxes, kinds: tuple[TransportKind, ...]
) -> dict[str, Found]:
    """Name of a transport -> what it gives, whole and in halves."""
    from meshwright.moe.transports import transport

    whole = {kind: carried_once(case, grid, rank, transport(kind, axes)) for kind in kinds}
    halves = {f"{kind}, halves": carried_once(case, grid, rank, transport(kind, axes), halves=True) for kind in kinds}
    return {**whole, **halves}


def mesh_of(grid: tuple[int, int]) -> Mesh:
    ranks = grid[0] * grid[1]
    return Mesh(dp=ranks, ep=ranks, ep_node=grid[0])


def carried_once(case: Case, grid: tuple[int, int], rank: int, way: Transport, *, halves: bool = False) -> Found:
    tokens, logits = leaves(case, grid, rank)
    own = [weights_of(expert) for expert in range(EACH * rank, EACH * (rank + 1))]

    def experts(rows: Tensor, counts: Tensor) -> Tensor:
        parts = rows.split(counts.tolist())
        return torch.cat([by_matrix(part, weight) for part, weight in zip(parts, own, strict=True)])

    made = (way.carry_halves if halves else way.carry)(tokens, routed(case, grid, logits), experts)
    asked = [tokens, logits, *own]
    found = torch.autograd.grad((made * (made + rank)).sum(), asked, allow_unused=case.router == "hash")
    full = [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(asked, found, strict=True)]
    return (made.detach(), *full)


TRAFFIC = Case("many", (8, 5, 0, 11))


def counted(grid: tuple[int, int], kind: TransportKind) -> tuple[LedgerSummary, LedgerSummary]:
    """On a rank: what a transport sends for `TRAFFIC`, there and on the way back of gradients."""
    from meshwright.moe.axes import expert_axes
    from meshwright.moe.transports import transport
    from meshwright.parallel.collectives import Groups
    from meshwright.parallel.ledger import Ledger

    mesh, experts = (
        mesh_of(grid),
        FeedForward(up=drawn(EACH, WIDTH, 3, seed=0), down=drawn(EACH, 3, WIDTH, seed=1), act=torch.tanh),
    )
    groups = Groups(mesh)
    way = transport(kind, expert_axes(groups))
    tokens, logits = leaves(TRAFFIC, grid, groups.rank)
    routing = routed(TRAFFIC, grid, logits)
    with Ledger(mesh, groups.rank) as there:
        made = way.carry(tokens, routing, experts)
    with Ledger(mesh, groups.rank) as back:
        made.sum().backward()
    return there.summary(), back.summary()


def expected(case: Case, grid: tuple[int, int]) -> list[Found]:
    """What one process makes of the tokens of all ranks."""
    ranks = range(grid[0] * grid[1])
    own = [weights_of(expert) for expert in range(EACH * len(ranks))]
    inputs = [leaves(case, grid, rank) for rank in ranks]
    made = [dense(t, routed(case, grid, x), lambda rows, expert: by_matrix(rows, own[expert])) for t, x in inputs]
    total = torch.stack([(each * (each + rank)).sum() for rank, each in enumerate(made)]).sum()
    flat = [leaf for pair in inputs for leaf in pair]
    asked = [*flat, *own]
    found = torch.autograd.grad(total, asked, allow_unused=True)
    full = [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(asked, found, strict=True)]
    of_experts = full[len(flat) :]
    return [
        (each.detach(), *full[2 * rank : 2 * rank + 2], *of_experts[EACH * rank : EACH * (rank + 1)])
        for rank, each in enumerate(made)
    ]
