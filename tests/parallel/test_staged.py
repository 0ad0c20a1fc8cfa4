"""Pipelines over ranks: the plain run's gradients and states, for every schedule and beside every other axis."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

import meshwright as mw
from meshwright.parallel.errors import ScheduleError, WrapError
from meshwright.parallel.microbatch import share
from meshwright.parallel.promote import Promote
from meshwright.testing import run_ranks
from tests.parallel.families import FAMILIES
from tests.parallel.models import gpt2, llama, tokens
from tests.parallel.test_layered import Skipping, odd_batch

pytestmark = pytest.mark.slow

SCHEDULES = ("gpipe", "1f1b", "interleaved", "modular")


def _equal(build_model: Any, build_batch: Any, degrees: dict[str, int], **options: Any) -> None:
    report = mw.verify(build_model, build_batch, mw.Mesh(**degrees), **{"num_microbatches": 2, **options})
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_two_stages_is_equal_to_the_plain_run(family: str) -> None:
    _equal(*FAMILIES[family], {"pp": 2}, schedule="modular")


@pytest.mark.parametrize(
    ("family", "degrees", "schedule"),
    [
        *(
            (family, {"pp": 2, axis: 2}, "modular")
            for family in ("gpt2", "t5", "mixtral")
            for axis in ("dp", "fsdp", "tp")
        ),
        *(("whisper", {"pp": 2, axis: 2}, "1f1b") for axis in ("dp", "fsdp", "tp")),
        ("vit", {"pp": 2, "fsdp": 2}, "gpipe"),
        ("llama", {"pp": 2, "fsdp": 2, "tp": 2}, "modular"),
        ("gemma3", {"pp": 2, "dp": 2, "fsdp": 2}, "1f1b"),
    ],
    ids=str,
)
def test_stages_meet_every_other_axis(family: str, degrees: dict[str, int], schedule: str) -> None:
    _equal(*FAMILIES[family], degrees, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_layers", "num_ranks", "num_microbatches"), [(8, 4, 4), (9, 4, 6), (5, 2, 1), (8, 4, 3)])
def test_any_number_of_blocks_ranks_and_micro_batches(
    schedule: str, num_layers: int, num_ranks: int, num_microbatches: int
) -> None:
    build = llama(num_hidden_layers=num_layers, attention_dropout=0.1)
    _equal(build, tokens(8), {"pp": num_ranks}, schedule=schedule, num_microbatches=num_microbatches)


@pytest.mark.parametrize("stage", [1, 2])
def test_states_may_stay_whole_for_the_step(stage: int) -> None:
    _equal(*FAMILIES["t5"], {"pp": 2, "fsdp": 2}, schedule="modular", zero_stage=stage)


def _frozen() -> nn.Module:
    model = gpt2()()
    model.transformer.wte.weight.requires_grad_(False)  # tied with the head
    model.transformer.h[0].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model


@pytest.mark.parametrize("degrees", [{"pp": 2}, {"pp": 2, "fsdp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_frozen_and_unused_parameters_are_as_in_the_plain_run(degrees: dict[str, int]) -> None:
    _equal(_frozen, tokens(8), degrees, schedule="modular")


def _goes_on(folder: str, mesh: mw.Mesh, options: dict[str, Any], save: bool) -> float:
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
        loss_sum, items = model.evaluate(batch)
        return step() + step() + float(loss_sum / items)


_MODULAR = {"schedule": "modular", "num_microbatches": 2}


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_with_other_stages_and_without(tmp_path: Path) -> None:
    first = mw.Mesh(pp=2)
    expected = run_ranks(_goes_on, first, str(tmp_path), first, _MODULAR, True)[0]
    for mesh, options in (
        (mw.Mesh(pp=2), {**_MODULAR, "schedule": "1f1b"}),
        (mw.Mesh(pp=2, fsdp=2), _MODULAR),
        (mw.Mesh(dp=2), {}),
        (mw.Mesh(pp=2, tp=2), _MODULAR),
    ):
        for found in run_ranks(_goes_on, mesh, str(tmp_path), mesh, options, False):
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


class _Collecting(Skipping):
    """Adds up values that blocks put on a list, which other ranks' blocks do not."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        side: list[Tensor] = []
        for layer in self.layers:
            stream = layer(stream, collected=side)["out"]
        scores = self.head(stream)
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()) + torch.stack(side).sum()


