"""Losses and items of a step: what all ranks of a pipeline know of them, and what that takes."""

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.parallel.collectives import Groups
from meshwright.parallel.errors import RankError
from meshwright.parallel.microbatch import share
from meshwright.parallel.pipeline import posting, wire
from meshwright.parallel.totals import Totals, weighted
from meshwright.testing import run_ranks

_LAYERS, _SAMPLES = 6, 8


class _Layers(nn.Module):
    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(_LAYERS))
        self.dtype = dtype

    def forward(self, values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over labels that count."""
        for layer in self.layers:
            values = values + layer(values).tanh()
        loss = nn.functional.cross_entropy(values, labels)
        return loss if self.dtype is None else loss.to(self.dtype)


def _build() -> nn.Module:
    torch.manual_seed(0)
    return _Layers().double()


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (_SAMPLES,), generator=generator)
    labels[[0, 1, 4]] = -100  # the first micro-batch of two samples holds no item
    return {"values": torch.randn(_SAMPLES, 4, generator=generator).double(), "labels": labels}


def _step(mesh: mw.Mesh, schedule: str) -> tuple[float, float, list[float], set[str]]:
    model = mw.parallelize(_build(), mesh, schedule=schedule, num_microbatches=4 // mesh.data_degree)
    batch = share(_batch(), model.data_rank, mesh.data_degree)
    model.step(batch)
    loss, summary = model.ledger_step(batch)
    assert model.last_step is not None
    losses: list[float] = model.last_step.microbatch_losses.tolist()
    return float(loss), float(model.last_step.items), losses, {call.kind for call, _ in summary.calls}


def _expected() -> tuple[float, list[float]]:
    batch = _batch()
    whole = float(_build()(**batch).detach())
    parts = [{key: each[at : at + 2] for key, each in batch.items()} for at in range(0, _SAMPLES, 2)]
    return whole, [float(_build()(**part).detach()) for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "schedule"),
    [({"pp": 2}, "1f1b"), ({"pp": 3}, "modular"), ({"pp": 3}, "zbv"), ({"pp": 2, "dp": 2}, "gpipe"), ({}, "layered")],
)
def test_all_ranks_of_a_pipeline_know_the_loss_the_items_and_the_loss_of_each_microbatch(
    degrees: dict[str, int], schedule: str
) -> None:
    mesh = mw.Mesh(**degrees)
    whole, parts = _expected()
    for rank, (loss, items, losses, _) in enumerate(run_ranks(_step, mesh, mesh, schedule)):
        assert loss == pytest.approx(whole, rel=1e-12)
        assert items == _SAMPLES - 3
        first = mesh.data_rank(rank) * len(losses)
        assert losses == pytest.approx(parts[first : first + len(losses)], rel=1e-12, nan_ok=True)


@pytest.mark.slow
def test_ranks_of_a_pipeline_sum_nothing_where_no_gradient_leaves_them() -> None:
    alone, shared = mw.Mesh(pp=2), mw.Mesh(pp=2, dp=2)
    for *_, kinds in run_ranks(_step, alone, alone, "1f1b"):
        assert "send" in kinds
        assert "all_reduce" not in kinds
    for *_, kinds in run_ranks(_step, shared, shared, "1f1b"):
        assert "all_reduce" in kinds


def test_a_mean_over_nothing_counts_as_zero() -> None:
    losses = torch.tensor([float("nan"), 2.0])
    assert weighted(losses, torch.tensor([0.0, 3.0])).tolist() == [0.0, 6.0]


def test_nobody_gets_a_factor_before_there_is_a_sum() -> None:
    found = [(torch.tensor(2.0), torch.tensor(4.0))]
    totals = Totals(1, Groups(mw.Mesh()), None, source=0, device=torch.device("cpu"))
    totals.forwarded(lambda: found)
    with pytest.raises(AssertionError, match="nobody has summed yet"):
        totals.scale()
    totals.ended(lambda: found)
    assert totals.scale().item() == 0.25


def _under_autocast(mesh: mw.Mesh, schedule: str) -> float:
    torch.manual_seed(0)
    model = mw.parallelize(_Layers(torch.float16), mesh, schedule=schedule, num_microbatches=4)
    batch = {name: each.float() if each.is_floating_point() else each for name, each in _batch().items()}
    with torch.autocast("cpu", torch.bfloat16):
        return float(model.step(batch))


@pytest.mark.slow
@pytest.mark.parametrize(("degrees", "schedule"), [({}, "layered"), ({"pp": 2}, "1f1b")])
def test_losses_are_summed_under_autocast_to_another_half_type(degrees: dict[str, int], schedule: str) -> None:
    mesh = mw.Mesh(**degrees)
    assert run_ranks(_under_autocast, mesh, mesh, schedule) == pytest.approx([_expected()[0]] * mesh.pp, rel=0.05)


def _late(schedule: str) -> list[float]:
    wire.EARLY = 0  # as over a transport that connects ranks at their first message
    try:
        model = mw.parallelize(_build(), mw.Mesh(pp=3), schedule=schedule, num_microbatches=4)
        return [float(model.step(_batch())) for _ in range(2)]
    finally:
        wire.EARLY = posting.EARLY


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_ranks_without_early_receives_know_the_loss_too(schedule: str) -> None:
    for losses in run_ranks(_late, mw.Mesh(pp=3), schedule):
        assert losses == pytest.approx([_expected()[0]] * 2, rel=1e-12)


def _cut_off(mesh: mw.Mesh) -> str:
    model = mw.parallelize(_build(), mesh, schedule="1f1b", num_microbatches=4)
    model.step(_batch())
    if model.rank != 0:
        model.step(_batch())
        return ""
    wait = Totals._wait

    def cut(totals: Totals) -> None:
        wait(totals)
        raise ConnectionError("closed")

    Totals._wait = cut  # type: ignore[method-assign]
    try:
        with pytest.raises(ConnectionError):
            model.step(_batch())
    finally:
        Totals._wait = wait  # type: ignore[method-assign]
    with pytest.raises(RankError) as refused:
        model.step(_batch())
    return str(refused.value)


@pytest.mark.slow
def test_behind_a_step_that_never_heard_of_its_losses_there_is_no_other() -> None:
    mesh = mw.Mesh(pp=2)
    assert "a step before ended with ConnectionError: closed" in run_ranks(_cut_off, mesh, mesh)[0]
