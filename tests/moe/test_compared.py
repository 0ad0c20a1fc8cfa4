"""What benchmarks compare is the same computation: our layer, DeepSpeed's and transformers'."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.moe_compared import distinct_nodes
from benchmarks.moe_layers import Network, OurLayer, Sizes, deepspeed_layer, step_of, tokens_of
from meshwright.moe.axes import ExpertAxes, RowAxis
from meshwright.moe.top_k import TopK
from meshwright.parallel.mesh import Mesh
from meshwright.testing import run_ranks

SIZES = Sizes(tokens=64, width=32, inner=16, experts=8, k=2)


def both() -> list[list[Tensor]]:
    """Outputs and gradients of expert 3 of each."""
    alone = ExpertAxes(*[RowAxis(None, 0, 1)] * 3)
    ours = OurLayer(SIZES, alone, router=TopK(num_experts=8, k=2, renormalise=True), kind="one_hop")
    theirs = deepspeed_layer(SIZES, ranks=1, rank=0, drop_tokens=False)
    made = [step_of(layer, tokens_of(SIZES, 0))() for layer in (ours, theirs)]
    experts = [each for each in theirs.modules() if isinstance(each, Network)]
    assert isinstance(ours.up, nn.Parameter)
    assert len(experts) == SIZES.experts
    assert ours.up.grad is not None
    assert experts[3].up.grad is not None
    return [[made[0], ours.up.grad[3]], [made[1], experts[3].up.grad]]


@pytest.mark.slow
def test_deepspeed_computes_what_ours_does() -> None:
    ((ours, theirs),) = run_ranks(both, Mesh())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_rows_of_tokens_that_travel_once_are_as_many_as_derived() -> None:
    for each in distinct_nodes(experts=64, k=6, tokens=4000):
        assert abs(each["counted"] - each["derived"]) < 4 * each["standard_error"]
        assert each["limited_to_half"] <= min(each["counted"], each["nodes"] / 2)
