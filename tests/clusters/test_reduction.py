"""Which ranks a doctor's all-reduce has."""

from dataclasses import replace

from meshwright.clusters.evidence import Reach, Wishes
from meshwright.clusters.reduction import planned_reduction
from tests.clusters.evidence import VERSIONS, evidence, facts, spoiled


def test_gpus_reduce_by_nccl_with_as_many_ranks_as_every_node_has() -> None:
    plan = planned_reduction(evidence("ab", gpus=8), Wishes(), ("a", "b"))
    assert plan is not None
    assert (plan.backend, plan.num_ranks, plan.num_bytes) == ("nccl", 16, 1 << 30)
    asked = plan.questions(60.0)
    assert asked["b"]["ranks"] == list(range(8, 16))
    assert {each["address"] for each in asked.values()} == {"10.0.0.97"}


def test_where_a_node_has_other_gpus_or_a_torch_without_cuda_it_is_gloo_with_a_rank_a_node() -> None:
    mixed = evidence("ab", facts={"a": facts("a", 8), "b": facts("b", 4)})
    cpu = evidence("ab", facts={node: facts(node, 8, versions={**VERSIONS, "torch": "2.13.0+cpu"}) for node in "ab"})
    for found in (mixed, cpu, spoiled("a", "ab")):
        plan = planned_reduction(found, Wishes(allreduce_bytes=4096), ("a", "b"))
        assert plan is not None
        assert (plan.backend, plan.num_ranks, plan.num_bytes) == ("gloo", 2, 4096)


def test_pretended_nodes_share_their_gpus_so_they_use_gloo() -> None:
    here = replace(evidence("ab", gpus=8), reaches=(Reach("a", ()), Reach("b", ())))
    plan = planned_reduction(here, Wishes(), ("a", "b"))
    assert plan is not None
    assert plan.backend == "gloo"


def test_one_node_reduces_within_and_one_gpu_has_nothing_to_reduce() -> None:
    lone = planned_reduction(evidence("a"), Wishes(), ("a",))
    assert lone is not None
    assert lone.num_ranks == 2
    assert planned_reduction(evidence("a", gpus=1), Wishes(), ("a",)) is None
    assert planned_reduction(replace(evidence("ab"), dials=()), Wishes(), ("a", "b")) is None
