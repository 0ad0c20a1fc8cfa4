"""Graphs that are cut where stages begin: odd models are exact, or refused by name, and nothing of them is kept."""

import gc
from typing import Any, ClassVar
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.errors import BatchError, WrapError
from meshwright.parallel.pipeline.actions import Schedule
from tests.parallel.test_layered import Skipping, TiedSkip, TwoSkips, odd_batch


class _Chain(Skipping):
    """Blocks change their input in place and give it back; what it was at the start is used at the end."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = start = self.table[ids]
        for layer in self.layers:
            stream = layer(stream, collected=[])["out"]
        return nn.functional.cross_entropy(self.head(stream + start.sin()).flatten(0, 1), labels.flatten())


class _Sliced(_Chain):
    """A block changes a slice in place of what is used whole later."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids] * 2
        for layer in self.layers:
            layer(stream[:, 1:], collected=[])
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Down(nn.Module):
    """Puts a value aside for the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.matrix = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)

    def forward(self, stream: Tensor, aside: list[Tensor]) -> Tensor:
        aside.append(stream + self.shift)
        return self.matrix(stream).tanh()  # type: ignore[no-any-return]


class _Up(_Down):
    """Takes it with the same shift."""

    def forward(self, stream: Tensor, aside: list[Tensor]) -> Tensor:
        return self.matrix(stream).tanh() + (aside.pop() + self.shift).sin()  # type: ignore[no-any-return]


class _TiedAcross(Skipping):
    """Values pass stages by and meet weights that stages share: a U-Net whose shifts are tied down and up."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Down(), _Up()])
        self.layers[1].shift = self.layers[0].shift

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream, aside = self.table[ids], list[Tensor]()
        for layer in self.layers:
            stream = layer(stream, aside)
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Early(Skipping):
    """A weight is used in another form, made when the model was."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.turned = self.head.weight.t()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream = layer(stream).tanh()
        return nn.functional.cross_entropy((stream @ self.turned).flatten(0, 1), labels.flatten())


class _Hooked(Skipping):
    """A hook on a value that passes blocks by."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        start = self.table[ids].tanh()
        start.register_hook(lambda gradient: gradient * 0.5)
        stream = start
        for layer in self.layers:
            stream = layer(stream.clone(), collected=[])["out"]
        return nn.functional.cross_entropy(self.head(stream + start).flatten(0, 1), labels.flatten())


class _Keeping(Skipping):
    """A block finds on itself what forward put there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Masked() for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            layer.mask = (ids > 2).unsqueeze(-1)  # type: ignore[assignment]
            stream = layer(stream)
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Masked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, stream: Tensor) -> Tensor:
        return super().forward(stream) * self.mask  # type: ignore[operator, return-value]


def _stepped(model: nn.Module, **options: Any) -> dict[str, Tensor | None]:
    wrapped = mw.parallelize(model.double(), mw.Mesh(), num_microbatches=2, loss="sample_mean", **options)
    wrapped.step(odd_batch())
    return wrapped.full_gradients()


_HALVES = Schedule.read("0F0,0F1,1F0,1F1,2F0,2F1,2I0,2I1,1I0,1I1,0I0,0I1,2W0,0W0,1W0,0W1,2W1,1W1")


@pytest.mark.parametrize("build_model", [TiedSkip, TwoSkips, _Chain, _Sliced])
def test_layers_in_turns_are_the_plain_run(build_model: Any) -> None:
    report = mw.verify(build_model, odd_batch, mw.Mesh(), schedule="layered", num_microbatches=2)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-12


@pytest.mark.parametrize("build_model", [TiedSkip, TwoSkips, _Chain, _Sliced])
def test_halves_of_backward_in_any_order_are_the_whole(build_model: Any) -> None:
    expected = _stepped(build_model())
    for name, each in _stepped(build_model(), schedule=_HALVES).items():
        torch.testing.assert_close(each, expected[name], rtol=1e-12, atol=1e-14)


def test_weights_of_one_half_are_not_reached_through_other_stages() -> None:
    halves = Schedule.read("0F0,0F1,1F0,1F1,1I0,1I1,0I0,0I1,1W0,0W0,0W1,1W1")
    expected = _stepped(_TiedAcross())
    for name, each in _stepped(_TiedAcross(), schedule=halves, blocks=["layers.*"]).items():
        torch.testing.assert_close(each, expected[name], rtol=1e-12, atol=1e-14)


def test_a_weight_in_another_form_made_before_the_step_gets_its_gradient() -> None:
    models = [_Early() for _ in range(2)]
    found = []
    for model, schedule in zip(models, ("accumulate", "layered"), strict=True):
        wrapped = mw.parallelize(model, mw.Mesh(), schedule=schedule, num_microbatches=1)
        wrapped.step(odd_batch())
        found.append(wrapped.full_gradients()["head.weight"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("build_model", "message"),
    [
        (_Hooked, "a hook on what TanhBackward0 gives would be called more than once"),
        (_Keeping, r"module layers\.0 keeps a tensor in its attribute 'mask'"),
    ],
)
def test_what_micro_batches_in_turns_would_get_wrong_is_refused(build_model: Any, message: str) -> None:
    with pytest.raises(WrapError, match=message):
        _stepped(build_model(), schedule="layered")


def test_an_input_that_needs_a_gradient_is_refused() -> None:
    model = mw.parallelize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), mw.Mesh(), schedule="layered", loss="sum")
    with pytest.raises(BatchError, match=r"batch\['input'\] requires a gradient"):
        model.step({"input": torch.ones(2, 2, requires_grad=True)})


def test_nothing_of_a_micro_batch_is_kept_once_it_is_through() -> None:
    seen: list[Any] = []
    model = mw.parallelize(_Early(), mw.Mesh(), num_microbatches=4, schedule=Schedule.read(_IN_TURN))
    blocks: Any = model.module.layers
    blocks[1].register_forward_pre_hook(lambda _, args: seen.append(ref(args[0].untyped_storage())))
    alive: list[int] = []
    blocks[0].register_forward_pre_hook(lambda *_: alive.append(sum(each() is not None for each in seen)))
    gc.collect()
    gc.disable()
    try:
        model.step(odd_batch())
    finally:
        gc.enable()
    assert max(alive) <= 1
    assert [each for each in seen if each() is not None] == []


_IN_TURN = ",".join(f"0F{m},1F{m},2F{m},2B{m},1B{m},0B{m}" for m in range(4))


class _Noted(torch.autograd.Function):
    """Notes during which action its backward runs."""

    at: ClassVar[list[str]] = []
    seen: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        value, ctx.name = inputs
        return value * 1  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _Noted.seen.append(f"{_Noted.at[-1]} {ctx.name}")
        return gradients[0], None


class _Telling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, stream: Tensor) -> Tensor:
        noted: Any = _Noted.apply
        return noted(stream, "input") * noted(self.scale, "weight")  # type: ignore[no-any-return]


class _TwoTelling(Skipping):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Telling() for _ in range(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream = layer(stream)
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


def test_the_first_stage_too_has_work_in_both_halves() -> None:
    _Noted.seen.clear()
    schedule = Schedule.read("0F0,1F0,1I0,0I0,1W0,0W0")
    model = mw.parallelize(_TwoTelling(), mw.Mesh(), num_microbatches=1, loss="sample_mean", schedule=schedule)
    model._engine.watch = lambda action, phase: _Noted.at.append(str(action))  # type: ignore[attr-defined]
    model.step(odd_batch())
    assert _Noted.seen == ["1I0 input", "0I0 input", "1W0 weight", "0W0 weight"]
