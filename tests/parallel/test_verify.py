"""The product: a parallel step equals the plain step, and a planted fault is found and named."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import meshwright as mw
from meshwright.parallel.collectives import Pending
from meshwright.parallel.errors import LossError, WrapError
from meshwright.parallel.microbatch import share
from meshwright.parallel.replicate import Replicate
from meshwright.parallel.wrap import ParallelModel
from tests.parallel.cells import tiered
from tests.parallel.models import gpt2, llama, pairs, regressor, tokens

pytestmark = pytest.mark.slow

LAYOUTS = [
    ({"dp": 2}, {}),
    ({"dp": 2}, {"num_microbatches": 3}),
    ({"dp": 4}, {"num_microbatches": 2}),
    ({"dp": 2}, {"bucket_bytes": 1}),
    *(({"fsdp": 2}, {"zero_stage": stage, "num_microbatches": 2}) for stage in (1, 2, 3)),
    ({"fsdp": 4}, {"zero_stage": 3}),
    *(({"dp": 2, "fsdp": 2}, {"zero_stage": stage, "num_microbatches": 2}) for stage in (1, 2, 3)),
]
MODELS = {
    "llama": (llama(attention_dropout=0.2), tokens(), {}),
    "llama_tied": (llama(tie_word_embeddings=True), tokens(), {}),
    "gpt2": (gpt2(), tokens(), {}),
    "regressor": (regressor(), pairs(), {}),
    "regressor_unused": (regressor(unused=True), pairs(), {}),
    "regressor_samples": (regressor(), pairs(), {"loss": "sample_mean"}),
}


def test_shards_that_rest_in_the_host_s_memory_equal_the_plain_run() -> None:
    report = mw.verify(regressor(), pairs(), mw.Mesh(fsdp=2), num_microbatches=2, offload="cpu")
    assert report.ok, str(report)


@pytest.mark.parametrize(("name", "layout"), tiered(product(MODELS, LAYOUTS)), ids=str)
def test_a_parallel_step_is_the_plain_step(name: str, layout: tuple[dict[str, int], dict[str, Any]]) -> None:
    degrees, options = layout
    build_model, build_batch, extra = MODELS[name]
    report = mw.verify(build_model, build_batch, mw.Mesh(**degrees), **{**options, **extra})
    assert report.ok, str(report)
    assert report.notes == ()


def _double_one_gradient(model: ParallelModel) -> None:
    dict(model.module.named_parameters())["layers.1.0.weight"].register_hook(lambda gradient: gradient * 2)


def _drop_reduction(model: ParallelModel) -> None:
    data = model._engine.data
    assert isinstance(data, Replicate)

    data._groups = SimpleNamespace(device_type="cpu", all_reduce=lambda *args: Pending(None))  # type: ignore[assignment]


def _swap_data(model: ParallelModel) -> None:
    engine, forwards = model._engine, model._engine._forwards

    def swapped(part: Any, **which: int) -> Any:
        other = share(pairs()(), 1 - model.data_rank, 2)
        return forwards.now(tuple(tensor.double() for tensor in other), **which)

    engine._forwards = SimpleNamespace(now=swapped)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("plant", "note", "worst"),
    [
        (_double_one_gradient, "gradient of layers.1.0.weight is 2 x the plain one", "layers.1.0.weight"),
        (_drop_reduction, "of data rank 0 alone: a reduction is missing", None),
        (_swap_data, "data rank 0 worked on the samples of data rank 1", None),
    ],
)
def test_a_planted_fault_is_found_and_named(plant: Any, note: str, worst: str | None) -> None:
    report = mw.verify(regressor(dropout=0.0), pairs(), mw.Mesh(dp=2), prepare=plant)
    assert not report.ok
    assert any(note in each for each in report.notes), report.notes
    assert worst in (None, report.worst_parameter)


def test_ranks_that_drift_apart_are_named() -> None:
    report = mw.verify(regressor(), pairs(), mw.Mesh(dp=2), prepare=_drop_reduction)
    assert any("rank 1 holds other weights than rank 0 after the step" in note for note in report.notes)


def test_what_cannot_be_had_is_refused_before_a_rank_starts() -> None:
    with pytest.raises(WrapError, match="nearest legal layout: dp=2"):
        mw.verify(regressor(), pairs(), mw.Mesh(tp=2))
    with pytest.raises(WrapError, match="did you mean 'zero_stage'"):
        mw.verify(regressor(), pairs(), mw.Mesh(fsdp=2), zero_stages=2)  # type: ignore[call-arg]


def test_a_model_whose_loss_is_unknown_says_so_in_its_own_words() -> None:
    with pytest.raises(LossError, match="the model returned no loss"):
        mw.verify(lambda: nn.Linear(6, 2), lambda: pairs()()[0], mw.Mesh(dp=2))
