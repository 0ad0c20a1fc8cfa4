"""Pipelines over ranks: the plain run's gradients and states, for every schedule and beside every other axis."""

from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.testing import run_ranks
from tests.parallel.cells import layout_of, tiered
from tests.parallel.families import FAMILIES
from tests.parallel.models import gpt2, llama, tokens
from tests.parallel.schedules_matrix import DEEP, SCHEDULES, layouts
from tests.parallel.test_layered import Recomputing, Skipping, odd_batch
from tests.parallel.test_rotate import goes_on

pytestmark = pytest.mark.slow

_NUMBERS = ((8, 4, 4), (5, 2, 1), (9, 4, 6))
"""Of blocks, ranks and micro-batches; 8, 4 and 3 are those of the matrix."""


def _equal(build_model: Any, build_batch: Any, degrees: dict[str, int], **options: Any) -> None:
    report = mw.verify(build_model, build_batch, mw.Mesh(**degrees), **{"num_microbatches": 2, **options})
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_two_stages_is_equal_to_the_plain_run(family: str) -> None:
    _equal(*FAMILIES[family], {"pp": 2}, schedule="modular")


@pytest.mark.parametrize(
    ("family", "layout"),
    tiered(product(DEEP, layouts()), layout_of),
    ids=lambda each: each if isinstance(each, str) else str(each),
)
def test_every_schedule_beside_every_axis(family: str, layout: tuple[dict[str, int], dict[str, Any]]) -> None:
    degrees, options = layout
    _equal(*DEEP[family], degrees, **options)


def test_two_axes_of_data_meet_stages() -> None:
    _equal(*FAMILIES["gemma3"], {"pp": 2, "dp": 2, "fsdp": 2}, schedule="1f1b")


_SIZES = [{"layers": layers, "pp": ranks, "parts": parts} for layers, ranks, parts in _NUMBERS]


@pytest.mark.parametrize(
    "sizes", tiered({"schedule": schedule, **sizes} for schedule, sizes in product(SCHEDULES, _SIZES)), ids=str
)
def test_any_number_of_blocks_ranks_and_micro_batches(sizes: dict[str, Any]) -> None:
    schedule, num_layers, num_ranks, num_microbatches = sizes.values()
    build = llama(num_hidden_layers=num_layers, attention_dropout=0.1)
    _equal(build, tokens(8), {"pp": num_ranks}, schedule=schedule, num_microbatches=num_microbatches)


@pytest.mark.parametrize("family", ["t5", "translator", pytest.param("whisper", marks=pytest.mark.wide)])
def test_encoder_states_go_on_from_rank_to_rank(family: str) -> None:
    _equal(*FAMILIES[family], {"pp": 4}, schedule="modular")


@pytest.mark.parametrize("stage", [1, 2])
def test_states_may_stay_whole_for_the_step(stage: int) -> None:
    _equal(*FAMILIES["t5"], {"pp": 2, "fsdp": 2}, schedule="modular", zero_stage=stage)


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_that_leave_in_several_parts_are_divided_once_all_losses_are_known(stage: int) -> None:
    build = llama(num_hidden_layers=4)
    _equal(build, tokens(8), {"pp": 2, "fsdp": 2}, schedule="interleaved", num_microbatches=4, zero_stage=stage)


def _frozen() -> nn.Module:
    model = gpt2()()
    model.transformer.wte.weight.requires_grad_(False)  # tied with the head
    model.transformer.h[0].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model


