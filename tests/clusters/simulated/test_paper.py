"""A job on paper: its schedule walked with seconds is the closed form; memory is what is in flight."""

from dataclasses import replace
from typing import Any

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, fitted
from meshwright.clusters.simulated.forecast import Forecast
from meshwright.clusters.simulated.holding import States, fullest, held_by
from meshwright.clusters.simulated.machine import Machine
from meshwright.clusters.simulated.paper import Paper, StageBytes
from meshwright.parallel.folding import ranks_along
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.pipeline.choose import Asked, chosen
from meshwright.parallel.pipeline.closed_form import Pipe, makespan
from meshwright.parallel.work import Attention, Passes, Product, Sent, Traced, Work

FORWARD = Work(products=(Product(8192, 4096, 4096),), operations=40, saved_bytes=1e9, working_bytes=1e8)
BACKWARD = Work(products=2 * (Product(8192, 4096, 4096),), operations=80, working_bytes=2e8)
BLOCK = Passes(forward=FORWARD, backward=BACKWARD, input_bytes=1e8)
NOTHING = Passes(forward=Work(), backward=Work())


def _machine(mesh: Mesh, *, per_node: int = 8, transfer: float | None = None) -> Machine:
    reached = fitted()
    links = reached.links if transfer is None else replace(reached.links, transfer=transfer)
    cluster = Cluster(gpu=gpu("H100"), num_gpus=mesh.world_size, gpus_per_node=per_node)
    return Machine(mesh=mesh, cluster=cluster, efficiency=replace(reached, links=links))


def _paper(mesh: Mesh, schedule: str, num_blocks: int, count: int, **more: Any) -> Paper:
    how = {"recompute": True} if more.get("recomputed") else {}
    asked = Asked(num_loops=more.pop("num_loops", None))
    placement, order = chosen(schedule, num_blocks, mesh.pp, count, asked=asked, **how)  # type: ignore[arg-type]
    blocks = {str(number): BLOCK for number in range(num_blocks)}
    machine = more.pop("machine", None) or _machine(mesh)
    return Paper(
        machine=machine,
        schedule=order,
        traced=more.pop("traced", None) or Traced(blocks=blocks, before=NOTHING, after=NOTHING),
        stage_of={str(number): placement.stage_of(number) for number in range(num_blocks)},
        **more,
    )


@pytest.mark.parametrize(("schedule", "loops"), [("1f1b", None), ("gpipe", None), ("interleaved", 2), ("modular", 4)])
@pytest.mark.parametrize("count", [4, 8])
def test_equal_blocks_take_the_closed_form(schedule: str, loops: int | None, count: int) -> None:
    mesh = Mesh(pp=4, tp=8)
    paper = _paper(mesh, schedule, 16, count, num_loops=loops, machine=_machine(mesh, transfer=1.0), border_bytes=1e7)
    ahead, back = (paper.costs.exact[0, kind] for kind in (Kind.FORWARD, Kind.BACKWARD))
    expected = makespan(Pipe(4, count, loops or 1), ahead, back)
    assert paper.timeline.makespan == pytest.approx(expected)
    found = paper.step
    assert found.total_s - found.straggling_s == pytest.approx(expected)
    assert found.pp_bubble_s == pytest.approx(
        float(Pipe(4, count, loops or 1).bubble) * count * (loops or 1) * (ahead + back)
    )


def test_what_a_transfer_does_not_show_is_latency() -> None:
    mesh = Mesh(pp=4, tp=8)
    paper = _paper(mesh, "modular", 16, 8, num_loops=4, border_bytes=1e8)
    ahead, back = (paper.costs.exact[0, kind] for kind in (Kind.FORWARD, Kind.BACKWARD))
    hop_s = paper.machine.hop_s(1e8, 0, 1) * (1 - paper.machine.efficiency.links.transfer)
    assert paper.timeline.makespan == pytest.approx(makespan(Pipe(4, 8, 4), ahead, back, latency=hop_s))


def test_stages_of_one_node_are_nearer_than_those_of_two() -> None:
    machine = _machine(Mesh(pp=4, tp=4))
    assert machine.hop_s(1e8, 0, 1) < machine.hop_s(1e8, 1, 2)


