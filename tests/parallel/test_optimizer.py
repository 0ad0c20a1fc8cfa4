"""Optimizers work on local shards; checkpoints move between meshes, states included."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import meshwright as mw
from meshwright.parallel.microbatch import share
from meshwright.parallel.optimizer import grouped
from meshwright.testing import run_ranks
from tests.parallel.models import llama, tokens

BUILD = llama(tie_word_embeddings=True, intermediate_size=65)


def _made(mesh: mw.Mesh) -> tuple[mw.ParallelModel, torch.optim.Optimizer, Any]:
    model = mw.parallelize(BUILD().double(), mesh, zero_stage=3)
    optimizer = model.make_optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    return model, optimizer, share(tokens(12)(), model.data_rank, mesh.data_degree)


def _train_and_save(mesh: mw.Mesh, folder: str) -> list[float]:
    model, optimizer, batch = _made(mesh)
    for _ in range(2):
        model.step(batch)
        optimizer.step()
    dcp.save(model.state_dict(), checkpoint_id=folder)
    return _losses(model, optimizer, batch)


def _load_and_train(mesh: mw.Mesh, folder: str) -> list[float]:
    model, optimizer, batch = _made(mesh)
    state = model.state_dict(loading=True)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state)
    return _losses(model, optimizer, batch)


def _losses(model: mw.ParallelModel, optimizer: torch.optim.Optimizer, batch: Any) -> list[float]:
    losses = []
    for _ in range(3):
        losses.append(float(model.step(batch)))
        optimizer.step()
    return losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch's own, about its checkpoint writer
@pytest.mark.parametrize("source", [{"dp": 2}, {"fsdp": 2}, {"dp": 2, "fsdp": 2}])
def test_a_checkpoint_goes_on_alike_on_every_mesh(tmp_path: Path, source: dict[str, int]) -> None:
    mesh = mw.Mesh(**source)
    folder = str(tmp_path / "checkpoint")
    expected = run_ranks(_train_and_save, mesh, mesh, folder)[0]
    for target in ({}, {"dp": 2}, {"fsdp": 4}, {"dp": 2, "fsdp": 2}):
        other = mw.Mesh(**target)
        found = run_ranks(_load_and_train, other, other, folder)[0]
        # transformers computes its loss in float32, which rounds the data ranks' parts differently
        assert found == pytest.approx(expected, rel=1e-6), target
        if target == source:
            assert found == expected


def _schedule(mesh: mw.Mesh) -> list[float]:
    model, optimizer, batch = _made(mesh)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    rates = []
    for _ in range(3):
        model.step(batch)
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.slow
def test_learning_rate_schedules_of_torch_drive_it() -> None:
    mesh = mw.Mesh(fsdp=2)
    assert run_ranks(_schedule, mesh, mesh)[0] == pytest.approx([1e-2 / 2, 1e-2 / 3, 1e-2 / 4])


def _second_optimizer() -> None:
    model, _, _ = _made(mw.Mesh(dp=2))
    model.make_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=1.0))


@pytest.mark.slow
def test_a_second_optimizer_is_refused() -> None:
    with pytest.raises(mw.parallel.errors.WrapError, match="has an optimizer already"):
        run_ranks(_second_optimizer, mw.Mesh(dp=2))


def test_equal_settings_make_one_group() -> None:
    named = {"w": torch.zeros(2, 2), "b": torch.zeros(2), "v": torch.zeros(2, 2)}
    groups = grouped(named, lambda name, each: {"weight_decay": 0.1 if each.dim() > 1 else 0.0})
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(2, 0.1), (1, 0.0)]
    assert grouped(named, None) == list(named.values())
