"""One step on ranks: unequal items, empty micro-batches, evaluation and clipping, and nothing left behind."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.parallel.errors import BatchError, LossError
from meshwright.parallel.microbatch import share
from meshwright.testing import run_ranks
from tests.parallel.models import llama, pairs, regressor, tokens

pytestmark = pytest.mark.slow


def _wrapped(mesh: mw.Mesh, **options) -> mw.ParallelModel:
    return mw.parallelize(llama()().double(), mesh, **options)


def _evaluate_between_steps(mesh: mw.Mesh, zero_stage: int) -> list[float]:
    model = _wrapped(mesh, zero_stage=zero_stage)
    optimizer = model.make_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    batch = share(tokens()(), model.data_rank, mesh.data_degree)
    found = []
    for _ in range(3):
        loss_sum, items = model.evaluate(batch)
        loss = model.step(batch)
        found += [float(loss_sum / items), float(loss)]
        optimizer.step()
    return found


@pytest.mark.parametrize(("degrees", "stage"), [({"dp": 2}, 3), ({"fsdp": 2}, 1), ({"fsdp": 2}, 2), ({"fsdp": 2}, 3)])
def test_evaluation_sees_the_weights_of_the_last_update(degrees: dict[str, int], stage: int) -> None:
    mesh = mw.Mesh(**degrees)
    found = run_ranks(_evaluate_between_steps, mesh, mesh, stage)[0]
    evaluated, stepped = found[::2], found[1::2]
    assert evaluated == pytest.approx(stepped, rel=1e-6)
    assert stepped[2] < stepped[0]


def _clip(mesh: mw.Mesh) -> tuple[float, float, float, float]:
    model = _wrapped(mesh)
    model.step(share(tokens()(), model.data_rank, mesh.data_degree))
    before = model.clip_gradients(0.1)
    after = model.clip_gradients(None)
    plain = llama()().double()
    plain(**tokens()()).loss.backward()
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    rest = torch.stack([each.grad.norm() for each in plain.parameters()]).norm()
    return float(before), float(after), float(expected), float(rest)


@pytest.mark.parametrize("degrees", [{"dp": 2}, {"fsdp": 2}, {"dp": 2, "fsdp": 2}])
def test_clipping_equals_torchs_on_the_plain_model(degrees: dict[str, int]) -> None:
    mesh = mw.Mesh(**degrees)
    for before, after, expected, rest in run_ranks(_clip, mesh, mesh):
        assert before == pytest.approx(expected, rel=1e-6)  # transformers' loss works in float32
        assert after == pytest.approx(rest, rel=1e-6)


def _nothing_counts(mesh: mw.Mesh) -> None:
    batch = tokens()()
    batch["labels"][:] = -100
    _wrapped(mesh).step(share(batch, 0, 2))


def test_a_step_in_which_nothing_counts_is_an_error_not_a_nan() -> None:
    with pytest.raises(LossError, match="no micro-batch of this step holds an item"):
        run_ranks(_nothing_counts, mw.Mesh(dp=2), mw.Mesh(dp=2))


def _too_few() -> None:
    mw.parallelize(regressor()(), mw.Mesh(dp=2), num_microbatches=3).step(pairs(2)())


def test_fewer_samples_than_micro_batches_say_what_to_change() -> None:
    with pytest.raises(BatchError, match="set num_microbatches to at most 2"):
        run_ranks(_too_few, mw.Mesh(dp=2))


def _uneven_micro_batches() -> float:
    model = mw.parallelize(regressor(dropout=0.0)().double(), mw.Mesh(dp=2), num_microbatches=2)
    inputs, targets = (each.double() for each in pairs(7)())
    cuts = [slice(0, 1), slice(1, 4)] if model.rank == 0 else [slice(4, 6), slice(6, 7)]
    model.step([(inputs[cut], targets[cut]) for cut in cuts])
    plain = regressor(dropout=0.0)().double()
    plain(inputs, targets).backward()
    gradients = model.full_gradients()
    return max(float((gradients[name] - each.grad).abs().max()) for name, each in plain.named_parameters())


def test_micro_batches_of_any_size_give_the_plain_gradient() -> None:
    assert max(run_ranks(_uneven_micro_batches, mw.Mesh(dp=2))) < 1e-14


class _Row(nn.Module):
    """Blocks one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def _left_behind(mesh: mw.Mesh, options: dict[str, Any]) -> list[list[str]]:
    torch.manual_seed(0)
    model = mw.parallelize(_Row(), mesh, num_microbatches=4, loss="sample_mean", **options)
    batch = {"x": torch.randn(4, 4)}
    for _ in range(2):  # the first looks for routes
        model.step(batch)
        model.evaluate(batch)
    return [_garbage(lambda: model.step(batch)), _garbage(lambda: model.evaluate(batch))]


def _garbage(work: Callable[[], object]) -> list[str]:
    """Tensors and objects of ours; torch's pytrees leave some functions."""
    gc.collect()
    gc.disable()
    try:
        work()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = [torch.Tensor if isinstance(each, torch.Tensor) else type(each) for each in gc.garbage]
        return [each.__name__ for each in kinds if each is torch.Tensor or each.__module__.startswith("meshwright")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        ({"pp": 2}, {"schedule": "1f1b"}),
        ({"pp": 2}, {"schedule": "modular", "recompute": "blocks"}),
        ({"pp": 2}, {"schedule": "zbv"}),
        ({"fsdp": 2}, {"schedule": "layered", "recompute": "blocks", "offload_inputs": True}),
        ({"fsdp": 2}, {"schedule": "accumulate"}),
    ],
)
def test_what_a_step_held_is_let_go_without_a_search_for_garbage(
    degrees: dict[str, int], options: dict[str, Any]
) -> None:
    mesh = mw.Mesh(**degrees)
    assert run_ranks(_left_behind, mesh, mesh, options) == [[[], []]] * 2
