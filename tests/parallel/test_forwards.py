"""A micro-batch has a loss, items and random numbers of its own, whoever runs it and when."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.parallel.errors import BatchError
from meshwright.parallel.forwards import Forwards
from meshwright.parallel.loss import LossContract, LossKind


class _Noisy(nn.Module):
    """Its loss is what it draws."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sum() * 0 + torch.rand(())


def _forwards(kind: LossKind = "sample_mean", first: int = 0, **contract: Any) -> Forwards:
    data: Any = SimpleNamespace(module=_Noisy())
    return Forwards(data, LossContract(kind, **contract), device=torch.device("cpu"), seed=5, first=first)


def test_what_is_run_later_draws_what_it_draws_now() -> None:
    forwards, part = _forwards(), torch.ones(3, 2)
    before = torch.get_rng_state()
    loss, items = forwards.now(part, step=2, index=1)
    assert torch.equal(torch.get_rng_state(), before)
    later = forwards.later(part, step=2, index=1)
    torch.rand(7)
    assert later() == (loss, items)
    assert items == 3.0


def test_every_micro_batch_of_every_step_and_data_rank_draws_numbers_of_its_own() -> None:
    part = torch.ones(1, 2)
    found = {
        float(_forwards(first=first).now(part, step=step, index=index)[0])
        for first in (0, 2)
        for step in (0, 1)
        for index in (0, 1)
    }
    assert len(found) == 8
    assert _forwards(first=0).now(part, step=0, index=3) == _forwards(first=2).now(part, step=0, index=1)


@pytest.mark.parametrize(
    ("kind", "contract", "expected"),
    [
        ("sum", {}, 1.0),
        ("sample_mean", {}, 3.0),
        ("token_mean", {"items": lambda part: part.numel()}, 6.0),
        ("sample_mean", {"items": lambda part: part.sum()}, 6.0),
    ],
)
def test_items_are_the_same_now_and_later(kind: LossKind, contract: dict[str, Any], expected: float) -> None:
    forwards, part = _forwards(kind, **contract), torch.ones(3, 2)
    for found in (forwards.now(part, step=0, index=0)[1], forwards.later(part, step=0, index=0)()[1]):
        assert found == expected
        assert (found.dtype, found.shape) == (torch.float64, ())


def test_a_batch_without_samples_is_refused_before_the_model_runs() -> None:
    forwards = _forwards()
    with pytest.raises(BatchError, match="no tensor with a dim 0"):
        forwards.later(torch.tensor(1.0), step=0, index=0)
    assert forwards.data.module.calls == 0
