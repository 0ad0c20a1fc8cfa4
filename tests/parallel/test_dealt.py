"""States of a dealt model: checkpoints that any mesh reads, norms that count every element once."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

import meshwright as mw
from meshwright.parallel.dealt import DealtStates, check_duplicates
from meshwright.parallel.layout import Split
from meshwright.parallel.microbatch import share
from meshwright.parallel.promote import Promote
from meshwright.parallel.tensor_plan import TensorPlan
from meshwright.parallel.wrap import ParallelModel
from meshwright.testing import run_ranks
from tests.parallel.cells import tiered
from tests.parallel.families import FAMILIES
from tests.parallel.models import tokens

pytestmark = pytest.mark.slow

MESHES = ({"dp": 2, "tp": 2}, {"fsdp": 4}, {"tp": 4}, {}, {"fsdp": 2, "tp": 2})


def _model(family: str, degrees: dict[str, int]) -> tuple[ParallelModel, torch.optim.Optimizer]:
    model = mw.parallelize(
        FAMILIES[family][0]().double(), mw.Mesh(**degrees), example=share(tokens(8)(), 0, 4), num_microbatches=1
    )
    return model, model.make_optimizer(lambda each: torch.optim.AdamW(each, lr=1e-2))


def _step(model: ParallelModel, optimizer: torch.optim.Optimizer, degrees: dict[str, int]) -> float:
    batch = share(tokens(8)(), model.data_rank, mw.Mesh(**degrees).data_degree)
    loss = model.step(batch)
    model.clip_gradients(1.0)
    optimizer.step()
    return float(loss)


def _save(folder: str, family: str, degrees: dict[str, int]) -> float:
    with Promote():
        model, optimizer = _model(family, degrees)
        for _ in range(2):
            _step(model, optimizer, degrees)
        state_dict_saver.save(model.state_dict(), checkpoint_id=folder)
        return _step(model, optimizer, degrees) + _step(model, optimizer, degrees)


def _resume(folder: str, family: str, degrees: dict[str, int]) -> float:
    with Promote():
        model, optimizer = _model(family, degrees)
        state = model.state_dict(loading=True)
        state_dict_loader.load(state, checkpoint_id=folder)
        model.load_state_dict(state)
        return _step(model, optimizer, degrees) + _step(model, optimizer, degrees)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["phi3", "gemma3", pytest.param("qwen3", marks=pytest.mark.wide)])
def test_what_one_mesh_saved_any_other_goes_on_from(tmp_path: Path, family: str) -> None:
    first = dict(MESHES[0])
    expected = run_ranks(_save, mw.Mesh(**first), str(tmp_path), family, first)[0]
    for degrees in MESHES:
        found = run_ranks(_resume, mw.Mesh(**degrees), str(tmp_path), family, dict(degrees))[0]
        assert found == pytest.approx(expected, rel=1e-12), degrees


def _norm(degrees: dict[str, int]) -> float:
    with Promote():
        model, _ = _model("phi3", degrees)
        model.step(share(tokens(8)(), model.data_rank, mw.Mesh(**degrees).data_degree))
        return float(model.clip_gradients(None))


def test_a_norm_counts_replicated_and_shared_elements_once() -> None:
    norms = [run_ranks(_norm, mw.Mesh(**degrees), dict(degrees))[0] for degrees in ({}, {"tp": 2}, {"tp": 4})]
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-12)


def _drop_sum(model: ParallelModel) -> None:
    dealt: Any = model._engine.data
    dealt._dealt = DealtStates(TensorPlan(degree=2, splits=dealt._dealt._plan.splits), dealt._groups)


def test_a_sum_over_tp_that_is_left_out_is_found() -> None:
    build_model, build_batch = FAMILIES["qwen3"]
    report = mw.verify(build_model, build_batch, mw.Mesh(tp=2), prepare=_drop_sum)
    assert not report.ok
    assert "_norm.weight" in report.worst_parameter


def test_rows_held_at_different_places_are_refused_under_fsdp() -> None:
    plan = TensorPlan(degree=2, splits={"qkv.weight": Split.of(0, 6, [[(0, 3), (4, 6)], [(3, 6)]])})
    assert check_duplicates(plan) == "qkv.weight: ranks hold the same rows at different places"


def _partly_trained(family: str) -> torch.nn.Module:
    """Frozen matrices, biases, norms and lookups beside trained ones, and a parameter that nothing uses."""
    model = FAMILIES[family][0]()
    for number, (_, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(number % 3 != 0)
    model.unused = torch.nn.Parameter(torch.ones(7, 3))
    return model


_FROZEN = ("llama", "gpt2", "phi3", "bert", "t5", "whisper", "vit", "translator")
_LAYOUTS = (
    ({"tp": 2}, {}),
    ({"tp": 2}, {"sequence_parallel": True, "num_microbatches": 2}),
    ({"fsdp": 2, "tp": 2}, {"zero_stage": 2}),
    ({"dp": 2, "tp": 2}, {}),
)


@pytest.mark.parametrize(("family", "layout"), tiered(product(_FROZEN, _LAYOUTS)), ids=str)
def test_frozen_and_unused_parameters_are_as_in_the_plain_run(family: str, layout: Any) -> None:
    degrees, options = layout
    report = mw.verify(partial(_partly_trained, family), FAMILIES[family][1], mw.Mesh(**degrees), **options)
    assert report.ok, str(report)
    assert not report.notes