@pytest.mark.parametrize(
    "mesh",
    [Mesh(dp=4, tp=4), Mesh(pp=2, dp=2, fsdp=2, tp=2), Mesh(dp=2, cp=8), Mesh(dp=16, ep=8), Mesh(tp=8, dp=2, ep=16)],
)
@pytest.mark.parametrize("per_node", [2, 4, 8])
def test_one_rank_stands_for_all(mesh: Mesh, per_node: int) -> None:
    machine = _machine(mesh, per_node=per_node)
    for axis in ("pp", "dp", "fsdp", "cp", "tp", "ep", "edp"):
        group = machine.group(axis)
        for rank in range(mesh.world_size):
            nodes = [each // per_node for each in ranks_along(mesh, rank, axis)]
            assert (len(nodes), len(set(nodes)), max(map(nodes.count, nodes))) == (
                group.size,
                group.nodes,
                group.per_node,
            )


def test_an_axis_within_a_node_sends_faster_than_one_across() -> None:
    machine = _machine(Mesh(dp=8, tp=8))
    within, across = (machine.sent_s(Sent(axis, "all_reduce", 1e9)) for axis in ("tp", "dp"))
    assert 3 * within < across
    assert machine.sent_s(Sent("cp", "all_reduce", 1e9)) == 0.0
    assert machine.sent_s(Sent("tp", "all_gather", 1e9)) == pytest.approx(within / 2)


def test_attention_hides_keys_on_their_way() -> None:
    machine = _machine(Mesh(cp=8))
    sent = (Sent("cp", "hop", 1e8),)
    bare, hidden = (machine.priced(Work(attentions=each, sent=sent)).cp_s for each in ((), (Attention(1e14, 1e10),)))
    assert hidden == pytest.approx(machine.efficiency.links.exposed * bare)


@pytest.mark.parametrize("kind", ["all_gather", "all_to_all", "reduce_scatter"])
def test_what_attention_waits_for_shows_whole(kind: str) -> None:
    machine, sent = _machine(Mesh(cp=8)), Sent("cp", kind, 1e8)
    found = machine.priced(Work(attentions=(Attention(1e14, 1e10),), sent=(sent,)))
    assert found.cp_s == pytest.approx(machine.sent_s(sent))


def test_groups_of_consecutive_ranks_stay_on_a_node() -> None:
    machine = _machine(Mesh(cp=16))
    within, across = (machine.sent_s(Sent("cp", "all_to_all", 1e8, consecutive=n)) for n in (8, 0))
    assert 2 * within < across


def _measured(mesh: Mesh, **numbers: Any) -> Machine:
    machine = _machine(mesh)
    reached = machine.efficiency
    return replace(machine, efficiency=replace(reached, links=replace(reached.links, **numbers)))


def test_kinds_that_were_measured_are_priced_as_they_were() -> None:
    known = {"reduce_scatter": {2: (1.0, 1e9), 4: (2.0, 1e9)}, "all_to_all": {4: (3.0, 1e9)}, "send": {2: (5.0, 1e9)}}
    mesh = Mesh(tp=4, cp=2)
    machine = _measured(mesh, measured=known)
    assert machine.sent_s(Sent("tp", "reduce_scatter", 1e9)) == 3.0
    assert machine.sent_s(Sent("cp", "reduce_scatter", 1e9)) == 2.0
    assert machine.sent_s(Sent("cp", "all_to_all", 1e9)) == 4.0
    assert machine.sent_s(Sent("cp", "hop", 5e8)) == 4.0
    gather = Sent("tp", "all_gather", 1e9)
    assert machine.sent_s(gather) == _machine(mesh).sent_s(gather)
    assert _measured(Mesh(pp=2), measured=known).hop_s(1e9, 0, 1) == 6.0


def test_sums_that_end_a_step_show_once_along_their_axis() -> None:
    mesh = Mesh(tp=2, cp=4)
    sums = tuple(Sent(axis, "all_reduce", 1e9) for axis in ("tp", "cp"))
    plain, summed = (_paper(mesh, "accumulate", 2, 4, closing=each).step for each in ((), sums))
    machine = _machine(mesh)
    assert summed.tp_s - plain.tp_s == pytest.approx(machine.sent_s(sums[0]))
    assert summed.cp_s - plain.cp_s == pytest.approx(machine.sent_s(sums[1]))


def test_ranks_wait_for_the_slowest_as_often_as_they_meet() -> None:
    work = Work(products=FORWARD.products, sent=(Sent("tp", "all_reduce", 1.0),))
    block = Passes(forward=work, backward=work)
    traced = Traced(blocks={"0": block, "1": block}, before=NOTHING, after=NOTHING)
    steady, waiting = (
        _paper(Mesh(tp=4), "accumulate", 2, 3, traced=traced, machine=_measured(Mesh(tp=4), unsteady=each)).step
        for each in (0.0, 0.5)
    )
    assert waiting.straggling_s == pytest.approx(0.5 * (steady.total_s * 3 * 4) ** 0.5)
    assert replace(waiting, straggling_s=0.0) == steady


def test_units_of_fully_shard_keep_a_rank_from_computing_with_each_gather_and_each_reduction() -> None:
    sent = (*(Sent("fsdp", "all_gather", 1.0),) * 5, Sent("fsdp", "reduce_scatter", 1.0), Sent("dp", "all_reduce", 1.0))

    def dp_s(mesh: Mesh, unit_s: float) -> float:
        return _paper(mesh, "accumulate", 2, 3, sent=sent, machine=_measured(mesh, unit_s=unit_s)).step.dp_s

    assert dp_s(Mesh(dp=2, fsdp=4), 0.5) - dp_s(Mesh(dp=2, fsdp=4), 0.0) == pytest.approx(6 * 0.5)
    assert dp_s(Mesh(dp=8), 0.5) == dp_s(Mesh(dp=8), 0.0), "buckets of gradients have no units"


def test_backward_of_attention_takes_as_long_as_it_was_measured() -> None:
    machine, work = _machine(Mesh(dp=2)), Work(attentions=(Attention(1e14, 1e10),))
    reached = machine.efficiency
    longer = replace(machine, efficiency=replace(reached, compute=replace(reached.compute, attention_backward=1.5)))
    ahead, back = (longer.priced(work, backward=each).compute_s for each in (False, True))
    assert (ahead, back) == pytest.approx((machine.priced(work).compute_s, 1.5 * ahead))


def test_gradients_are_hidden_behind_computing_but_for_a_share() -> None:
    mesh = Mesh(dp=8)
    sent = (Sent("dp", "all_reduce", 1e9),)
    models = [Traced(blocks=dict.fromkeys(map(str, range(n)), BLOCK), before=NOTHING, after=NOTHING) for n in (1, 100)]
    few, many = (_paper(mesh, "accumulate", 1, 1, traced=each, sent=sent).step for each in models)
    whole_s = _machine(mesh).sent_s(Sent("dp", "all_reduce", 1e9))
    copied_s = _machine(mesh).efficiency.memory_s(2e9, gpu("H100"))  # gradients read, and written where they are sent
    assert many.dp_s == pytest.approx(_machine(mesh).efficiency.links.exposed * whole_s + copied_s)
    assert many.dp_s < few.dp_s < whole_s + copied_s


def test_reductions_of_a_schedule_show_where_nothing_hides_them() -> None:
    mesh = Mesh(pp=2, dp=8, tp=4)
    stages = {0: StageBytes(reduced=1e9), 1: StageBytes(reduced=1e9)}
    quiet, loud = (_paper(mesh, "1f1b", 8, 8, stages=each).step for each in ({}, stages))
    assert quiet.dp_s == 0.0 < loud.dp_s
    assert loud.compute_s == quiet.compute_s


def test_recomputing_takes_a_forward_and_keeps_inputs() -> None:
    plain = _paper(Mesh(pp=2, tp=8), "1f1b", 8, 8)
    again = _paper(Mesh(pp=2, tp=8), "1f1b", 8, 8, recomputed=frozenset(map(str, range(8))))
    assert plain.step.recompute_s == 0.0
    assert again.step.recompute_s == pytest.approx(8 * 4 * again.machine.priced(FORWARD).total_s)
    for each in (plain, again):
        assert each.step.total_s - each.step.straggling_s == pytest.approx(each.timeline.makespan)
    states = States(parameters=1.0, gradients=1.0, optimizer=2.0)
    kept, remade = (held_by(each, 0, states) for each in (plain, again))
    assert kept.activations == 2 * 4 * 1e9  # two micro-batches in flight on the first of two ranks
    assert remade.activations + remade.working == pytest.approx(2 * 4 * 1e8 + 4 * 1e9 + FORWARD.working_bytes)
    assert kept.total_bytes == pytest.approx(sum(vars(kept).values()))


def test_the_fullest_rank_is_the_first_of_a_depth_first_pipeline() -> None:
    paper = _paper(Mesh(pp=4, tp=8), "1f1b", 8, 8)
    states = [States(parameters=1.0, gradients=1.0, optimizer=2.0)] * 4
    assert fullest(paper, states)[0] == 0
    assert [held_by(paper, rank, states[0]).activations for rank in range(4)] == [8e9, 6e9, 4e9, 2e9]
    heavy = [*states[:3], replace(states[3], optimizer=1e11)]
    assert fullest(paper, heavy)[0] == 3


def test_a_forecast_says_by_how_much_it_does_not_fit() -> None:
    paper = _paper(Mesh(pp=2, tp=8), "gpipe", 8, 32)
    found = Forecast(paper=paper, states=[States(parameters=0, gradients=0, optimizer=0)] * 2, tokens=1e6, flops=1e15)
    assert not found.fits
    assert found.missing_bytes == pytest.approx(found.memory.total_bytes - 80e9)
    assert found.mfu == pytest.approx(1e15 / found.step.total_s / (16 * 989e12))
    assert found.as_dict()["seconds"]["pp_bubble_s"] == found.step.pp_bubble_s


def test_a_mesh_that_does_not_cover_the_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the mesh \(dp=4\) has 4 ranks; the cluster has 8 GPUs"):
        Machine(mesh=Mesh(dp=4), cluster=Cluster(gpu=gpu("H100"), num_gpus=8), efficiency=fitted())
