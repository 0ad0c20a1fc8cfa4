from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from meshwright.parallel.collectives import Groups
from meshwright.parallel.ledger import Call, Ledger, LedgerSummary
from meshwright.parallel.mesh import Mesh
from meshwright.testing import run_ranks


def _every_kind() -> LedgerSummary:
    rank = dist.get_rank()
    eight = torch.zeros(8, dtype=torch.float32)
    with Ledger(Mesh(dp=2), rank) as ledger:
        dist.all_reduce(eight)
        dist.all_gather_into_tensor(torch.zeros(16), eight)
        dist.all_gather([torch.zeros(8), torch.zeros(8)], eight)
        dist.reduce_scatter_tensor(torch.zeros(4), eight)
        dist.all_to_all_single(torch.zeros(8), eight)
        dist.broadcast(eight, 0)
        if rank == 0:
            dist.send(eight, 1)
        else:
            dist.recv(eight, 0)
        functional.wait_tensor(functional.all_reduce(eight, "sum", dist.group.WORLD))
        functional.wait_tensor(functional.all_gather_tensor(eight, 0, dist.group.WORLD))
        dist.barrier()
        torch.ones(3) + 1  # ordinary operators are none of the ledger's business
    return ledger.summary()


@pytest.mark.slow
def test_every_collective_is_counted_with_its_bytes() -> None:
    sender, receiver = run_ranks(_every_kind, Mesh(dp=2))
    counts = {call.kind: (count, call.payload_bytes) for call, count in sender.calls}
    assert counts == {
        "all_reduce": (2, 32),
        "all_gather": (3, 64),
        "reduce_scatter": (1, 32),
        "all_to_all": (1, 32),
        "broadcast": (1, 32),
        "send": (1, 32),
        "barrier": (1, 0),
    }
    assert receiver.count("recv") == 1
    assert receiver.sent_bytes("recv") == 0
    assert {call.axis for call, _ in sender.calls} == {"dp"}


def _axes() -> list[str]:
    mesh = Mesh(dp=2, fsdp=2)
    groups = Groups(mesh)
    with Ledger(mesh, groups.rank) as ledger:
        for axes in (("dp",), ("fsdp",), ("dp", "fsdp"), ("tp",)):
            groups.all_reduce(torch.zeros(1), *axes).wait()
    return sorted(call.axis for call, _ in ledger.summary().calls)


@pytest.mark.slow
def test_calls_are_put_down_to_the_axes_of_the_mesh() -> None:
    assert run_ranks(_axes, Mesh(dp=2, fsdp=2)) == [["dp", "dp+fsdp", "fsdp"]] * 4


def test_bytes_sent_follow_the_ring_formulas() -> None:
    calls = [Call("dp", kind, 4, 1000) for kind in ("all_reduce", "all_gather", "reduce_scatter", "send", "barrier")]
    assert [call.sent_bytes for call in calls] == [1500, 750, 750, 1000, 0]
    assert Call("dp", "all_gather", 3, 100).sent_bytes == Fraction(200, 3)


def test_summaries_compare_by_value_and_print() -> None:
    calls = [Call("dp", "all_reduce", 2, 8), Call("fsdp", "all_gather", 2, 8)]
    assert LedgerSummary.of(calls) == LedgerSummary.of(reversed(calls))
    assert "all_gather" in str(LedgerSummary.of(calls))
    assert str(LedgerSummary.of([])) == "no collectives"
    assert LedgerSummary.of(calls).as_dict()[0]["calls"] == 1


def _uneven() -> LedgerSummary:
    mesh, rank = Mesh(cp=3), dist.get_rank()
    pair = dist.new_group([0, 1])
    with Ledger(mesh, rank) as ledger:
        sizes = [[2, 1, 0], [1, 4, 3], [0, 3, 5]][rank]
        dist.all_to_all_single(torch.zeros(sum(sizes)), torch.zeros(sum(sizes)), sizes, sizes)
        functional.wait_tensor(functional.all_to_all_single(torch.zeros(sum(sizes)), sizes, sizes, dist.group.WORLD))
        if rank < 2:
            dist.all_reduce(torch.zeros(2), group=pair)
    return ledger.summary()


@pytest.mark.slow
def test_an_uneven_all_to_all_sends_all_but_what_is_kept_and_some_ranks_of_an_axis_bear_its_name() -> None:
    found = run_ranks(_uneven, Mesh(cp=3))
    assert [each.sent_bytes("all_to_all", "cp") for each in found] == [2 * 4 * kept for kept in (1, 4, 3)]
    assert [each.count("all_reduce", "cp") for each in found] == [1, 1, 0]
