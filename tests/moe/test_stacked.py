"""Stacked experts as a module: what a loop over experts gives."""

import pytest
import torch
from torch import Tensor

from meshwright.moe.errors import DispatchError
from meshwright.moe.recognise import find_experts
from meshwright.moe.stacked import Mixture, StackedExperts
from meshwright.moe.top_k import TopK


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_mixture_is_the_weighted_sum_of_its_experts(has_gate: bool, biased: bool) -> None:
    up, down, inputs = drawn(4, 6, 5, seed=0), drawn(4, 5, 3 if has_gate else 6, seed=1), drawn(2, 3, 5, seed=2)
    biases = (drawn(4, 6, seed=3), drawn(4, 5, seed=4)) if biased else None
    experts = StackedExperts(up, down, torch.nn.functional.silu, has_gate=has_gate, biases=biases)
    mixture = Mixture(drawn(4, 5, seed=5), experts, TopK(num_experts=4, k=2))
    made = mixture(inputs)
    assert made.shape == inputs.shape
    for token, found in zip(inputs.view(-1, 5), made.view(-1, 5), strict=True):
        weights, ids = (mixture.gate.weight @ token).softmax(0).topk(2)
        total = torch.zeros(5, dtype=torch.float64)
        for weight, expert in zip(weights, ids, strict=True):
            hidden = up[expert] @ token + (biases[0][expert] if biases else 0)
            inner = hidden[:3].sigmoid() * hidden[:3] * hidden[3:] if has_gate else hidden.sigmoid() * hidden
            total += weight * (down[expert] @ inner + (biases[1][expert] if biases else 0))
        torch.testing.assert_close(found, total, rtol=1e-12, atol=1e-13)
    assert [(each.path, each.kind) for each in find_experts(mixture)] == [("experts", "stacked")]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DispatchError, match="experts with 2 matrices up and 3 down: one of each for an expert"):
        StackedExperts(torch.zeros(2, 4, 3), torch.zeros(3, 3, 2), torch.relu)
