"""Sharded states in layered steps: the plain run's gradients, with states gathered and reduced once a pass."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

import meshwright as mw
from meshwright.parallel.collectives import Groups
from meshwright.parallel.deferred import deferred
from meshwright.parallel.errors import WrapError
from meshwright.parallel.ledger import LedgerSummary
from meshwright.parallel.microbatch import share
from meshwright.parallel.promote import Promote
from meshwright.parallel.rotate import Rotate
from meshwright.testing import run_ranks
from tests.parallel.cells import layout_of, tiered
from tests.parallel.families import FAMILIES
from tests.parallel.models import gpt2, llama, tokens
from tests.parallel.test_layered import Skipping, odd_batch

pytestmark = pytest.mark.slow

LAYERS = 3
LAYERED: dict[str, Any] = {"schedule": "layered", "num_microbatches": 2}


@pytest.mark.parametrize(
    ("family", "degrees", "options"),
    [
        *((family, {"fsdp": 2}, {}) for family in FAMILIES),
        *tiered(
            ((family, {"dp": 2, "fsdp": 2}, {}) for family in ("mixtral", "gpt2", "t5", "residual_net")), layout_of
        ),
        *tiered(((family, {"fsdp": 2, "tp": 2}, {}) for family in ("t5", "llama", "gemma3", "whisper")), layout_of),
        *(("translator", {"fsdp": 3}, {"zero_stage": stage}) for stage in (1, 2, 3)),
        *(("llama", {"fsdp": 2}, {"num_buffers": number, "num_microbatches": 3}) for number in (1, 9)),
        ("mixtral", {"dp": 2, "fsdp": 2, "tp": 2}, {}),
    ],
    ids=str,
)
def test_every_family_is_equal_to_the_plain_run(family: str, degrees: Any, options: Any) -> None:
    build_model, build_batch = FAMILIES[family]
    report = mw.verify(build_model, build_batch, mw.Mesh(**degrees), **{**LAYERED, **options})
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


def _gradients(options: dict[str, Any], mesh: mw.Mesh, narrow: bool) -> dict[str, Tensor]:
    dropping = llama(attention_dropout=0.1)()
    if narrow:  # casts of parameters are remembered inside of autocast, and must not be across micro-batches
        dropping.forward = torch.autocast("cpu", dtype=torch.bfloat16)(dropping.forward)
    model = mw.parallelize(dropping, mesh, num_microbatches=4, loss="sample_mean", **options)
    model.step(share(tokens(8)(), model.data_rank, 2))  # weights of one sample in eight are exact wherever they are put
    return {name: each.clone() for name, each in model.full_gradients().items() if each is not None}


@pytest.mark.parametrize(
    ("options", "narrow"),
    [({"zero_stage": 2}, False), ({"zero_stage": 3, "recompute": "blocks"}, False), ({"zero_stage": 3}, True)],
)
def test_gradients_are_those_of_replicas_bit_for_bit_with_dropout(options: dict[str, Any], narrow: bool) -> None:
    plain = run_ranks(_gradients, mw.Mesh(dp=2), {}, mw.Mesh(dp=2), narrow)[0]
    layered = {"schedule": "layered", **options}
    for found in run_ranks(_gradients, mw.Mesh(fsdp=2), layered, mw.Mesh(fsdp=2), narrow):
        assert found.keys() == plain.keys()
        assert [name for name in plain if not torch.equal(found[name], plain[name])] == []


def _counted(mesh: mw.Mesh, build_model: Any, options: dict[str, Any]) -> tuple[str, LedgerSummary]:
    model = mw.parallelize(build_model(), mesh, **options)
    batch = share(tokens(12)(), model.data_rank, mesh.data_degree)
    model.step(batch)
    _, counted = model.ledger_step(batch)
    return str(model.report.collectives), counted


def _mixed() -> nn.Module:
    torch.manual_seed(0)
    model = gpt2()()
    for block in model.transformer.h:  # an odd number of narrow elements before wide ones
        block.register_parameter("scale", nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))
        block.register_parameter("shift", nn.Parameter(torch.ones(5, dtype=torch.float64), requires_grad=False))
    return model


_COUNTED = {"llama": llama(), "mixed dtypes": _mixed}
_CASES = tuple(product(({"fsdp": 2}, {"dp": 2, "fsdp": 2}, {"fsdp": 3}), ({"zero_stage": 2}, {"num_buffers": 1}, {})))


@pytest.mark.parametrize(("name", "case"), tiered(product(_COUNTED, _CASES)), ids=str)
def test_the_report_predicts_what_the_ledger_counts(name: str, case: tuple[dict[str, int], Any]) -> None:
    build_model, (degrees, options) = _COUNTED[name], case
    mesh = mw.Mesh(**degrees)
    for predicted, counted in run_ranks(_counted, mesh, mesh, build_model, {**LAYERED, **options}):
        assert str(counted) == predicted


@pytest.mark.parametrize("num_microbatches", [2, 6])
@pytest.mark.parametrize("num_buffers", [1, 2, 3])
def test_blocks_are_gathered_2l_minus_b_times_and_reduced_l_times(num_microbatches: int, num_buffers: int) -> None:
    options = {"schedule": "layered", "num_microbatches": num_microbatches, "num_buffers": num_buffers}
    for _, counted in run_ranks(_counted, mw.Mesh(fsdp=2), mw.Mesh(fsdp=2), llama(), options):
        assert counted.count("all_gather") == 2 * LAYERS - num_buffers + 1  # and the rest of the model, once
        assert counted.count("reduce_scatter") == LAYERS + 1


@pytest.mark.parametrize("degrees", [{"fsdp": 2}, {"dp": 2, "fsdp": 2}], ids=str)
def test_groups_of_micro_batches_are_gathered_and_reduced_once_each(degrees: dict[str, int]) -> None:
    options = {"schedule": "layered", "num_microbatches": 3, "group_size": 2, "num_buffers": 1}
    mesh = mw.Mesh(**degrees)
    for predicted, counted in run_ranks(_counted, mesh, mesh, llama(), options):
        assert str(counted) == predicted
        assert counted.count("all_gather") == 2 * 2 * (LAYERS - 1) + 1 + 1  # and the rest of the model, once
        assert counted.count("reduce_scatter") == 2 * LAYERS + 1


def test_a_step_sends_fewer_bytes_by_the_number_of_micro_batches() -> None:
    mesh = mw.Mesh(fsdp=2)

    def sent(options: dict[str, Any]) -> Any:
        return run_ranks(_counted, mesh, mesh, llama(), options)[0][1].sent_bytes("reduce_scatter")

    plain, layered = (sent({"schedule": name, "num_microbatches": 6}) for name in ("accumulate", "layered"))
    assert plain == 6 * layered


def _most_whole(num_buffers: int) -> tuple[int, int, list[bool]]:
    model = mw.parallelize(llama()(), mw.Mesh(fsdp=2), num_buffers=num_buffers, **LAYERED)
    data = model._engine.data
    assert isinstance(data, Rotate)
    seen: list[int] = []
    for layer in model.module.model.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(lambda *_: seen.append(data.num_whole))
        layer.register_full_backward_pre_hook(lambda *_: seen.append(data.num_whole))
    model.step(share(tokens(8)(), model.data_rank, 2))
    held = [each.to_local().untyped_storage().nbytes() > 0 for each in model.parameters()]  # type: ignore[attr-defined]
    return max(seen), data.num_whole, held


@pytest.mark.parametrize("num_buffers", [1, 2])
def test_no_more_blocks_are_whole_than_there_are_buffers(num_buffers: int) -> None:
    for most, after, held in run_ranks(_most_whole, mw.Mesh(fsdp=2), num_buffers):
        assert most == num_buffers
        assert after == 0
        assert all(held)


def _events(num_buffers: int) -> list[str]:
    model = mw.parallelize(llama()(), mw.Mesh(fsdp=2), num_buffers=num_buffers, **LAYERED)
    seen: list[str] = []
    for number, layer in enumerate(model.module.model.layers):  # type: ignore[union-attr, arg-type]
        layer.register_full_backward_pre_hook(lambda *_, number=number: seen.append(f"B{number}"))
    before = Groups.reduce_scatter

    def noting(self: Groups, *args: Any) -> Any:
        pending = before(self, *args)
        seen.append("sent")
        wait = pending.wait
        pending.wait = lambda: (seen.append("waited"), wait())  # type: ignore[method-assign, assignment, func-returns-value]
        return pending

    Groups.reduce_scatter = noting  # type: ignore[method-assign]
    try:
        model.step(share(tokens(8)(), model.data_rank, 2))
    finally:
        Groups.reduce_scatter = before  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    ("num_buffers", "order"),
    [
        (1, "B2 B2 sent B1 B1 waited sent B0 B0 waited sent waited sent waited"),
        (2, "B2 B2 sent B1 B1 sent B0 B0 waited sent waited sent waited waited"),
    ],
)
def test_the_gradients_of_a_block_travel_while_those_before_it_go_back(num_buffers: int, order: str) -> None:
    assert run_ranks(_events, mw.Mesh(fsdp=2), num_buffers)[0] == order.split()


def goes_on(folder: str, mesh: mw.Mesh, options: dict[str, Any], save: bool) -> float:
    with Promote():
        quiet = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = mw.parallelize(quiet().double(), mesh, **options)
        optimizer = model.make_optimizer(lambda each: torch.optim.AdamW(each, lr=1e-2))
        batch = share(tokens(8)(), model.data_rank, mesh.data_degree)

        def step() -> float:
            loss = model.step(batch)
            norm = model.clip_gradients(1.0)
            optimizer.step()
            return float(loss + norm)

        state = model.state_dict(loading=True)
        if save:
            step()
            state_dict_saver.save(model.state_dict(), checkpoint_id=folder)
        else:
            state_dict_loader.load(state, checkpoint_id=folder)
            model.load_state_dict(state)
        evaluated = model.evaluate(batch)
        return step() + step() + float(evaluated[0] / evaluated[1])


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_with_any_schedule_and_mesh(tmp_path: Path) -> None:
    fsdp = mw.Mesh(fsdp=3)
    expected = run_ranks(goes_on, fsdp, str(tmp_path), fsdp, LAYERED, True)[0]
    for mesh, options in ((mw.Mesh(fsdp=2), LAYERED), (mw.Mesh(fsdp=2), {}), (mw.Mesh(dp=2, fsdp=2), LAYERED)):
        found = run_ranks(goes_on, mesh, str(tmp_path), mesh, options, False)[0]
        assert found == pytest.approx(expected, rel=1e-12)


def _deferred_and_not() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    def weights(model: nn.Module) -> dict[str, Tensor]:
        return mw.parallelize(model, mw.Mesh(fsdp=2), **LAYERED).full_parameters()

    return weights(deferred(gpt2(), seed=3)), weights(mw.materialise(deferred(gpt2(), seed=3)))


def test_deferred_models_get_the_same_weights() -> None:
    for found, expected in run_ranks(_deferred_and_not, mw.Mesh(fsdp=2)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class _Convolving(nn.Module):
    """Weights that do not lie row by row, and parameters without elements."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Tanh()) for _ in range(3))
        self.empty, self.narrow = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(3, 0))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            images = block(images)
        return nn.functional.cross_entropy(images.mean((2, 3)), labels)


