"""What the ledger counts of dealt attention is what the formulas say, for every kind, exactly."""

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as some

from meshwright.parallel.blockwise.masks import causal, window
from meshwright.parallel.collectives import Groups
from meshwright.parallel.context.attention import attend_dealt
from meshwright.parallel.context.axis import context_axis
from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.kinds import GatherKV, Hybrid, Kind, Ring, Ulysses
from meshwright.parallel.context.routes import route_for
from meshwright.parallel.context.traffic import Shape, Traffic, traffic_of
from meshwright.parallel.ledger import Ledger
from meshwright.parallel.mesh import Mesh
from meshwright.testing import run_ranks

KINDS: tuple[Kind, ...] = (Ring(), Ulysses(), Hybrid(2), GatherKV())


def _table(kind: Kind, shape: Shape, degree: int) -> tuple[Traffic, Traffic]:
    """The table of the module, for equal shares."""
    h, h_kv, rows = shape.heads * shape.width, shape.kv_heads * shape.width, shape.batch * shape.length
    each = degree if kind == Ulysses() else 2 if kind == Hybrid(2) else 1
    group, rings = rows * each // degree, degree // each
    wide = max(shape.kv_heads, each) * shape.width
    exchanged = (2 * h + 2 * wide) * group // each * (each - 1) // each
    own = wide if each > 1 else h_kv
    brought = 2 * rows * own // each * (rings - 1) // rings
    sums = brought if kind == GatherKV() else 2 * rows * own // each if rings > 1 else 0
    return Traffic(exchanged, brought), Traffic(exchanged, brought, sums)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equal_shares_send_what_the_table_says(kind: Kind, heads: tuple[int, int]) -> None:
    shape = Shape(batch=2, length=64, heads=heads[0], kv_heads=heads[1], width=16)
    for rank in range(4):
        ways = [traffic_of(shape, Dealing("zigzag", 4), kind, rank=rank, backward=back) for back in (False, True)]
        assert tuple(ways) == _table(kind, shape, 4)


@given(some.integers(1, 40), some.sampled_from(["contiguous", "zigzag", "striped"]), some.integers(1, 3))
def test_all_that_is_sent_is_received_by_somebody(length: int, dealt: Any, groups: int) -> None:
    shape = Shape(batch=1, length=length, heads=4 * groups, kv_heads=4, width=3, value_width=2)
    dealing = Dealing(dealt, 4)
    sent = sum(traffic_of(shape, dealing, Ulysses(), rank=rank, backward=False).exchanged for rank in range(4))
    own = sum(size * (groups * 3 + 5 + groups * 2) for size in dealing.sizes(length))
    assert sent + own == length * 4 * (groups * 3 + 5 + groups * 2)


def _counted(kind: Kind, dealt: Any, options: dict[str, Any]) -> dict[str, Fraction]:
    mesh = Mesh(cp=dist.get_world_size())
    groups, dealing = Groups(mesh), Dealing(dealt, mesh.cp)
    axis = context_axis(groups, kind)
    length, heads, kv_heads, dtype = (options[name] for name in ("length", "heads", "kv_heads", "dtype"))
    size = dealing.size(length, axis.rank)
    query, key, value = (
        torch.zeros(2, each, size, width, dtype=dtype, requires_grad=True)
        for each, width in ((heads, 4), (kv_heads, 4), (kv_heads, 6))
    )
    mask, found = options.get("mask"), {}
    with Ledger(mesh, groups.rank) as ledger:
        out = attend_dealt(query, key, value, axis=axis, dealing=dealing, length=length, kind=kind, mask=mask)
    found["forward"] = ledger.summary().sent_bytes(axis="cp")
    with Ledger(mesh, groups.rank) as ledger:
        out.sum().backward()
    found["backward"] = ledger.summary().sent_bytes(axis="cp")
    shape = Shape(batch=2, length=length, heads=heads, kv_heads=kv_heads, width=4, value_width=6)
    whole = all(each == Ring() for each in (kind,))
    positions = tuple(dealing.pieces(length, rank) for rank in range(mesh.cp))
    route = route_for(mask, positions) if whole else None
    for name in ("forward", "backward"):
        wanted = traffic_of(shape, dealing, kind, rank=axis.rank, backward=name == "backward", route=route)
        found[name] -= wanted.sent_bytes(dtype.itemsize)
    return found


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "equal shares": ("zigzag", {"length": 16, "heads": 4, "kv_heads": 4, "dtype": torch.float64, "mask": causal()}),
    "grouped heads": ("striped", {"length": 16, "heads": 8, "kv_heads": 2, "dtype": torch.float32}),
    "one key head": ("zigzag", {"length": 16, "heads": 4, "kv_heads": 1, "dtype": torch.float32}),
    "odd length": ("zigzag", {"length": 13, "heads": 4, "kv_heads": 2, "dtype": torch.bfloat16}),
    "few positions": ("contiguous", {"length": 3, "heads": 4, "kv_heads": 4, "dtype": torch.float32}),
    "uneven heads": ("striped", {"length": 11, "heads": 6, "kv_heads": 6, "dtype": torch.float32}),
    "uneven groups": ("contiguous", {"length": 11, "heads": 9, "kv_heads": 3, "dtype": torch.float32}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_ledger_counts_what_the_formulas_say(kind: Kind, name: str) -> None:
    dealt, options = CASES[name]
    for found in run_ranks(_counted, Mesh(cp=4), kind, dealt, options):
        assert found == {"forward": 0, "backward": 0}


@pytest.mark.slow
@pytest.mark.parametrize("mask", [causal(), window(5), window(2, 2)], ids=str)
def test_a_ring_that_ends_early_sends_what_its_route_says(mask: Any) -> None:
    options = {"length": 32, "heads": 2, "kv_heads": 2, "dtype": torch.bfloat16, "mask": mask}
    for found in run_ranks(_counted, Mesh(cp=4), Ring(), "contiguous", options):
        assert found == {"forward": 0, "backward": 0}


def test_formulas_need_no_torch() -> None:
    import subprocess
    import sys

    program = "import sys, meshwright.parallel.context.choose as it; it.choose; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