@pytest.mark.parametrize("degrees", [{"pp": 2}, {"pp": 2, "fsdp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_frozen_and_unused_parameters_are_as_in_the_plain_run(degrees: dict[str, int]) -> None:
    _equal(_frozen, tokens(8), degrees, schedule="modular")


_MODULAR = {"schedule": "modular", "num_microbatches": 2}


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_with_other_stages_and_without(tmp_path: Path) -> None:
    first = mw.Mesh(pp=2)
    expected = run_ranks(goes_on, first, str(tmp_path), first, _MODULAR, True)[0]
    for mesh, options in (
        (mw.Mesh(pp=2), {**_MODULAR, "schedule": "1f1b"}),
        (mw.Mesh(pp=2, fsdp=2), _MODULAR),
        (mw.Mesh(dp=2), {}),
        (mw.Mesh(pp=2, tp=2), _MODULAR),
    ):
        for found in run_ranks(goes_on, mesh, str(tmp_path), mesh, options, False):
            assert found == pytest.approx(expected, rel=1e-12), mesh


def _weights(folder: str, mesh: mw.Mesh) -> dict[str, Tensor]:
    model = mw.parallelize(gpt2()(), mesh, **_MODULAR)
    model.save_weights(folder)
    for each in model.parameters():
        each.data.zero_()
    torch.distributed.barrier()
    model.load_weights(folder)
    return model.full_parameters()


def test_weights_are_written_whole_and_read_by_stage(tmp_path: Path) -> None:
    mesh = mw.Mesh(pp=2)
    plain = dict(gpt2()().named_parameters())
    for found in run_ranks(_weights, mesh, str(tmp_path), mesh):
        assert list(found) == list(plain)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def _held() -> tuple[list[str], list[int]]:
    model = mw.parallelize(llama()(), mw.Mesh(pp=2), **_MODULAR)
    whole, other = tokens(8)(), {name: each[:, :7] for name, each in tokens(8)().items()}
    told: list[int] = []
    before = model._engine._groups.tell

    def noting(value: Any, axis: str, source: int) -> Any:
        told.append(source)
        return before(value, axis, source)

    model._engine._groups.tell = noting  # type: ignore[method-assign]
    for batch in (whole, whole, other, whole):
        told.append(-1)
        assert model.step(batch).isfinite()
    steps = [place for place, each in enumerate(told) if each == -1] + [len(told)]
    return [name for name, _ in model.module.named_parameters()], [stop - start - 1 for start, stop in pairwise(steps)]


def test_a_rank_holds_its_own_blocks_and_routes_are_looked_for_once_per_shape() -> None:
    first, second = run_ranks(_held, mw.Mesh(pp=2))
    for (names, told), own in ((first, {"0", "2"}), (second, {"1"})):
        assert {name.split(".")[2] for name in names if ".layers." in name} == own
        assert "model.embed_tokens.weight" in names
        assert told[0] > 0
        assert (told[1], told[3]) == (0, 0)
        assert told[2] == told[0]


def _recomputed(recompute: bool, mesh: mw.Mesh, options: dict[str, Any]) -> dict[str, Tensor]:
    model = mw.parallelize(Recomputing(recompute), mesh, **options)
    model.step(odd_batch())
    return {name: each for name, each in model.full_gradients().items() if each is not None}


@pytest.mark.parametrize("schedule", ["modular", "1f1b"])
def test_recomputed_blocks_draw_what_they_drew_before(schedule: str) -> None:
    plain, staged = mw.Mesh(), mw.Mesh(pp=2)
    expected = _recomputed(False, plain, {"num_microbatches": 2})
    for found in run_ranks(_recomputed, staged, True, staged, {**_MODULAR, "schedule": schedule}):
        for name, each in expected.items():
            torch.testing.assert_close(found[name], each, rtol=1e-5, atol=1e-6)


class _Around(Skipping):
    """The stream goes around blocks, in code between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)) for _ in range(5))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = nn.functional.dropout(self.table[ids], 0.1)
        for layer in self.layers:
            stream = stream + layer(stream) * 0.5
            stream = nn.functional.dropout(stream - stream.mean(-1, keepdim=True), 0.1)
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("degrees", [{"pp": 2}, {"pp": 3}, {"pp": 2, "fsdp": 2}], ids=str)
@pytest.mark.parametrize("schedule", ["modular", "1f1b"])
def test_a_stream_may_go_around_blocks(degrees: dict[str, int], schedule: str) -> None:
    _equal(_Around, odd_batch, degrees, schedule=schedule)


class _KeepingInputs(Skipping):
    """What the last rank adds at the end is what its last block was given, and changed in place."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream, kept = self.table[ids], []
        for layer in self.layers:
            stream = layer(stream, collected=[])["out"]
            kept.append(stream)
        scores = self.head(stream + kept[1].sin())
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())


def test_what_a_block_was_given_is_at_hand_afterwards() -> None:
    _equal(_KeepingInputs, odd_batch, {"pp": 2}, schedule="modular")


class _Leaving(Skipping):
    """Blocks that give what they were given, in micro-batches that begin with an even number or by chance."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Left(chance) for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for number, layer in enumerate(self.layers):
            stream = layer(stream, number == 1 and int(ids[0, 0]) % 2 == 0)
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Left(nn.Linear):
    def __init__(self, chance: float) -> None:
        super().__init__(8, 8)
        self.chance = chance

    def forward(self, stream: Tensor, left: bool) -> Tensor:  # type: ignore[override]
        if left or (self.chance and torch.rand(()) < self.chance):
            return stream
        return super().forward(stream).tanh()


def _second_is_even() -> dict[str, Tensor]:
    ids = odd_batch()["ids"]
    ids[:, 0] = torch.tensor([1, 3, 2, 4])
    return {"ids": ids, "labels": ids}


@pytest.mark.parametrize("schedule", ["1f1b", "modular", "zb-h1"])
def test_a_block_may_give_what_it_was_given_where_it_did_not_before(schedule: str) -> None:
    _equal(partial(_Leaving, 0.0), _second_is_even, {"pp": 3}, schedule=schedule)
    _equal(partial(_Leaving, 0.4), odd_batch, {"pp": 3}, schedule=schedule, num_microbatches=4)


class _LossInside(Skipping):
    """The last block hands on the loss that the one before it made."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream = layer(stream, labels)
        return stream

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_ToLoss(number) for number in range(3))


class _ToLoss(nn.Linear):
    def __init__(self, number: int) -> None:
        super().__init__(8, 8)
        self.number = number

    def forward(self, stream: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        scores = stream if self.number == 2 else super().forward(stream)
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()) if self.number == 1 else scores


def test_the_last_rank_may_hand_on_a_loss_that_it_received() -> None:
    _equal(_LossInside, odd_batch, {"pp": 3}, schedule="1f1b", loss="sum")


class _Reaching(Skipping):
    """Later blocks take what earlier ones gave, one of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_TakingTwo() for _ in range(6))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream, given = self.table[ids], list[Tensor]()
        for number, layer in enumerate(self.layers):
            stream = layer(stream, given[:2] if number in (3, 5) else [])
            given.append(stream)
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _TakingTwo(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, stream: Tensor, others: list[Tensor], beside: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if not stream.is_leaf and others:  # a value that others made looks as it does in the plain run
            stream = stream + others[0].sin() + others[1].cos()
        if beside is not None:
            stream = stream + beside.sin()
        weights = torch.ones(8, dtype=stream.dtype, requires_grad=True)
        weights.register_hook(lambda gradient: gradient)
        return super().forward(stream * weights).tanh()


class _Sided(_Reaching):
    """Two blocks encode, and all that follow take what they gave."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        side, stream = self.table[ids], self.table[labels]
        for layer in self.layers[:2]:
            side = layer(side, [])
        for layer in self.layers[2:]:
            stream = layer(stream, [], side)
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


def test_values_reach_later_blocks_of_the_same_rank() -> None:
    _equal(_Reaching, odd_batch, {"pp": 2}, schedule="modular")
    _equal(_Sided, odd_batch, {"pp": 2}, schedule="zbv")
    _equal(_Sided, odd_batch, {"pp": 3}, schedule="zb-h1")
