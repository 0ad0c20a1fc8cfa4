"""What a pipeline cannot carry is refused with the block's name, before a gradient is wrong."""

import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.errors import ScheduleError, WrapError
from meshwright.testing import run_ranks
from tests.parallel.models import llama, tokens
from tests.parallel.test_layered import Skipping, odd_batch

pytestmark = pytest.mark.slow

_MODULAR: dict[str, Any] = {"schedule": "modular", "num_microbatches": 2}


class _Wrapped:
    """An object that nobody can look into."""

    def __init__(self, stream: Tensor) -> None:
        self.stream = stream


class _Opaque(Skipping):
    """Blocks give an object with a tensor inside."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        held = _Wrapped(self.table[ids])
        for layer in self.wrapping:
            held = layer(held)
        return nn.functional.cross_entropy(self.head(held.stream).flatten(0, 1), labels.flatten())

    def __init__(self) -> None:
        super().__init__()
        self.layers = None  # type: ignore[assignment]
        self.wrapping = nn.ModuleList(_GivingObject() for _ in range(2))


class _GivingObject(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, held: _Wrapped) -> _Wrapped:  # type: ignore[override]
        return _Wrapped(super().forward(held.stream))


class _Growing(Skipping):
    """Blocks give a number that is another one at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Counting() for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream, number = layer(stream)
            stream = stream * number
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.number = 0

    def forward(self, stream: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        self.number += 1
        return super().forward(stream).tanh(), self.number


class _Collecting(Skipping):
    """Adds up values that blocks put on a list, which other ranks' blocks do not."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        side: list[Tensor] = []
        for layer in self.layers:
            stream = layer(stream, collected=side)["out"]
        scores = self.head(stream)
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()) + torch.stack(side).sum()


class _SkippingPast(Skipping):
    """What the last rank adds at the end was made from what another rank's block gave."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream, kept = self.table[ids], []
        for layer in self.layers:
            stream = layer(stream, collected=[])["out"]
            kept.append(stream.clone().sin())
        scores = self.head(stream + kept[1])
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())


class _Repeating(Skipping):
    """Goes through its blocks twice."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in (*self.layers, *self.layers):
            stream = layer(stream, collected=[])["out"]
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Deciding(Skipping):
    """Asks between blocks for a value that another rank holds."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream = layer(stream, collected=[])["out"]
            if bool(stream.isnan().any()):
                raise ValueError("not a number")
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("build_model", "why"),
    [
        (_SkippingPast, "another rank of the pipeline holds"),
        (_Deciding, "asks for a value"),
        (Skipping, "leaves values outside of what it gives"),
        (_Repeating, "a pipeline takes models that call their blocks in order"),
        (_Opaque, "gives an object of type _Wrapped"),
        (_Growing, "where it gave"),
        (_Collecting, "leaves values outside of what it gives"),
    ],
)
def test_values_that_pass_blocks_by_are_refused_and_not_lost(build_model: Any, why: str) -> None:
    with pytest.raises(Exception, match=why):
        mw.verify(build_model, odd_batch, mw.Mesh(pp=2), **_MODULAR)


class _ChangingLater(Skipping):
    """Blocks change what they are given in place, in micro-batches that begin with an even number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Scaling() for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream = layer(stream, bool(ids[0, 0] % 2))
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Scaling(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, stream: Tensor, keeps: bool) -> Tensor:  # type: ignore[override]
        return super().forward(stream * 2 if keeps else stream.mul_(2)).tanh() * 1.5


def _beginning_with(*numbers: int) -> dict[str, Tensor]:
    ids = odd_batch()["ids"]
    ids[:: len(ids) // len(numbers), 0] = torch.tensor(numbers)
    return {"ids": ids, "labels": ids}


class _Hooking(Skipping):
    """A hook on what every block is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Hooked() for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream = layer(stream)
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Hooked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight.register_hook(lambda gradient: gradient)  # as everywhere

    def forward(self, stream: Tensor) -> Tensor:
        if stream.requires_grad:
            stream.register_hook(lambda gradient: gradient * 0.5)
            self.weight.register_hook(lambda gradient: gradient).remove()
        return super().forward(stream).tanh()


