"""The collectives a report predicts are the ones a step runs."""

from itertools import product
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.parallel.microbatch import share
from meshwright.parallel.options import Options
from meshwright.parallel.plan import make_plans
from meshwright.parallel.report import describe
from meshwright.testing import run_ranks
from tests.parallel.cells import layout_of, tiered
from tests.parallel.families import FAMILIES
from tests.parallel.models import gpt2, llama, pairs, regressor, tokens

CASES = [
    (degrees, options)
    for degrees in ({"dp": 2}, {"fsdp": 2}, {"dp": 2, "fsdp": 2}, {"fsdp": 3})
    for options in ({"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"bucket_bytes": 1000})
]


def _predicted_and_counted(
    build_model: Any, build_batch: Any, mesh: mw.Mesh, options: dict[str, Any]
) -> tuple[str, str]:
    model = mw.parallelize(build_model(), mesh, num_microbatches=2, **options)
    batch = share(build_batch(), model.data_rank, mesh.data_degree)
    model.step(batch)
    _, counted = model.ledger_step(batch)
    return str(model.report.collectives), str(counted)


_MODELS = {"llama": (llama(), tokens()), "gpt2": (gpt2(), tokens()), "regressor": (regressor(), pairs())}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), tiered(product(_MODELS, CASES)), ids=str)
def test_prediction_is_equal_to_the_ledger(name: str, case: tuple[dict[str, int], Any]) -> None:
    (build_model, build_batch), (degrees, options) = _MODELS[name], case
    mesh = mw.Mesh(**degrees)
    for predicted, counted in run_ranks(_predicted_and_counted, mesh, build_model, build_batch, mesh, options):
        assert counted == predicted


def _tensor_calls(family: str, mesh: mw.Mesh, options: dict[str, Any]) -> tuple[str, str]:
    build_model, build_batch = FAMILIES[family]
    batch = build_batch()  # the same on every data rank: the prediction is for the example's shape
    model = mw.parallelize(build_model(), mesh, example=batch, **options)
    model.step(batch)
    _, counted = model.ledger_step(batch)
    return str(model.report.collectives), str(counted)


_DEALT = [name for name in FAMILIES if name not in ("residual_net", "mixer")]
_SEQUENCE = ("llama", "gpt2", "mixtral", "bert", "t5", "vit")
_TENSOR_CASES = [
    *((family, {"tp": 2}, {}) for family in _DEALT),
    *((family, {"tp": 2}, {"sequence_parallel": True}) for family in _SEQUENCE),
    *tiered(((family, {"fsdp": 2, "tp": 2}, {}) for family in ("t5", "llama", "gemma3")), layout_of),
    *tiered(((family, {"dp": 2, "tp": 2}, {}) for family in ("gpt2", "qwen3", "whisper")), layout_of),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "degrees", "options"), _TENSOR_CASES, ids=str)
def test_collectives_of_tp_are_predicted_for_every_family(family: str, degrees: Any, options: Any) -> None:
    mesh = mw.Mesh(**degrees)
    predicted, counted = run_ranks(_tensor_calls, mesh, family, mesh, options)[0]  # others may hold other heads
    assert counted == predicted


@pytest.mark.parametrize(
    ("options", "reason", "axes"),
    [
        ({"schedule": "layered", "recompute": "blocks"}, "recompute runs those of forward again", ("tp", "cp")),
        ({"blockwise": {"ffn_block": 5}}, "ffn_block runs those of tp for so many positions at a time", ("tp",)),
        ({"blockwise": {"layer_block": 5}}, "layer_block runs those of tp for so many positions", ("tp",)),
        ({"blockwise": {"loss_block": 5}}, "nothing", ()),
    ],
    ids=str,
)
def test_collectives_that_run_more_often_are_not_predicted(options: Any, reason: str, axes: tuple[str, ...]) -> None:
    model, chosen = llama()(), Options.of(**options, example=tokens()())
    for axis in ("tp", "cp", "dp"):
        mesh = mw.Mesh.of({axis: 2})
        report = describe(model, mesh, chosen, make_plans(model, mesh, chosen))
        assert (report.collectives is None) == (axis in axes)
        assert any(f"collectives are not predicted: {reason}" in note for note in report.notes) == (axis in axes)


@pytest.mark.parametrize(("sizes", "said"), [(None, "head and loss too"), ({"loss_block": 4}, "rows of the loss")])
def test_the_report_says_what_runs_whole_on_each_rank_of_cp(sizes: Any, said: str) -> None:
    model, mesh = llama()(), mw.Mesh(cp=2)
    options = Options.of(blockwise=sizes, example=tokens()())
    report = describe(model, mesh, options, make_plans(model, mesh, options))
    assert said in dict(report.axes)["cp"]


def test_zero_three_gathers_grow_with_micro_batches_and_zero_one_does_not() -> None:
    model = llama()()

    def count(stage: int, microbatches: int) -> tuple[int, int]:
        options = Options(zero_stage=stage, num_microbatches=microbatches)
        calls = describe(model, mw.Mesh(fsdp=2), options).collectives
        assert calls is not None
        return calls.count("all_gather"), calls.count("reduce_scatter")

    units = 4  # three blocks and the rest
    assert [count(stage, 3) for stage in (1, 2, 3)] == [
        (units, units),
        (units, 3 * units),
        (3 * (2 * units - 2), 3 * units),
    ]


def test_the_report_says_what_was_tied_and_frozen() -> None:
    model = llama(tie_word_embeddings=True)()
    model.model.norm.weight.requires_grad_(False)
    report = describe(model, mw.Mesh(dp=2, fsdp=2), Options())
    assert "tied, kept as one parameter: model.embed_tokens.weight, lm_head.weight" in report.notes
    assert "frozen, no gradient: 1 parameters, first model.norm.weight" in report.notes
    assert [axis for axis, _ in report.axes] == ["dp", "fsdp"]
    assert report.as_dict()["mesh"] == "dp=2 x fsdp=2"
    assert "collectives of one step" in str(report)


def test_bytes_and_padding_are_said() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 4, dtype=torch.float64))
    report = describe(model, mw.Mesh(fsdp=2), Options())
    assert report.parameters_per_rank == (16 + 4 + 12 + 4) // 2  # 3 rows are padded to 4
    assert report.bytes_per_rank == (20 * 4 + 16 * 8) // 2
    assert "padded along fsdp: 2 parameters by 5 elements, first 0.weight" in report.notes
    assert report.as_dict()["bytes_per_rank"] == report.bytes_per_rank
