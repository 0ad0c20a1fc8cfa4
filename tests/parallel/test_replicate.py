"""The axis dp: fixed buckets, tied and unused parameters, recompute."""

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import meshwright as mw
from meshwright.parallel.errors import WrapError
from meshwright.parallel.microbatch import share
from meshwright.parallel.replicate import cut_buckets
from meshwright.testing import run_ranks
from tests.parallel.models import llama, pairs, regressor, tokens


@given(st.lists(st.integers(0, 50)), st.integers(1, 60), st.integers(1, 60))
def test_buckets_hold_every_parameter_in_order_and_within_their_limit(sizes: list[int], first: int, limit: int) -> None:
    buckets = cut_buckets(sizes, first, limit)
    assert [index for bucket in buckets for index in bucket] == list(range(len(sizes)))
    for number, bucket in enumerate(buckets):
        assert len(bucket) == 1 or sum(sizes[index] for index in bucket) <= (first if number == 0 else limit)


def _train(steps: int) -> list[Tensor]:
    mesh = mw.Mesh(dp=4)
    model = mw.parallelize(llama()(), mesh, bucket_bytes=4096)
    optimizer = model.make_optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    batch = share(tokens(12)(), model.data_rank, 4)
    for _ in range(steps):
        model.step(batch)
        optimizer.step()
    return [each.detach().clone() for each in model.parameters()]


@pytest.mark.slow
def test_two_runs_on_four_ranks_agree_bit_for_bit() -> None:
    first, second = (run_ranks(_train, mw.Mesh(dp=4), 3) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first[0], second[0], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(first[0], first[3], strict=True))


def _outlives_its_model(degrees: dict[str, int]) -> bool:
    model = mw.parallelize(regressor()(), mw.Mesh(**degrees))
    model.step(pairs()())
    engine = weakref.ref(model._engine.data)
    del model
    gc.collect()
    return engine() is not None


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"dp": 2}, {"fsdp": 2}], ids=str)
def test_a_model_that_is_gone_leaves_its_groups(degrees: dict[str, int]) -> None:
    assert run_ranks(_outlives_its_model, mw.Mesh(**degrees), degrees) == [False, False]


class Moody(nn.Module):
    """Uses `odd` only on samples that ask for it: on some ranks never."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd, self.never = (nn.Linear(6, 2) for _ in range(3))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        layer = self.odd if inputs[0, 0] > 0 else self.even
        return nn.functional.mse_loss(layer(inputs), targets)


def _moody() -> nn.Module:
    torch.manual_seed(0)
    return Moody()


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"dp": 2}, {"dp": 4}, {"fsdp": 2}, {"dp": 2, "fsdp": 2}])
def test_parameters_used_on_some_ranks_or_on_none_equal_the_plain_run(degrees: dict[str, int]) -> None:
    report = mw.verify(_moody, pairs(16), mw.Mesh(**degrees), num_microbatches=2)
    assert report.ok, str(report)
    assert report.notes == ()  # `never` has no gradient here either


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.reentrant = reentrant

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        inputs = inputs.requires_grad_(True)
        for _ in range(2):
            inputs = checkpoint(self.layer, inputs, use_reentrant=self.reentrant)
        return nn.functional.mse_loss(self.head(inputs), targets)


def _recomputed(reentrant: bool) -> Any:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Recomputed(reentrant)

    return build


@pytest.mark.slow
def test_recompute_is_exact_and_its_reentrant_form_is_refused_not_wrong() -> None:
    assert mw.verify(_recomputed(False), pairs(), mw.Mesh(dp=2)).ok
    with pytest.raises(WrapError, match="use_reentrant=False"):
        mw.verify(_recomputed(True), pairs(), mw.Mesh(dp=2))
