"""Bi-level routers in models: the outer sum nearest to what was there, and the standard three outputs."""

import re

import pytest
import torch
from torch import Tensor

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.bilevel import BiLevel
from meshwright.moe.errors import SwapError
from meshwright.moe.stacked import Mixture, StackedExperts
from meshwright.moe.swap import deal_experts
from meshwright.moe.top_k import TopK
from meshwright.moe.two_gates import TwoGates, replace_routers
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.promote import Promote
from tests.moe.models import batch, build, run
from tests.moe.threads import on_threads


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_begins_at_the_nearest_outer_sum() -> None:
    weight = drawn(6, 5, seed=0)
    gates = TwoGates(weight, BiLevel(num_nodes=2, num_local=3))
    near = (gates.inter[:, None] + gates.intra[None]).flatten(0, 1).detach()
    sums = torch.cat([torch.eye(2).repeat_interleave(3, 0), torch.eye(3).repeat(2, 1)], 1).double()
    best = sums @ torch.linalg.lstsq(sums, weight, driver="gelsd").solution
    torch.testing.assert_close(near, best, rtol=1e-10, atol=1e-12)


def test_a_router_of_sums_keeps_its_choices_and_weights() -> None:
    weight = (drawn(2, 1, 5, seed=0) + drawn(1, 3, 5, seed=1)).flatten(0, 1)
    tokens = drawn(20, 5, seed=2)
    logits, weights, ids = TwoGates(weight, BiLevel(num_nodes=2, num_local=3))(tokens)
    flat = TopK(num_experts=6, k=1).route(tokens @ weight.mT)
    assert torch.equal(ids, flat.experts)
    torch.testing.assert_close(weights, flat.weights, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(logits.softmax(-1), flat.scores, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_models_run_and_learn_with_two_gates(family: str) -> None:
    with Promote():
        model = build(family, output_router_logits=True)
        router = BiLevel(num_nodes=4, num_local=2, k_nodes=2, k_local=1, renormalise=True)
        paths = replace_routers(model, router)
        assert paths == [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
        loss, gradients = run(model, batch(3), 3)
        found = model(input_ids=batch(3), labels=batch(3))
    assert loss.isfinite()
    assert found.aux_loss.isfinite()
    assert [tuple(each.shape) for each in found.router_logits] == [(21, 8)] * 2
    for name, each in gradients.items():
        assert float(each.abs().max()) > 0 or "experts" in name, name
    assert {name.rpartition(".")[2] for name in gradients if "gate." in name} == {"inter", "intra"}


def test_what_cannot_be_replaced_is_refused() -> None:
    router = BiLevel(num_nodes=4, num_local=2)
    with pytest.raises(SwapError, match=re.escape("no router is recognised beside experts encoder.block.1.layer.1")):
        replace_routers(build("switch_transformers"), router)
    with pytest.raises(SwapError, match=re.escape("router model.layers.0.mlp.router has a bias that is not zero")):
        replace_routers(build("gpt_oss"), router)
    with pytest.raises(SwapError, match="a router of 2 nodes of 2 experts in the place of one of 8 experts"):
        replace_routers(build("mixtral"), BiLevel(num_nodes=2, num_local=2))
    experts = StackedExperts(drawn(8, 6, 5, seed=0), drawn(8, 5, 3, seed=1), torch.tanh)
    with pytest.raises(SwapError, match="router gate gives logits only"):
        replace_routers(Mixture(drawn(8, 5, seed=5), experts, TopK(num_experts=8, k=2)), router)


def test_a_model_with_two_gates_has_its_experts_dealt() -> None:
    router = BiLevel(num_nodes=2, num_local=4, k_local=2)

    def block() -> torch.nn.Module:
        model = build("mixtral")
        replace_routers(model, router)
        return model.get_submodule("model.layers.0.mlp")

    tokens, blocks, plain = drawn(1, 12, 16, seed=0), [block() for _ in range(4)], block()
    expected = plain(tokens)
    expected.square().sum().backward()

    def work(rank: int, axes: ExpertAxes) -> Tensor:
        deal_experts(blocks[rank], axes, kind="inter_first")
        made: Tensor = blocks[rank](tokens[:, 3 * rank : 3 * rank + 3])
        made.square().sum().backward()
        return made.detach()

    found = torch.cat(on_threads(Mesh(dp=4, ep=4, ep_node=2), work), 1)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-11, atol=1e-11)
    for name in ("inter", "intra"):
        whole = plain.get_parameter(f"gate.levels.{name}").grad
        parts = [each.get_parameter(f"gate.levels.{name}").grad for each in blocks]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-10, atol=1e-10)