@pytest.mark.parametrize("schedule", ["1f1b", "modular", "zb-h1"])
def test_a_hook_on_what_was_received_is_refused(schedule: str) -> None:
    with pytest.raises(Exception, match=r"a hook on what .* gives would be called more than once, or with a part of"):
        mw.verify(_Hooking, odd_batch, mw.Mesh(pp=3), schedule=schedule, num_microbatches=2)  # type: ignore[arg-type]


def test_a_block_may_change_its_input_in_some_micro_batches_only() -> None:
    for numbers in ((1, 2), (2, 1)):
        assert mw.verify(_ChangingLater, partial(_beginning_with, *numbers), mw.Mesh(pp=2), **_MODULAR).ok


def test_a_block_inside_a_stage_that_gives_something_else_is_refused_too() -> None:
    options: dict[str, Any] = {"schedule": "1f1b", "num_microbatches": 2}  # two of the three blocks in one stage
    with pytest.raises(Exception, match=r"block layers\.\d gave .* where it gave"):
        mw.verify(_Growing, odd_batch, mw.Mesh(pp=2), **options)


def test_more_ranks_than_blocks_and_models_without_blocks_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"3 blocks cannot make 4 stages.*nearest legal: pp=3"):
        mw.verify(llama(), tokens(8), mw.Mesh(pp=4), **_MODULAR)
    with pytest.raises(
        WrapError, match=r"no list of repeated blocks; name them with blocks=.* or use schedule='accumulate'"
    ):
        mw.parallelize(nn.Linear(2, 2), mw.Mesh(), schedule="layered")
    with pytest.raises(
        WrapError, match="schedule='accumulate' does not go with pp=2; nearest legal: schedule='modular'"
    ):
        mw.verify(llama(), tokens(8), mw.Mesh(pp=2))


def _called_as_a_whole() -> tuple[str, bool]:
    model = mw.parallelize(llama()(), mw.Mesh(pp=2), **_MODULAR)
    batch = tokens(8)()
    with pytest.raises(WrapError) as caught, torch.no_grad():
        model.module(**batch)
    return str(caught.value), bool(model.step(batch).isfinite())


def test_a_model_in_stages_cannot_be_called_as_a_whole() -> None:
    for message, stepped in run_ranks(_called_as_a_whole, mw.Mesh(pp=2)):
        assert "of the pipeline, so the model cannot be called as a whole; use step() and evaluate()" in message
        assert stepped


class _HeldByFunction(Skipping):
    """A block keeps what a function of the user's gave, where no operation of torch's is seen to make it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Keeping() for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream = layer(stream)
        scores = self.head(stream)
        kept = sum(layer.kept.mean() for layer in self.layers if layer.kept is not None)  # type: ignore[union-attr]
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()) + kept


class _Keeping(nn.Module):
    kept: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(8, 8)

    def forward(self, stream: Tensor) -> Tensor:
        self.kept = _Square.apply(self.matrix(stream))  # type: ignore[no-untyped-call]
        return stream + self.kept


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


def test_values_of_custom_functions_that_a_block_keeps_are_found() -> None:
    with pytest.raises(Exception, match="leaves values outside of what it gives"):
        mw.verify(_HeldByFunction, odd_batch, mw.Mesh(pp=2), **_MODULAR)


def _alive_after_a_step() -> list[str]:
    model = mw.parallelize(llama()(), mw.Mesh(pp=2), **_MODULAR)
    gc.collect()
    gc.disable()
    try:
        model.step(tokens(8)())
        alive = (each for each in gc.get_objects() if isinstance(each, Tensor))
        return [type(each.grad_fn).__name__ for each in alive if each.grad_fn is not None]
    finally:
        gc.enable()


def test_no_graph_outlives_a_step_until_python_looks_for_garbage() -> None:
    assert run_ranks(_alive_after_a_step, mw.Mesh(pp=2)) == [[], []]
