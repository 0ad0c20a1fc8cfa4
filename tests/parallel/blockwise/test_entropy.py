"""Cross entropy by blocks of rows equals torch's: every reduction, any targets, dtypes, dealt classes, halves."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import meshwright as mw
from meshwright.parallel.blockwise.entropy import Entropy, blockwise_cross_entropy
from meshwright.parallel.blockwise.loss import TiledHead, tile_loss
from meshwright.parallel.blockwise.product import Product
from meshwright.parallel.errors import WrapError
from meshwright.parallel.following import Call
from meshwright.parallel.layout import Split
from meshwright.parallel.threads import ThreadAxis, run_threads
from meshwright.parallel.vocabulary import deal_head
from tests.parallel.families import FAMILIES
from tests.parallel.models import llama, tokens

ROWS, INPUTS, CLASSES = 11, 4, 13
CAP = Call(torch.tanh, (), {})
CALL = Entropy(Product(), CLASSES, block=3, dtype=torch.float64)


def _inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, INPUTS), (CLASSES, INPUTS), (CLASSES,))
    hidden, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes
    )
    return hidden, weight, bias


TARGETS = {
    "all count": torch.arange(ROWS) % CLASSES,
    "unequal counts in blocks": torch.tensor([3, -100, -100, -100, -100, -100, 12, 0, 1, 5, -100]),
    "one counts": torch.tensor([-100] * 10 + [12]),
    "none counts": torch.full((ROWS,), -100),
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("block", "in_advance"), [(3, False), (3, True), (1, True), (11, False), (100, True)])
def test_it_equals_torch(targets: str, reduction: str, block: int, in_advance: bool) -> None:
    target, inputs = TARGETS[targets], _inputs()
    for capped, biased in product((False, True), repeat=2):
        scores = functional.linear(inputs[0], inputs[1], inputs[2] if biased else None)
        plain = functional.cross_entropy(scores.tanh() if capped else scores, target, reduction=reduction)
        asked = inputs if biased else inputs[:2]
        weights = torch.randn(plain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        steps = Product(steps=(CAP,) if capped else ())
        call = replace(CALL, block=block, in_advance=in_advance, reduction=reduction, product=steps)
        bias = inputs[2] if biased else None
        found = blockwise_cross_entropy(call, inputs[0], target, weight=inputs[1], bias=bias)
        torch.testing.assert_close(found, plain, rtol=1e-13, atol=1e-14, equal_nan=True)
        expected = torch.autograd.grad(plain, asked, weights)
        for one, other in zip(torch.autograd.grad(found, asked, weights), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("in_advance", [False, True])
def test_backward_can_be_run_again_and_derived(in_advance: bool) -> None:
    hidden, weight, bias = _inputs()
    call = replace(CALL, in_advance=in_advance, product=Product(steps=(CAP,)))

    def loss(*inputs: Tensor) -> Tensor:
        return blockwise_cross_entropy(
            call, inputs[0], TARGETS["unequal counts in blocks"], weight=inputs[1], bias=inputs[2]
        )

    found = loss(hidden, weight, bias)
    first = torch.autograd.grad(found, [hidden, weight, bias], retain_graph=True)
    second = torch.autograd.grad(found * 2, [hidden, weight, bias])
    assert all(torch.allclose(2 * one, other, rtol=1e-13) for one, other in zip(first, second, strict=True))
    torch.autograd.gradcheck(loss, (hidden, weight, bias), nondet_tol=1e-13)  # the first may be had in advance
    torch.autograd.gradgradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 2}, {1, 2}, {0, 1, 2}])
@pytest.mark.parametrize("in_advance", [False, True])
def test_what_is_frozen_gets_no_gradient(frozen: set[int], in_advance: bool) -> None:
    inputs = [each.detach().requires_grad_(number not in frozen) for number, each in enumerate(_inputs())]
    loss = blockwise_cross_entropy(
        replace(CALL, in_advance=in_advance), inputs[0], TARGETS["all count"], weight=inputs[1], bias=inputs[2]
    )
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    assert {number for number, each in enumerate(inputs) if each.grad is None} == frozen


def test_a_target_that_is_no_class_is_refused() -> None:
    hidden, weight, _ = _inputs()
    for wrong in (CLASSES, -1):
        with pytest.raises(RuntimeError, match="a target is no class: they go from 0 to 12"):
            blockwise_cross_entropy(CALL, hidden, torch.full((ROWS,), wrong), weight=weight)


class _Products(TorchDispatchMode):
    """Counts products that make gradients of a weight and of rows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.made.append(tuple(made.shape))
        return made


