"""Shares of any size reach their rank, also among some ranks of an axis, and waiting for them has a name."""

import pytest
import torch

from meshwright.parallel.collectives import Groups
from meshwright.parallel.context.axis import ContextAxis, Shares, context_axis
from meshwright.parallel.context.kinds import Hybrid
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.progress import told
from meshwright.testing import run_ranks


def test_shares_lie_in_order_of_ranks() -> None:
    shares = Shares.for_some(torch.empty(0), {1: 3, 3: 2}, 4)
    assert shares.sizes == [0, 3, 0, 2]
    shares.of(1).fill_(1.0)
    shares.of(3).fill_(3.0)
    assert shares.memory.tolist() == [1.0, 1.0, 1.0, 3.0, 3.0]


def _received(axis: ContextAxis) -> tuple[list[float], str, tuple[int, ...]]:
    """Rank r sends r + to elements to each rank."""
    from meshwright.parallel.progress import HERE  # this process's own

    sizes = [axis.rank + to for to in range(axis.size)]
    received = Shares.empty(torch.empty(0), sizes)
    sent = Shares(torch.full((sum(sizes),), float(axis.rank)), sizes)
    pending = axis.exchange(received, sent)
    seen = []
    wait = pending.work.wait  # type: ignore[union-attr]

    class Work:
        def wait(self) -> None:
            seen.append(told(HERE.at))
            wait()

    pending.work = Work()
    pending.wait()
    return received.memory.tolist(), seen[0].call, seen[0].waits_for


def _exchanged() -> list[tuple[list[float], str, tuple[int, ...]]]:
    axis = context_axis(Groups(Mesh(cp=4)), Hybrid(2))
    return [_received(each) for each in (axis, *axis.parts(2))]


@pytest.mark.slow
def test_uneven_shares_are_exchanged_among_all_ranks_and_some() -> None:
    for rank, (whole, inner, outer) in enumerate(run_ranks(_exchanged, Mesh(cp=4))):
        for (found, _, _), place, size in ((whole, rank, 4), (inner, rank % 2, 2), (outer, rank // 2, 2)):
            assert found == [float(source) for source in range(size) for _ in range(source + place)]
        others = tuple(each for each in range(4) if each != rank)
        assert whole[1:] == ("all_to_all over cp (number 1)", others)
        assert inner[1:] == ("all_to_all over 2 ranks of cp (number 1)", (rank ^ 1,))
        assert outer[1:] == ("all_to_all over cp ranks 2 apart (number 1)", (rank ^ 2,))
