"""DeepSpeed behind the same step, at the precision it allows: float32, 1e-5."""

from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.parallel.errors import WrapError
from tests.parallel.models import gpt2, pairs, regressor, tokens

pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
pytestmark = [pytest.mark.slow]


_MODELS: dict[str, tuple[Any, Any]] = {"gpt2": (gpt2(), tokens()), "regressor": (regressor(), pairs())}
_CASES = (("regressor", 0, 3), ("regressor", 1, 3), ("gpt2", 3, 3))
_MORE = [
    pytest.param("gpt2", stage, parts, marks=pytest.mark.wide) for stage, parts in ((0, 3), (1, 3), (2, 3), (3, 1))
]


@pytest.mark.parametrize(("name", "stage", "microbatches"), [*_CASES, *_MORE])
def test_every_stage_equals_the_plain_run(name: str, stage: int, microbatches: int) -> None:
    report = mw.verify(
        *_MODELS[name], mw.Mesh(dp=2), data_engine="deepspeed", zero_stage=stage, num_microbatches=microbatches
    )
    assert report.ok, str(report)
    assert report.dtype == "float32"


def test_offloaded_states_of_stage_two_equal_the_plain_run() -> None:
    report = mw.verify(
        regressor(), pairs(), mw.Mesh(fsdp=2), data_engine="deepspeed", zero_stage=2, num_microbatches=2, offload="cpu"
    )
    assert report.ok, str(report)


def _double_one_gradient(model: mw.ParallelModel) -> None:
    dict(model.module.module.named_parameters())["head.weight"].register_hook(lambda gradient: gradient * 2)


def test_a_planted_fault_is_found_and_named() -> None:
    report = mw.verify(
        regressor(), pairs(), mw.Mesh(dp=2), data_engine="deepspeed", zero_stage=1, prepare=_double_one_gradient
    )
    assert not report.ok
    assert report.worst_parameter == "head.weight"
    assert "gradient of head.weight is 2 x the plain one" in report.notes[0]


def test_float64_and_mixed_meshes_are_refused() -> None:
    from meshwright.parallel.deepspeed_engine import DeepSpeedStates

    with pytest.raises(WrapError, match="DeepSpeed trains no float64 parameters"):
        DeepSpeedStates(torch.nn.Linear(2, 2).double(), None, zero_stage=1, offload=False)  # type: ignore[arg-type]
    with pytest.raises(WrapError, match="nearest legal layout: fsdp=4"):
        mw.verify(regressor(), pairs(), mw.Mesh(dp=2, fsdp=2), data_engine="deepspeed")