@pytest.mark.parametrize("in_advance", [False, True])
def test_a_schedule_that_asks_for_half_a_backward_pays_for_half(in_advance: bool) -> None:
    hidden, weight, _ = _inputs()
    call = replace(CALL, in_advance=in_advance, block=ROWS)
    with _Products() as forward:
        loss = blockwise_cross_entropy(call, hidden, TARGETS["all count"], weight=weight)
    with _Products() as inputs:
        torch.autograd.grad(loss, hidden, retain_graph=True)
    with _Products() as weights:
        torch.autograd.grad(loss, weight)
    scores, of_rows, of_weight = (ROWS, CLASSES), (ROWS, INPUTS), (CLASSES, INPUTS)
    if in_advance:
        assert (forward.made, inputs.made, weights.made) == ([scores, of_rows, of_weight], [], [])
    else:
        assert (forward.made, inputs.made, weights.made) == ([scores], [scores, of_rows], [scores, of_weight])


@pytest.mark.parametrize("in_advance", [False, True])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_untouched_head(narrow: torch.dtype, in_advance: bool) -> None:
    torch.manual_seed(0)
    rows, target = torch.randn(32, 8), torch.randint(0, 50, (32,))

    def run(head: nn.Module, kind: str) -> tuple[Tensor, Any]:
        given = rows.to(torch.float32 if kind == "autocast" else narrow).requires_grad_()
        with torch.autocast("cpu", narrow, enabled=kind == "autocast"):
            scores = head(given)
            loss = functional.cross_entropy(scores.float() if kind == "cast" else scores, target)
        loss.backward(gradient=torch.tensor(32.0, dtype=loss.dtype))
        return loss, given.grad

    for kind in ("cast", "as it is", "autocast"):
        plain = nn.Linear(8, 50).to(torch.float32 if kind == "autocast" else narrow)
        tiled = nn.Linear(8, 50).to(plain.weight.dtype)
        tiled.load_state_dict(plain.state_dict())
        tile_loss(tiled, 5, heads=[""], in_advance=in_advance)
        for one, other in zip(run(tiled, kind), run(plain, kind), strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)  # dtypes are compared, too
        torch.testing.assert_close(tiled.weight.grad, plain.weight.grad, rtol=0.02, atol=0.02)


def test_errors_of_narrow_weights_gradients_do_not_grow_with_blocks() -> None:
    torch.manual_seed(0)
    rows, target = torch.randn(2048, 16).bfloat16(), torch.randint(0, 64, (2048,))
    plain = nn.Linear(16, 64).bfloat16()
    exact = nn.Linear(16, 64).double()
    exact.load_state_dict(plain.state_dict())
    functional.cross_entropy(exact(rows.double()), target).backward()

    def error(head: nn.Module) -> float:
        head.zero_grad()
        functional.cross_entropy(head(rows).float(), target).backward()
        found, expected = head.weight.grad, exact.weight.grad
        assert isinstance(found, Tensor)
        assert expected is not None
        return float((found.double() - expected).norm() / expected.norm())

    torchs = error(plain)
    for block in (1024, 64, 2):
        tile_loss(plain, block, heads=[""])
        assert error(plain) <= 1.4 * torchs  # each block is rounded once, their sum is not


def test_small_gradients_of_float16_do_not_vanish() -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(1000, 8).half().requires_grad_(), torch.randn(1000, 8).half().requires_grad_()
    call = replace(CALL, classes=1000, block=100, dtype=torch.float32, in_advance=True)
    scale = torch.tensor(2.0**16)
    blockwise_cross_entropy(call, rows, torch.arange(1000), weight=weight).backward(gradient=scale)
    exact = weight.detach().double().requires_grad_()
    functional.cross_entropy(rows.detach().double() @ exact.T, torch.arange(1000)).backward()
    assert weight.grad is not None
    assert exact.grad is not None
    error = (weight.grad.double() / scale - exact.grad).norm() / exact.grad.norm()
    assert float(error) < 2e-3


