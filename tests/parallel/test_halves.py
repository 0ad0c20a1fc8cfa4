"""A backward in two halves gives the gradients of a whole one, and does each product once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from meshwright.parallel.halves import first_half, going_back

Build = Callable[[], tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]]


def _chain() -> Any:
    block = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 6))
    return block, lambda module, x: x + module(x)


def _recurrent() -> Any:
    """One weight, first made from others, used in two places of which one comes after the other."""
    block = nn.ParameterDict({"first": nn.Parameter(torch.randn(6, 6)), "scale": nn.Parameter(torch.randn(6, 1))})

    def run(module: Any, x: Tensor) -> Tensor:
        weight = module["first"] * module["scale"]
        return functional.linear(functional.linear(x, weight).tanh(), weight) * module["scale"].sum()

    return block, run


def _beside() -> Any:
    """Values made from weights alone meet the stream, and leave the piece on their own too."""
    block = nn.ParameterDict({"table": nn.Parameter(torch.randn(6)), "shift": nn.Parameter(torch.randn(6))})

    def run(module: Any, x: Tensor) -> Tensor:
        made = (module["table"] * 2).sin()
        return torch.cat([(x * made + module["shift"]).tanh(), made.expand(3, 6)])

    return block, run


def _hooked() -> Any:
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def run(module: Any, x: Tensor) -> Tensor:
        hidden = module[0](x)
        hidden.register_hook(lambda gradient: gradient * 3)
        return module[2](module[1](hidden))  # type: ignore[no-any-return]

    return block, run


def _without_weights() -> Any:
    return nn.Tanh(), lambda module, x: module(x) * x


_BLOCKS: list[Callable[[], Any]] = [_chain, _recurrent, _beside, _hooked, _without_weights]


def _leaf_node(leaf: Tensor) -> Any:
    return leaf.view_as(leaf).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


@pytest.mark.parametrize("build", _BLOCKS)
def test_both_halves_together_are_the_whole(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    block, run = build()
    x = torch.randn(3, 6, requires_grad=True)
    output = run(block, x)
    given = torch.randn_like(output)
    expected = torch.autograd.grad(output, [x, *block.parameters()], given, retain_graph=True, allow_unused=True)
    weights = [_leaf_node(each) for each in block.parameters()]
    inputs, early, later = first_half(
        {(output.grad_fn, 0): given}, [(_leaf_node(x), 0)], weights, follow=lambda node: True
    )
    del output
    found = {**early, **later.gradients()}
    assert torch.equal(inputs[_leaf_node(x), 0], expected[0])
    for node, each in zip(weights, expected[1:], strict=True):
        torch.testing.assert_close(found.get(node), each)


def test_each_half_does_its_own_products() -> None:
    block, run = _chain()
    x = torch.randn(3, 6, requires_grad=True)
    output = run(block, x)
    products = 2 * 2 * 3 * 6 * 8  # two matrices, two operations for each element and row
    weights = [_leaf_node(each) for each in block.parameters()]
    with FlopCounterMode(display=False) as first:
        _, _, later = first_half(
            {(output.grad_fn, 0): torch.ones_like(output)}, [(_leaf_node(x), 0)], weights, follow=lambda node: True
        )
    with FlopCounterMode(display=False) as second:
        later.gradients()
    assert (first.get_total_flops(), second.get_total_flops()) == (products, products)


def test_nothing_given_gives_nothing() -> None:
    assert going_back({}, []) == {}
