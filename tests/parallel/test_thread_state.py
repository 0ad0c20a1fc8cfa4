"""What torch keeps for a thread while passes stop, skip and fail, and what is left of a step that does."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.errors import BatchError, RankError, WrapError
from meshwright.parallel.ranks import RankPool
from meshwright.parallel.thread_state import ThreadState
from meshwright.testing import run_ranks
from tests.parallel.test_layered import odd_batch

_1F1B: dict[str, Any] = {"schedule": "1f1b", "num_microbatches": 2}


class _Row(nn.Module):
    """Four blocks one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(7, 8))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 7)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(self.through(self.table[ids]))
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())

    def through(self, stream: Tensor) -> Tensor:
        for layer in self.layers:
            stream = layer(stream)
        return stream


class _WithoutHistory(_Row):
    """The block behind a border runs under `no_grad`, and what it takes goes on beside it."""

    def through(self, stream: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            with torch.set_grad_enabled(number not in (1, 2)):
                made = layer(stream)
            stream = stream + made
        return stream


class _SwitchesOff(nn.Sequential):
    def forward(self, stream: Tensor) -> Tensor:
        torch.set_grad_enabled(not torch.is_grad_enabled())
        return super().forward(stream)  # type: ignore[no-any-return]


class _Left(_Row):
    """One block switches gradients off, another one on again."""

    def __init__(self) -> None:
        super().__init__()
        for number in (1, 2):
            self.layers[number] = _SwitchesOff(*self.layers[number])  # type: ignore[misc]


class _OffAtTheEnd(_Row):
    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        loss = super().forward(ids, labels)
        torch.set_grad_enabled(False)
        return loss


class _AsksForGradients(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, stream: Tensor) -> Tensor:
        energy = super().forward(stream).tanh().square().sum()
        return stream + torch.autograd.grad(energy, stream, create_graph=True)[0]


class _Forces(_Row):
    """Blocks that give gradients of what they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_AsksForGradients() for _ in range(4))


class _OneBlock(_Row):
    """The same module at two places of the list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = self.layers[0]


def _equal(build_model: Any, degrees: dict[str, int], **options: Any) -> None:
    report = mw.verify(build_model, odd_batch, mw.Mesh(**degrees), **options)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


def test_what_differs_between_two_states_has_names() -> None:
    before = ThreadState(random=False)
    assert before.differs(ThreadState(random=False)) == ""
    with torch.no_grad(), torch.autocast("cpu"):
        assert before.differs(ThreadState(random=False)) == "gradient mode and autocast"
    with torch.autograd.graph.save_on_cpu(), torch.device("meta"):
        assert before.differs(ThreadState(random=False)) == "function modes and hooks on saved tensors"
        assert ThreadState(random=False).differs(ThreadState(random=False)) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "schedule"), [({"pp": 2}, "1f1b"), ({"pp": 2}, "interleaved"), ({"pp": 4}, "zb-h1")]
)
def test_what_a_block_takes_without_history_has_one_beside_it(degrees: dict[str, int], schedule: str) -> None:
    _equal(_WithoutHistory, degrees, schedule=schedule, num_microbatches=4)


@pytest.mark.slow
def test_a_block_that_leaves_the_thread_otherwise_is_refused_where_ranks_skip_it() -> None:
    _equal(_Left, {}, schedule="layered", num_microbatches=2)
    with pytest.raises(WrapError, match=r"block layers\.1 leaves another gradient mode.*that end inside the block"):
        _equal(_Left, {"pp": 2}, **_1F1B)


@pytest.mark.slow
def test_a_forward_may_leave_gradients_switched_off() -> None:
    try:
        _equal(_OffAtTheEnd, {"pp": 2}, **_1F1B)
    finally:
        run_ranks(torch.set_grad_enabled, mw.Mesh(dp=2), True)  # the plain run left them so


def _in_turns(mesh: mw.Mesh) -> list[float]:
    model, plain = mw.parallelize(_Row(), mesh, **_1F1B), _Row()
    errors = []
    for casts in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            errors.append(abs(float(model.step(odd_batch())) - float(plain(**odd_batch()))))
    return errors


@pytest.mark.slow
def test_steps_with_and_without_autocast_may_take_turns() -> None:
    for errors in run_ranks(_in_turns, mw.Mesh(pp=2), mw.Mesh(pp=2)):
        assert max(errors) < 1e-6


