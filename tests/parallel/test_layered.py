"""Layer-major micro-batches give the plain run's gradients on models nobody wrote for it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import meshwright as mw
from meshwright.parallel.errors import WrapError
from meshwright.parallel.loss import LossItems
from meshwright.parallel.microbatch import share, split
from meshwright.parallel.options import Options
from meshwright.testing import run_ranks
from tests.parallel.families import FAMILIES

_TIED = ("gpt2", "gemma3", "bert", "t5", "whisper", "modernbert")


def _gradients(family: str, schedule: str) -> dict[str, Tensor]:
    build_model, build_batch = FAMILIES[family]
    batch = share(build_batch(), 0, 2)  # five samples
    batch = split(batch, 5)[:4]
    # weights of 1/4 for each of four samples: powers of two are exact wherever they are multiplied
    model = mw.parallelize(build_model(), mw.Mesh(), schedule=schedule, num_microbatches=4, loss="sample_mean")
    model.step(batch)
    return {name: each.clone() for name, each in model.full_gradients().items() if each is not None}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in _TIED])
def test_gradients_are_those_of_plain_accumulation_bit_for_bit(family: str) -> None:
    layered, plain = (_gradients(family, schedule) for schedule in ("layered", "accumulate"))
    assert layered.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(layered[name], plain[name])] == []


_DATA_FAMILIES = ("gpt2", "mixtral", "t5", "translator", "residual_net")  # tied, side channels, two streams, no rows


@pytest.mark.parametrize(
    ("family", "degrees"),
    [*((each, {}) for each in FAMILIES), *((each, {"dp": 2}) for each in _DATA_FAMILIES)],
    ids=str,
)
def test_every_family_is_equal_to_the_plain_run(family: str, degrees: dict[str, int]) -> None:
    build_model, build_batch = FAMILIES[family]
    mesh = mw.Mesh(**degrees)
    report = mw.verify(build_model, build_batch, mesh, schedule="layered", num_microbatches=2)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bert", "t5"])
def test_tensor_parallel_blocks_are_equal_to_the_plain_run(family: str) -> None:
    build_model, build_batch = FAMILIES[family]
    example = build_batch()
    report = mw.verify(build_model, build_batch, mw.Mesh(tp=2), schedule="layered", num_microbatches=2, example=example)
    assert report.ok, report


def _order(mesh: mw.Mesh) -> list[str]:
    build_model, build_batch = FAMILIES["llama"]
    plain = build_model()
    seen: list[str] = []
    for number, layer in enumerate(plain.model.layers):  # type: ignore[union-attr, arg-type]
        layer.register_forward_hook(lambda *_, number=number: seen.append(f"F{number}"))
        layer.register_full_backward_pre_hook(lambda *_, number=number: seen.append(f"B{number}"))
    mw.parallelize(plain, mesh, schedule="layered", num_microbatches=2).step(build_batch())
    return seen


def test_all_micro_batches_go_through_a_block_before_the_next() -> None:
    assert _order(mw.Mesh()) == ["F0", "F0", "F1", "F1", "B1", "B1", "B0", "B0"]


def _launches(mesh: mw.Mesh) -> list[str]:
    from meshwright.parallel.collectives import Groups

    build_model, build_batch = FAMILIES["llama"]
    model = mw.parallelize(build_model(), mesh, schedule="layered", num_microbatches=2, bucket_bytes=1 << 12)
    seen: list[str] = []
    for layer in model.module.model.layers:  # type: ignore[union-attr]
        layer.register_full_backward_pre_hook(lambda *_: seen.append("B"))
    before = Groups.all_reduce

    def noting(self: Groups, tensor: Tensor, *axes: str) -> Any:
        seen.append("reduce" if axes == ("dp",) else "sums")
        return before(self, tensor, *axes)

    Groups.all_reduce = noting  # type: ignore[method-assign]
    try:
        model.step(build_batch())
    finally:
        Groups.all_reduce = before  # type: ignore[method-assign]
    return seen


def test_gradients_of_a_block_leave_before_the_block_before_it_goes_back() -> None:
    seen = run_ranks(_launches, mw.Mesh(dp=2), mw.Mesh(dp=2))[0]
    first, *_, last = [place for place, each in enumerate(seen) if each == "B"]
    assert seen.count("B") == 4
    assert "reduce" in seen[first + 1 : last]


class Skipping(nn.Module):
    """A skip over all blocks, a block called twice, a value collected on the side, a change in place, odd outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(7, 8))
        self.layers = nn.ModuleList(_Odd() for _ in range(3))
        self.head = nn.Linear(8, 7)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = start = self.table[ids]
        side: list[Tensor] = []
        for layer in (*self.layers, self.layers[1]):
            stream, extra = layer(stream, collected=side)["out"], side[-1]
            stream = stream + 0.1 * extra.mean()
        scores = self.head(stream + start.tanh())
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()) + 0 * torch.stack(side).sum()


class TiedSkip(Skipping):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.table