@pytest.mark.parametrize(("degree", "block"), [(2, 2), (3, 100)])
def test_dealt_classes_ask_for_the_same_collectives_and_give_the_same(degree: int, block: int) -> None:
    hidden, weight, bias = _inputs()
    target = TARGETS["unequal counts in blocks"]
    prior = torch.randn(1, CLASSES, dtype=torch.float64)

    def use(scores: Tensor) -> Tensor:
        return functional.cross_entropy((scores.float() * 0.5 + prior).view(-1, CLASSES), target)

    scores = functional.linear(hidden, weight, bias).float() * 0.5 + prior
    plain = functional.cross_entropy(scores, target)
    expected = torch.autograd.grad(plain, [hidden, weight, bias])
    split = Split.even(0, CLASSES, degree)

    def work(axis: ThreadAxis) -> Any:
        head = nn.Linear(INPUTS, CLASSES)
        head.weight, head.bias = (nn.Parameter(split.take(each.detach(), axis.rank)) for each in (weight, bias))
        rows, found = hidden.detach().clone().requires_grad_(), []
        for tiled in (False, True):
            deal_head(head, split, axis)
            if tiled:
                tile_loss(head, block, heads=[""], in_advance=True)
            head.zero_grad()
            start = len(axis.calls)
            loss = use(head(rows))
            (gradient,) = torch.autograd.grad(loss, rows, retain_graph=True)
            loss.backward()
            whole = head(rows).softmax(-1)
            found.append((loss.detach(), gradient, head.weight.grad, head.bias.grad, whole.detach()))
            found.append(axis.calls[start:])
        return found

    ranks = run_threads(work, degree)
    for dealt, dealt_calls, tiled, tiled_calls in ranks:
        assert tiled_calls == dealt_calls
        for one, other in zip(tiled, dealt, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(tiled[0], plain.detach(), rtol=1e-6, atol=0, check_dtype=False)
        torch.testing.assert_close(tiled[1], expected[0], rtol=1e-5, atol=1e-7)
    weights = torch.cat([tiled[2] for _, _, tiled, _ in ranks])
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-7)


def test_a_second_derivative_of_dealt_classes_is_refused() -> None:
    hidden, weight, _ = _inputs()

    def work(axis: ThreadAxis) -> None:
        call = replace(CALL, axis=axis, span=(0, CLASSES) if axis.rank == 0 else (0, 0))
        loss = blockwise_cross_entropy(call, hidden, TARGETS["all count"], weight=weight)
        torch.autograd.grad(loss, hidden, create_graph=True)

    with pytest.raises(WrapError, match=r"second derivatives .* dealt over tp cannot be had; use tp=1"):
        run_threads(work, 1)


def _tiled(family: Any, in_advance: bool) -> Any:
    def build() -> nn.Module:
        model: nn.Module = family()
        tile_loss(model, 5, in_advance=in_advance)
        return model

    return build


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "degrees", "options"),
    [
        ("t5", {"pp": 2}, {"schedule": "1f1b"}),
        ("gpt2", {"pp": 2}, {"schedule": "zb-h1", "in_advance": True}),
        ("gpt2", {"pp": 2}, {"schedule": "zb-h1"}),
        ("llama", {"fsdp": 2}, {"schedule": "layered"}),
        ("gpt2", {"fsdp": 2}, {"zero_stage": 3, "in_advance": True}),
    ],
    ids=str,
)
def test_it_meets_schedules_and_shards(family: str, degrees: dict[str, int], options: dict[str, Any]) -> None:
    build, batch = FAMILIES[family]
    options = {"num_microbatches": 2, **options}
    build = _tiled(build, options.pop("in_advance", False))
    report = mw.verify(build, batch, mw.Mesh(**degrees), **options)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


def test_a_step_gives_the_gradients_of_the_untouched_model() -> None:
    batch = tokens()()
    found = []
    for build in (llama(), _tiled(llama(), True), _tiled(llama(), False)):
        model = mw.parallelize(build().double(), mw.Mesh(), schedule="layered", num_microbatches=3)
        found.append({"": model.step(batch)})
        found[-1].update({name: each for name, each in model.full_gradients().items() if each is not None})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6)


def test_tiling_again_changes_the_block_and_keeps_the_rest() -> None:
    head = nn.Linear(2, 9)
    tile_loss(head, 3, heads=[""])
    again = tile_loss(head, 4, heads=[""], in_advance=True)[""]
    assert isinstance(head.forward, TiledHead)
    assert (again.block, again.in_advance, again.vocabulary, again.axis) == (4, True, 9, None)