class _SkippingPast(Skipping):
    """What the last rank adds at the end was made from what another rank's block gave."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream, kept = self.table[ids], []
        for layer in self.layers:
            stream = layer(stream, collected=[])["out"]
            kept.append(stream.clone().sin())
        scores = self.head(stream + kept[1])
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())


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


class _Repeating(Skipping):
    """Goes through its blocks twice."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in (*self.layers, *self.layers):
            stream = layer(stream, collected=[])["out"]
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Deciding(Skipping):
    """Asks between blocks for a value that another rank holds."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream = layer(stream, collected=[])["out"]
            if bool(stream.isnan().any()):
                raise ValueError("not a number")
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("build_model", "why"),
    [
        (_SkippingPast, "another rank of the pipeline holds"),
        (_Deciding, "asks for a value"),
        (Skipping, "leaves values outside of what it gives"),
        (_Repeating, "a pipeline takes models that call their blocks in order"),
        (_Collecting, "leaves values outside of what it gives"),
    ],
)
def test_values_that_pass_blocks_by_are_refused_and_not_lost(build_model: Any, why: str) -> None:
    with pytest.raises(Exception, match=why):
        mw.verify(build_model, odd_batch, mw.Mesh(pp=2), **_MODULAR)


def test_more_ranks_than_blocks_and_models_without_blocks_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"3 blocks cannot make 4 stages.*nearest legal: pp=3"):
        mw.verify(llama(), tokens(8), mw.Mesh(pp=4), **_MODULAR)
    with pytest.raises(WrapError, match="no list of repeated blocks; use schedule='accumulate'"):
        mw.parallelize(nn.Linear(2, 2), mw.Mesh(), schedule="layered")
    with pytest.raises(
        WrapError, match="schedule='accumulate' does not go with pp=2; nearest legal: schedule='modular'"
    ):
        mw.verify(llama(), tokens(8), mw.Mesh(pp=2))


def _called_as_a_whole() -> tuple[str, bool]:
    model = mw.parallelize(llama()(), mw.Mesh(pp=2), **_MODULAR)
    batch = tokens(8)()
    with pytest.raises(WrapError) as caught, torch.no_grad():
        model.module(**batch)
    return str(caught.value), bool(model.step(batch).isfinite())


def test_a_model_in_stages_cannot_be_called_as_a_whole() -> None:
    for message, stepped in run_ranks(_called_as_a_whole, mw.Mesh(pp=2)):
        assert "of the pipeline, so the model cannot be called as a whole; use step() and evaluate()" in message
        assert stepped


class _HeldByFunction(Skipping):
    """A block keeps what a function of the user's gave, where no operation of torch's is seen to make it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Keeping() for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream = layer(stream)
        scores = self.head(stream)
        kept = sum(layer.kept.mean() for layer in self.layers if layer.kept is not None)  # type: ignore[union-attr]
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()) + kept


class _Keeping(nn.Module):
    kept: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(8, 8)

    def forward(self, stream: Tensor) -> Tensor:
        self.kept = _Square.apply(self.matrix(stream))  # type: ignore[no-untyped-call]
        return stream + self.kept


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


def test_values_of_custom_functions_that_a_block_keeps_are_found() -> None:
    with pytest.raises(Exception, match="leaves values outside of what it gives"):
        mw.verify(_HeldByFunction, odd_batch, mw.Mesh(pp=2), **_MODULAR)


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