class _Checkpointed(_Row):
    """Blocks are run again in backward by the model itself."""

    def through(self, stream: Tensor) -> Tensor:
        for layer in self.layers:
            stream = torch.utils.checkpoint.checkpoint(layer, stream, use_reentrant=False)
        return stream


@pytest.mark.slow
def test_hooks_on_saved_tensors_may_be_around_blocks() -> None:
    for schedule in ("1f1b", "zbv"):
        _equal(_Checkpointed, {"pp": 2}, schedule=schedule, num_microbatches=2)


def _refused_and_good(mesh: mw.Mesh) -> tuple[str, float, float]:
    model = mw.parallelize(_Row(), mesh, **_1F1B)
    with pytest.raises(BatchError) as refused:
        model.step({"ids": odd_batch()["ids"]})
    with torch.autograd.graph.save_on_cpu():
        loss = float(model.step(odd_batch()))
    return str(refused.value), loss, float(_Row()(**odd_batch()))


@pytest.mark.slow
def test_a_batch_that_is_refused_before_anything_is_sent_is_followed_by_good_ones() -> None:
    for said, loss, plain in run_ranks(_refused_and_good, mw.Mesh(pp=2), mw.Mesh(pp=2)):
        assert "forward of _Row takes ids, labels" in said
        assert loss == pytest.approx(plain, rel=1e-6)


class _Raises(nn.Sequential):
    def forward(self, stream: Tensor) -> Tensor:
        if bool((stream.detach() > 50).any()):
            raise ArithmeticError("planted")
        return super().forward(stream)  # type: ignore[no-any-return]


class _Failing(_Row):
    """The first block, which rank 0 has, raises for great numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = _Raises(*self.layers[0])  # type: ignore[misc]


def _go_on(mesh: mw.Mesh, path: Path) -> None:
    model = mw.parallelize(_Failing(), mesh, **_1F1B)
    batch = odd_batch()
    model.step(batch)
    with torch.no_grad():
        model.module.table[:] = 99.0  # type: ignore[operator, index]
    for _ in range(2):
        with pytest.raises((ArithmeticError, RankError)) as error:
            model.step(batch)  # rank 1 waits here for what rank 0 does not send
        with path.open("a") as file:
            file.write(f"{error.value}\n")
    os._exit(3)


@pytest.mark.slow
def test_a_pipeline_does_not_go_on_behind_a_step_that_failed(tmp_path: Path) -> None:
    pool = RankPool()
    try:
        with pytest.raises(RankError):
            pool.run(_go_on, 2, (mw.Mesh(pp=2), tmp_path / "said"), timeout_s=60.0)
    finally:
        pool.close()
    failed, refused, *_ = (tmp_path / "said").read_text().splitlines()
    assert failed == "planted"
    assert "a step before ended with ArithmeticError: planted" in refused
    assert "start the ranks again" in refused


def _wrap_hooked(degrees: dict[str, int]) -> str:
    model = _Row()
    next(model.layers[0].parameters()).register_hook(lambda gradient: 3 * gradient)  # type: ignore[attr-defined]
    try:
        mw.parallelize(model, mw.Mesh(**degrees))
    except WrapError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_hooks_of_parameters_that_are_dealt_are_refused() -> None:
    for said in run_ranks(_wrap_hooked, mw.Mesh(fsdp=2), {"fsdp": 2}):
        assert "parameter layers.0.0.weight has hooks on its gradient" in said
    assert run_ranks(_wrap_hooked, mw.Mesh(dp=2), {"dp": 2}) == ["", ""]


@pytest.mark.slow
def test_blocks_may_ask_for_gradients_in_their_forward_unless_they_are_recomputed() -> None:
    for schedule in ("1f1b", "modular", "zbv"):
        _equal(_Forces, {"pp": 2}, schedule=schedule, num_microbatches=2)
    with pytest.raises(WrapError, match=r"block layers\.\d goes back before.*leave it out of recompute="):
        _equal(_Forces, {}, schedule="layered", num_microbatches=2, recompute="blocks")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, "blocks"])
def test_one_module_may_stand_at_several_places(recompute: str | None) -> None:
    _equal(_OneBlock, {}, schedule="layered", num_microbatches=2, recompute=recompute)
    _equal(_OneBlock, {"fsdp": 2}, schedule="layered", num_microbatches=2, recompute=recompute, zero_stage=2)
