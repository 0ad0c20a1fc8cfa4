"""Peak memory of a step is known before it is run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import meshwright as mw
from benchmarks.loops import batch_of, build_llama
from benchmarks.memory import measured_peak_bytes
from meshwright.parallel.errors import WrapError
from meshwright.parallel.fake_rank import first_footprint
from meshwright.parallel.footprint import Footprint, Live
from meshwright.parallel.options import Options
from meshwright.parallel.plan import Plans, make_plans
from meshwright.testing import run_ranks
from tests.parallel.cells import tiered
from tests.parallel.families import FAMILIES


class _Classifier(nn.Module):
    """torch's own encoder, wide enough that tensors and not Python's objects fill the memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.1, batch_first=True)
        self.core = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(256, 8)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        values = input_ids.unsqueeze(-1).remainder(256).eq(torch.arange(256)).float()
        return functional.cross_entropy(self.head(self.core(values)).mean(1), labels[:, 0].remainder(8))


def _llama() -> nn.Module:
    return build_llama(hidden=256, layers=4, vocabulary=1024, intermediate=704)


_MODELS: dict[str, Callable[[], nn.Module]] = {"llama": _llama, "torch encoder": _Classifier}


def _predicted_and_measured(name: str, mesh: mw.Mesh, options: dict[str, Any]) -> tuple[int, int]:
    batch = batch_of(0, samples=4, length=96, vocabulary=1024)
    model = mw.parallelize(_MODELS[name](), mesh, example=batch, predict_memory=True, **options)
    assert model.report.memory is not None, model.report.notes
    return model.report.memory.peak_bytes, measured_peak_bytes(model.module, lambda: model.step(batch))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "degrees", "options"),
    tiered(
        [
            *((name, {}, {}) for name in _MODELS),
            *((name, {"tp": 2}, {"sequence_parallel": True}) for name in _MODELS),
            *((name, {axis: 2}, {}) for name in ("torch encoder", "llama") for axis in ("dp", "tp")),
        ]
    ),
    ids=str,
)
def test_predicted_peak_is_what_the_allocator_hands_out(name: str, degrees: Any, options: Any) -> None:
    mesh = mw.Mesh(**degrees)
    for predicted, measured in run_ranks(_predicted_and_measured, mesh, name, mesh, options):
        assert abs(predicted / measured - 1) < 0.05, (predicted, measured)


def _footprint(family: str, mesh: mw.Mesh, **options: Any) -> Footprint:
    build_model, build_batch = FAMILIES[family]
    model, chosen = build_model(), Options.of(example=build_batch(), **options)
    return first_footprint(model, mesh, chosen, plans=make_plans(model, mesh, chosen))


def test_tensor_parallel_needs_less_and_a_dealt_sequence_less_still() -> None:
    whole = _footprint("llama", mw.Mesh())
    dealt = _footprint("llama", mw.Mesh(tp=2))
    sequence = _footprint("llama", mw.Mesh(tp=2), sequence_parallel=True)
    assert dealt.states_bytes < 0.6 * whole.states_bytes
    assert sequence.peak_bytes < dealt.peak_bytes < whole.peak_bytes


def test_more_micro_batches_of_one_size_keep_gradients_besides() -> None:
    one = _footprint("gpt2", mw.Mesh())
    two = _footprint("gpt2", mw.Mesh(), num_microbatches=2)
    three = _footprint("gpt2", mw.Mesh(), num_microbatches=3)
    assert one.peak_bytes < two.peak_bytes
    assert three.peak_bytes - two.peak_bytes < 64  # one more loss


def test_what_cannot_be_predicted_is_said_in_the_report() -> None:
    build_model, build_batch = FAMILIES["llama"]
    model, options = build_model(), Options.of(example=build_batch())
    with pytest.raises(WrapError, match="deepspeed"):
        first_footprint(model, mw.Mesh(fsdp=2), replace(options, data_engine="deepspeed"), plans=Plans())
    with pytest.raises(WrapError, match="no example"):
        first_footprint(model, mw.Mesh(), replace(options, example=None), plans=Plans())
    report = mw.parallelize(model, mw.Mesh(), predict_memory=True).report
    assert report.memory is None
    assert "peak memory is not predicted: no example was given" in str(report)
    whole = mw.parallelize(build_model(), mw.Mesh(), predict_memory=True, example=build_batch()).report
    assert "memory of one rank (predicted" in str(whole)


def test_storages_count_as_what_they_are_now() -> None:
    with Live() as live:
        held = torch.zeros(100)
        held.untyped_storage().resize_(0)
        assert (live.now_bytes, live.peak_bytes) == (0, 400)
        held.untyped_storage().resize_(800)
        assert (live.now_bytes, live.peak_bytes) == (800, 800)
        del held
        assert live.now_bytes == 0
