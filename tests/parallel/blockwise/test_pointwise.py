"""What runs by blocks gives whole gradients once, in every state that torch can be in."""

from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from meshwright.parallel.blockwise.pointwise import Pointwise, run_by_blocks
from meshwright.parallel.dropout import PlainDropout
from meshwright.parallel.errors import WrapError


class Gated(nn.Module):
    """A gated network with dropout on the wide hidden, one matrix under two names, and a parameter nobody uses."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10, bias=False), nn.Linear(10, 6)
        self.again = self.up
        self.spare = nn.Parameter(torch.ones(6))
        self.drop, self.bend = nn.Dropout(dropout), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        wide = self.drop(functional.silu(self.gate(x)) * self.up(x) + self.bend(self.again(x)))
        return self.drop(self.down(wide))


X = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))


def _blocks(module: nn.Module, block: int = 3) -> Any:
    call = Pointwise("mlp", (module,), module.forward, None, block)
    return lambda x: run_by_blocks(call, x, x)


def _gradients(module: nn.Module, work: Any, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    torch.manual_seed(5)
    module.zero_grad()
    x = X.detach().to(dtype).requires_grad_(any(each.requires_grad for each in module.parameters()))
    output = work(x)
    after = torch.rand(3)
    output.square().sum().backward()
    return [output.detach(), after, torch.rand(3), x.grad, *(each.grad for each in module.parameters())]


def _same(found: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("frozen", [(), ("gate.weight", "gate.bias"), ("up.weight", "down.weight", "down.bias")])
def test_gradients_masks_and_generators_are_those_of_the_whole(block: int, frozen: tuple[str, ...]) -> None:
    module = Gated().double()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    _same(_gradients(module, _blocks(module, block)), _gradients(module, module))


def test_hooks_on_parameters_are_called_once() -> None:
    module, calls = Gated(), []
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda _, name=name: calls.append(name))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(f"{name} added"))
    _blocks(module, 1)(X).sum().backward()
    used = [name for name, _ in module.named_parameters() if name != "spare"]
    assert sorted(calls) == sorted([*used, *(f"{name} added" for name in used)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_can_stand_inside_a_checkpoint(reentrant: bool) -> None:
    module = Gated().double()
    _same(
        _gradients(module, lambda x: checkpoint(_blocks(module), x, use_reentrant=reentrant)),
        _gradients(module, module),
    )


def test_autocast_is_that_of_forward() -> None:
    module = Gated()

    def under(work: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return work(x)  # type: ignore[no-any-return]

        return run

    found = _gradients(module, under(_blocks(module)), torch.float32)
    assert found[0] is not None
    assert found[0].dtype is torch.bfloat16
    _same(found, _gradients(module, under(module), torch.float32), 0.05)
    with torch.autocast("cpu", torch.bfloat16):  # what was cast by blocks is not used by others without its history
        _blocks(module)(X.requires_grad_())
        module(X).sum().backward()
    assert module.gate.weight.grad is not None


def test_narrow_parameters_get_sums_of_wide_numbers() -> None:
    exact, module = Gated(0.0).double(), Gated(0.0).bfloat16()
    exact.load_state_dict(module.state_dict())
    rows = torch.randn(1, 512, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact(rows.double()).sum().backward()

    def error(work: Any) -> float:
        module.zero_grad()
        work(rows).sum().backward()
        found, expected = module.down.weight.grad, exact.down.weight.grad
        assert found is not None
        assert expected is not None
        assert found.dtype is torch.bfloat16
        return float((found.double() - expected).norm() / expected.norm())

    assert error(_blocks(module, 1)) <= 1.5 * error(module)


def test_it_can_be_gone_through_again_and_derived() -> None:
    module = Gated(0.0).double()
    x = X.detach()[:, :4].double().requires_grad_()
    output = _blocks(module)(x)
    asked = [x, module.gate.weight, module.up.weight]
    first = torch.autograd.grad(output.sum(), asked, retain_graph=True)
    for number, each in enumerate(asked):  # the halves that schedules ask for
        torch.testing.assert_close(torch.autograd.grad(output.sum(), each, retain_graph=True)[0], first[number])
    torch.autograd.gradcheck(_blocks(module), (x,))
    torch.autograd.gradgradcheck(_blocks(module), (x,))


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_a_derivative_of_the_second_order_has_the_masks_of_the_first(p: float) -> None:
    module = Gated(p).double()

    def second(work: Any) -> Tensor:
        torch.manual_seed(3)
        x = X.detach().double().requires_grad_()
        (first,) = torch.autograd.grad(work(x).square().sum(), x, create_graph=True)
        module.zero_grad()
        first.square().sum().backward()
        gradient = module.up.weight.grad
        assert gradient is not None
        return gradient

    torch.testing.assert_close(second(_blocks(module)), second(module), rtol=1e-12, atol=1e-14)


def test_nothing_of_forward_is_held_but_the_input() -> None:
    module = Gated()
    made: list[Any] = []
    module.bend.register_forward_hook(lambda _, __, output: made.append(ref(output)))
    output = _blocks(module)(X.requires_grad_())
    assert len(made) == 3
    assert [each() for each in made] == [None] * 3
    output.sum().backward()
    assert [each() for each in made] == [None] * 6


def test_masks_that_another_mode_draws_are_kept() -> None:
    module, found = Gated().double(), []
    for work in (_blocks(module), module):
        with PlainDropout(generator=torch.Generator().manual_seed(7)) as dropout:
            module.zero_grad()
            x = X.detach().double().requires_grad_()
            work(x).square().sum().backward()
        found.append([x.grad, *(each.grad for each in module.parameters())])
        assert dropout.shapes == [(2, 7, 10), (2, 7, 6)]
    _same(*found)


def test_parameters_that_change_before_backward_are_refused() -> None:
    module = Gated()
    output = _blocks(module)(X)
    with torch.no_grad():
        module.up.weight.add_(1.0)
    with pytest.raises(WrapError, match=r"parameters of mlp were changed between forward and backward"):
        output.sum().backward()
    assert all(isinstance(each, nn.Parameter) and each.grad is None for each in module.parameters())
