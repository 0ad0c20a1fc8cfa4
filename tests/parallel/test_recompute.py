"""Blocks whose insides are made anew: the same bits, with only their inputs kept."""

import gc
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.errors import WrapError
from meshwright.parallel.recompute import Frame
from tests.parallel.families import FAMILIES
from tests.parallel.test_layered import Skipping, odd_batch

_LAYERED: dict[str, Any] = {"schedule": "layered", "num_microbatches": 3, "loss": "sample_mean"}


def _gradients(family: str, **options: Any) -> dict[str, Tensor]:
    build_model, build_batch = FAMILIES[family]
    model = mw.parallelize(build_model(), mw.Mesh(), **{**_LAYERED, **options})
    model.step(build_batch())
    return {name: each for name, each in model.full_gradients().items() if each is not None}


@pytest.mark.parametrize("family", ["llama", "t5", "mixtral", "mixer"])  # dropout, two lists, experts, layouts
@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_those_without_recomputing_bit_for_bit(family: str, offload: bool) -> None:
    plain = _gradients(family)
    again = _gradients(family, recompute="blocks", offload_inputs=offload)
    assert again.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(again[name], plain[name])] == []


@pytest.mark.parametrize(
    ("family", "degrees", "options"),
    [
        ("gpt2", {"fsdp": 2}, {"schedule": "layered", "offload_inputs": True}),
        ("whisper", {"pp": 2}, {"schedule": "1f1b"}),
        ("llama", {"pp": 2, "tp": 2}, {"schedule": "modular", "sequence_parallel": True}),
    ],
    ids=str,
)
@pytest.mark.slow
def test_it_meets_other_axes(family: str, degrees: dict[str, int], options: dict[str, Any]) -> None:
    options = {"num_microbatches": 2, "recompute": "blocks", **options}
    report = mw.verify(*FAMILIES[family], mw.Mesh(**degrees), **options)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


class _Counted(nn.Module):
    """Counts what each of its blocks does, and what lives meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)) for _ in range(4))
        self.runs = [0] * 4
        self.wide: list[Any] = []
        for number, block in enumerate(self.blocks):
            block[1].register_forward_hook(lambda _, __, made, number=number: self._note(number, made))

    def _note(self, number: int, made: Tensor) -> None:
        self.runs[number] += 1
        self.wide.append(ref(made.untyped_storage()))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def _counted(**options: Any) -> tuple[list[int], int]:
    model = mw.parallelize(_Counted(), mw.Mesh(), **{**_LAYERED, **options})
    counted: Any = model.module
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(each() is not None for each in counted.wide))

    for block in counted.blocks:
        block.register_forward_hook(look)
    model.step({"x": torch.randn(6, 8)})
    return counted.runs, most


def test_only_named_blocks_run_twice_and_keep_nothing() -> None:
    assert _counted() == ([3, 3, 3, 3], 12)
    runs, most = _counted(recompute=["blocks.0", "blocks.[23]"])
    assert runs == [6, 3, 6, 6]
    assert most <= 3 + 2  # those of block 1, of the block that runs, and of the one before it as it lets go
    assert _counted(recompute="blocks")[1] <= 2


class _Row(nn.Module):
    """Blocks one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("recompute", [None, "blocks"])
def test_the_input_of_a_block_is_let_go_once_the_block_has_gone_back(recompute: str | None) -> None:
    module, inputs, alive = _Row(), list[Any](), list[int]()
    for block in module.blocks:
        block.register_forward_pre_hook(lambda _, given: inputs.append(ref(given[0].untyped_storage())))
    model = mw.parallelize(module, mw.Mesh(), **{**_LAYERED, "recompute": recompute})
    weight = next(each for name, each in module.named_parameters() if name == "blocks.1.weight")
    weight.register_post_accumulate_grad_hook(
        lambda _: alive.append(len({each()._cdata for each in inputs if each() is not None}))
    )
    model.step({"x": torch.randn(6, 8)})
    assert alive == [4, 3, 2]  # the batch, of which block 0 gets parts, and what block 1 gets of each micro-batch


def test_what_a_model_keeps_of_a_second_run_does_not_hold_what_it_made() -> None:
    cache, made = list[Tensor](), list[Any]()

    def work(value: Tensor) -> Tensor:
        inner = value.exp()
        made.append(ref(inner.untyped_storage()))
        cache.append(inner.sum())
        return inner * inner

    leaf = torch.randn(4, requires_grad=True)
    frame = Frame("square", work, ((leaf,), {}), leaves={id(leaf): leaf})
    output = frame.run()
    frame.recompute()
    output.sum().backward()
    frame.forget()
    assert len(cache) == 2
    assert [each() for each in made] == [None, None]


def test_nothing_holds_a_model_that_is_let_go() -> None:
    build_model, build_batch = FAMILIES["llama"]
    model = build_model()
    wrapped = mw.parallelize(model, mw.Mesh(), schedule="layered", recompute="blocks", blockwise={"ffn_block": 4})
    wrapped.step(build_batch())
    held = ref(model)
    del model, wrapped
    gc.collect()
    assert held() is None


def test_inputs_leave_the_device_and_come_back() -> None:
    leaf = torch.randn(4, 3, requires_grad=True)
    given = leaf.view_as(leaf)
    frame = Frame("product", lambda value: value.sin() * value, ((given,), {}), leaves={id(given): leaf})
    output = frame.run()
    values, storage = leaf.detach().clone(), ref(leaf.untyped_storage())
    del given
    frame.offload()
    assert leaf.shape == (4, 3)
    frame.fetch()
    assert torch.equal(leaf, values)
    frame.recompute()
    (gradient,) = torch.autograd.grad(output.sum(), leaf)
    torch.testing.assert_close(gradient, values.cos() * values + values.sin())
    del output
    assert storage() is None


def test_a_block_that_changes_its_input_or_computes_otherwise_is_refused() -> None:
    model = mw.parallelize(Skipping(), mw.Mesh(), schedule="layered", num_microbatches=2, recompute="blocks")
    with pytest.raises(WrapError, match=r"block layers\.0 changes what it is given in place.*recompute="):
        model.step(odd_batch())
    weight, turns = torch.ones(2, requires_grad=True), [0]

    def unsteady(value: Tensor) -> Tensor:
        turns[0] += 1
        return (value * weight).exp() if turns[0] == 1 else (value * weight).exp().sin()

    frame = Frame("block 7", unsteady, ((torch.ones(2),), {}), leaves={})
    frame.run()
    with pytest.raises(WrapError, match=r"block 7 computed otherwise when it was recomputed \(\d+ tensors"):
        frame.recompute()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": "all"}, r"write 'blocks' for all, or a list: \['all'\]"),
        ({"recompute": True}, "recompute=True is no choice of blocks; write 'blocks' for all"),
        ({"offload_inputs": True}, "name these with recompute='blocks'"),
        ({"recompute": ["layer.0"]}, r"recompute: no block fits 'layer\.0'.*blocks\.0"),
        ({"recompute": "blocks", "schedule": "accumulate"}, "use schedule='layered', or the model's own"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(WrapError, match=message):
        mw.parallelize(_Counted(), mw.Mesh(), **{**_LAYERED, **options})