class TwoSkips(Skipping):
    """Two values pass the blocks by, one made from the other, without an operation that would notice a second visit."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        start = self.table[ids]
        stream = shifted = start + 1
        for layer in self.layers:
            stream = layer(stream.clone(), collected=[])["out"]
        return nn.functional.cross_entropy(self.head(stream + shifted + 2 * start).flatten(0, 1), labels.flatten())


class Recomputing(Skipping):
    """Blocks with dropout, recomputed in backward or not."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()) for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            stream = stream + (checkpoint(layer, stream, use_reentrant=False) if self.recompute else layer(stream))
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Recomputed(Skipping):
    """Blocks are called inside hooks on saved tensors, and called again during backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table[ids]
        for layer in self.layers:
            dropped = nn.functional.dropout(stream, 0.3)
            stream = stream + checkpoint(layer, dropped.tanh(), use_reentrant=False)
        return nn.functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(8, 8)

    def forward(self, stream: Tensor, *, collected: list[Tensor]) -> dict[str, Any]:
        hidden = self.matrix(stream.clone()).tanh()
        collected.append(hidden.square().mean(-1))
        stream += hidden  # in place, as some models do
        return {"out": stream, "none": None, "name": "odd"}


def odd_batch() -> dict[str, Tensor]:
    ids = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(1))
    return {"ids": ids, "labels": ids}


@pytest.mark.parametrize("build_model", [Skipping, _Recomputed, TiedSkip, TwoSkips])
@pytest.mark.parametrize("degrees", [{}, {"dp": 2}], ids=str)
def test_skips_side_channels_repeats_changes_in_place_and_recomputing_are_equal_to_the_plain_run(
    build_model: Any, degrees: Any
) -> None:
    report = mw.verify(build_model, odd_batch, mw.Mesh(**degrees), schedule="layered", num_microbatches=2)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-12


@pytest.mark.parametrize("schedule", ["accumulate", "layered"])
def test_recomputed_blocks_draw_what_they_drew_before(schedule: str) -> None:
    found = []
    for recompute in (False, True):
        model = mw.parallelize(Recomputing(recompute), mw.Mesh(), schedule=schedule, num_microbatches=2)
        model.step(odd_batch())
        found.append(model.full_gradients())
    for name, expected in found[0].items():
        assert expected is not None
        assert torch.equal(found[1][name], expected), name


def test_a_model_without_blocks_and_axes_it_does_not_take_are_refused() -> None:
    with pytest.raises(WrapError, match="no list of repeated blocks"):
        mw.parallelize(nn.Linear(2, 2), mw.Mesh(), schedule="layered")
    for options, mesh in (
        ({"offload": "cpu"}, mw.Mesh(fsdp=2)),
        ({"data_engine": "deepspeed"}, mw.Mesh(dp=2)),
    ):
        with pytest.raises(WrapError, match="nearest legal: schedule='accumulate'"):
            Options.of(schedule="layered", **options).check(mesh)
    with pytest.raises(WrapError, match="layerd"):
        Options.of(schedule="layerd")


def test_an_error_in_one_micro_batch_leaves_the_model_as_it_was() -> None:
    build_model, build_batch = FAMILIES["llama"]
    model = mw.parallelize(build_model(), mw.Mesh(), schedule="layered", num_microbatches=2)
    batch = build_batch()
    kinds = [type(each) for each in model.module.modules()]
    with pytest.raises(IndexError):
        model.step({**batch, "input_ids": batch["input_ids"] + 10**6})
    assert [type(each) for each in model.module.modules()] == kinds
    assert torch.is_grad_enabled()
    assert model.step(batch).isfinite()


class _Failing(Skipping):
    """Fails in the last block of the second micro-batch, while the first one waits in the middle of its pass."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(ids, labels)
        if int(ids[0, 0]) == 3:
            raise ArithmeticError("planted")
        return loss


def test_an_error_while_other_passes_wait_leaves_modes_and_generators_as_they_were() -> None:
    batch = odd_batch()
    ids = batch["ids"].clone()
    ids[:, 0] = torch.tensor([0, 0, 3, 0])
    model = mw.parallelize(_Failing(), mw.Mesh(), schedule="layered", num_microbatches=4)
    before = torch.get_rng_state()
    with LossItems() as counted, pytest.raises(ArithmeticError, match="planted"):
        model.step({"ids": ids, "labels": batch["labels"]})
    assert torch.equal(torch.get_rng_state(), before)
    assert counted is not None
    assert torch._C._len_torch_function_stack() == 0


def test_collectives_and_memory_are_predicted_as_for_plain_accumulation() -> None:
    for predicted, counted in run_ranks(_predicted, mw.Mesh(dp=2), mw.Mesh(dp=2)):
        assert predicted == counted


def _predicted(mesh: mw.Mesh) -> tuple[str, str]:
    build_model, build_batch = FAMILIES["llama"]
    batch = build_batch()
    model = mw.parallelize(
        build_model(), mesh, schedule="layered", num_microbatches=2, example=batch, predict_memory=True
    )
    assert model.report.memory is not None, model.report.notes
    model.step(batch)
    _, counted = model.ledger_step(batch)
    return str(model.report.collectives), str(counted)
