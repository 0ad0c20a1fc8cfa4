"""A ring sends what is needed, as far as it is needed, while it computes."""

from typing import Any

import pytest
import torch

from meshwright.parallel.blockwise.masks import causal, documents, window
from meshwright.parallel.context import supply
from meshwright.parallel.context.attention import attend_dealt
from meshwright.parallel.context.axis import ContextAxis
from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.kinds import Ring
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pending import Pending
from meshwright.testing import run_ranks
from tests.parallel.context.dense import axis_here

pytestmark = pytest.mark.slow


def _events(dealt: Any, mask: Any) -> tuple[list[str], list[str]]:
    axis, seen = axis_here(Ring()), []
    forward, backward, start, wait = supply.partial_forward, supply.partial_backward, ContextAxis.exchange, Pending.wait

    def noting(word: str, function: Any) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            if word != "wait" or args[0].work is not None:
                seen.append(word)
            return function(*args, **keywords)

        return call

    supply.partial_forward, supply.partial_backward = noting("compute", forward), noting("compute", backward)
    ContextAxis.exchange, Pending.wait = noting("send", start), noting("wait", wait)  # type: ignore[method-assign]
    try:
        tokens = torch.zeros(1, 1, 4, 2, requires_grad=True)
        out = attend_dealt(
            tokens, tokens, tokens, axis=axis, dealing=Dealing(dealt, axis.size), length=16, kind=Ring(), mask=mask
        )
        there = len(seen)
        out.sum().backward()
    finally:
        supply.partial_forward, supply.partial_backward = forward, backward
        ContextAxis.exchange, Pending.wait = start, wait  # type: ignore[method-assign]
    return seen[:there], seen[there:]


def test_the_next_hop_is_under_way_while_a_rank_computes() -> None:
    for there, back in run_ranks(_events, Mesh(cp=4), "zigzag", causal()):
        assert there == ["send", "compute", "wait"] * 3 + ["compute"]
        first = ["send", "compute", "send", "wait"]  # keys on their way, then gradients
        assert back == first + ["send", "compute", "wait", "send", "wait"] * 2 + ["compute", "wait", "send", "wait"]


def test_a_window_ends_the_ring_early_and_blocks_without_pairs_are_not_computed() -> None:
    for rank, (there, back) in enumerate(run_ranks(_events, Mesh(cp=4), "contiguous", window(4))):
        assert there.count("send") == 1
        assert there.count("compute") == (2 if rank else 1)
        assert back.count("send") == 3  # keys once, their gradients there and home
    alone = documents(torch.arange(16) // 4)
    for there, back in run_ranks(_events, Mesh(cp=4), "contiguous", alone):
        assert [there, back] == [["compute"], ["compute"]]


def test_a_causal_ring_of_chunks_computes_only_what_comes_before() -> None:
    for rank, (there, _) in enumerate(run_ranks(_events, Mesh(cp=4), "contiguous", causal())):
        assert there.count("compute") == rank + 1