def _images() -> dict[str, Tensor]:
    images = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    return {"images": images, "labels": torch.arange(5)}


@pytest.mark.parametrize("fsdp", [2, 4])
def test_weights_in_any_memory_format_and_without_elements(fsdp: int) -> None:
    report = mw.verify(_Convolving, _images, mw.Mesh(fsdp=fsdp), schedule="layered", num_microbatches=1)
    assert report.ok, report


def test_a_block_called_again_is_legal_while_it_is_whole_and_refused_when_it_is_not() -> None:
    options = {**LAYERED, "zero_stage": 2}
    report = mw.verify(Skipping, odd_batch, mw.Mesh(fsdp=2), **options)
    assert report.ok, report
    with pytest.raises(Exception, match=r"block layers\.1 is called again in stage 2.*zero_stage=2"):
        mw.verify(Skipping, odd_batch, mw.Mesh(fsdp=2), **LAYERED)


def _misused() -> tuple[str, str, bool, bool]:
    model = mw.parallelize(llama()(), mw.Mesh(fsdp=2), **LAYERED)
    batch = share(tokens(8)(), model.data_rank, 2)
    messages = []
    for call in (partial(model.module, **batch), partial(model.step, {**batch, "input_ids": batch["input_ids"] + 999})):
        with pytest.raises((WrapError, IndexError)) as caught:
            call()
        messages.append(str(caught.value))
    with torch.no_grad():
        logits = model.module(**batch).logits
    return messages[0], messages[1], bool(logits.isfinite().all()), bool(model.step(batch).isfinite())


def test_calls_outside_of_steps_are_evaluation_and_errors_leave_a_model_that_works() -> None:
    for refused, failed, evaluated, stepped in run_ranks(_misused, mw.Mesh(fsdp=2)):
        assert "step() only" in refused
        assert "index out of range" in failed
        assert evaluated
        assert stepped


def test_a_single_number_has_no_rows() -> None:
    with pytest.raises(Exception, match=r"parameter 2 is a single number.*shape \(1,\)"):
        run_ranks(_scalar, mw.Mesh(fsdp=2))


def _scalar() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_parameter("2", nn.Parameter(torch.ones(())))
    mw.parallelize(model, mw.Mesh(fsdp=2), **LAYERED)
