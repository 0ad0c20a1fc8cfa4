"""Bi-level routers in models: the outer sum nearest to what was there, and the standard three outputs."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.bilevel import BiLevel
from meshwright.moe.capacity import Capacity
from meshwright.moe.errors import SwapError
from meshwright.moe.recognise import find_experts, find_router
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


_ONE_CHOICE: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_experts_per_tok": 1},
    "deepseek_v3": {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
    "switch_transformers": {"expert_capacity": 100},
}


@pytest.mark.parametrize("family", _ONE_CHOICE)
def test_a_model_that_chose_one_expert_by_sums_is_as_before(family: str) -> None:
    """Biases are sums too; where a module gives logits only, experts are handed what the gates choose."""
    with Promote():
        model = build(family, **_ONE_CHOICE[family])
        for experts in find_experts(model):
            for values in find_router(model, experts)[1].parameters():
                values.data = _sums_near(values.data, num_nodes=4)
        plain = run(model, batch(3), 3)[0]
        scale = getattr(model.config, "routed_scaling_factor", 1.0)
        router = BiLevel(num_nodes=4, num_local=2, renormalise=family != "switch_transformers", scale=scale)
        paths = replace_routers(model, router)
        loss, gradients = run(model, batch(3), 3)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    levels = [name for name in gradients if any(name.startswith(f"{path}.levels.") for path in paths)]
    assert len(levels) == len(paths) * (4 if family == "gpt_oss" else 2)
    assert all(bool(gradients[name].isfinite().all()) for name in levels)


def _sums_near(values: Tensor, *, num_nodes: int) -> Tensor:
    each = values.unflatten(0, (num_nodes, -1))
    return (each.mean(1, keepdim=True) + each.mean(0, keepdim=True) - each.mean((0, 1), keepdim=True)).flatten(0, 1)


def test_experts_are_handed_what_gates_choose_in_the_form_of_their_model() -> None:
    """One-hot choices of [tokens, 1, experts]; what capacity drops is nowhere."""
    with Promote():
        model = build("switch_transformers")
        replace_routers(model, BiLevel(num_nodes=4, num_local=2, capacity=Capacity(factor=0.5)))
        seen: list[tuple[Tensor, ...]] = []
        for each in find_experts(model):
            each.module.register_forward_pre_hook(lambda _, given: seen.append(given))
        run(model, batch(3), 3)
    for _, choices, weights in seen:
        assert choices.shape == (len(weights), 1, 8)
        assert torch.equal(choices.sum((1, 2)) > 0, weights[:, 0] > 0)
    assert any(bool((weights == 0).any()) for _, _, weights in seen)


def test_a_mixture_of_its_own_takes_two_gates_too() -> None:
    experts = StackedExperts(drawn(8, 6, 5, seed=0), drawn(8, 5, 3, seed=1), torch.tanh)
    weight = (drawn(4, 1, 5, seed=5) + drawn(1, 2, 5, seed=6)).flatten(0, 1)
    tokens, model = drawn(9, 5, seed=7), Mixture(weight, experts, TopK(num_experts=8, k=1))
    before = model(tokens)
    assert replace_routers(model, BiLevel(num_nodes=4, num_local=2)) == ["gate"]
    torch.testing.assert_close(copy.deepcopy(model)(tokens), before, rtol=1e-12, atol=1e-13)


class _Odd(torch.nn.Module):
    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(drawn(8, 5, seed=3))
        self.made = made

    def forward(self, tokens: Tensor) -> Any:
        return self.made(tokens @ self.weight.mT)


def test_what_cannot_be_replaced_is_refused() -> None:
    router = BiLevel(num_nodes=4, num_local=2)
    with pytest.raises(SwapError, match="a router of 2 nodes of 2 experts in the place of one of 8 experts"):
        replace_routers(build("mixtral"), BiLevel(num_nodes=2, num_local=2))
    learned = build("mixtral")
    learned.get_submodule("model.layers.1.mlp.gate").temperature = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(SwapError, match=re.escape("router model.layers.1.mlp.gate learns a temperature too")):
        replace_routers(learned, router)
    twice = build("mixtral")
    twice.get_submodule("model.layers.0.mlp").other = torch.nn.Linear(16, 8)
    with pytest.raises(SwapError, match=re.escape("model.layers.0.mlp.gate and model.layers.0.mlp.other could both")):
        replace_routers(twice, router)
    with pytest.raises(SwapError, match=r"no router is recognised beside experts experts: .* \[8, d\]"):
        replace_routers(_mixture(torch.nn.Linear(5, 7)), router)
    for odd, words in ((lambda logits: (logits, logits), "gives neither logits"), (len, "gives neither logits")):
        with pytest.raises(SwapError, match=words):
            replace_routers(_mixture(_Odd(odd)), router)
    with pytest.raises(SwapError, match="router gate, asked with one token: ZeroDivisionError"):
        replace_routers(_mixture(_Odd(lambda _: 1 // 0)), router)


def _mixture(gate: torch.nn.Module) -> Mixture:
    experts = StackedExperts(drawn(8, 6, 5, seed=0), drawn(8, 5, 3, seed=1), torch.tanh)
    model = Mixture(drawn(8, 5, seed=5), experts, TopK(num_experts=8, k=2))
    model.gate = gate
    return model


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
