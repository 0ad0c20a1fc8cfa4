"""Hooks, and other changes to gradients, that come behind the wrap: called as in the plain run, or refused, or told."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.errors import WrapError
from meshwright.parallel.microbatch import share
from meshwright.testing import run_ranks

pytestmark = pytest.mark.slow

_WIDTH = 8


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        return values + self.narrow(self.wide(values).tanh())


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(_WIDTH, _WIDTH)
        self.layers = nn.ModuleList(_Block() for _ in range(3))
        self.head = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, values: Tensor, labels: Tensor) -> Tensor:
        """Mean over labels."""
        values = self.first(values)
        for layer in self.layers:
            values = layer(values)
        return nn.functional.cross_entropy(self.head(values).transpose(1, 2), labels)


def _build() -> Any:
    torch.manual_seed(0)
    return _Model().double()


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, _WIDTH, (4, 6), generator=generator)
    return {"values": torch.randn(4, 6, _WIDTH, generator=generator).double(), "labels": labels}


def _nothing(*call: Any) -> None:
    del call


def _scaled(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    del module
    return tuple(1.5 * each for each in args)


def _look(model: nn.Module) -> None:
    for layer in model.get_submodule("layers").children():
        for each in layer.modules():
            each.register_full_backward_hook(_nothing)
            each.register_forward_pre_hook(_nothing)


def _scale_inputs(model: nn.Module) -> None:
    for layer in model.get_submodule("layers").children():
        for each in layer.children():
            each.register_forward_pre_hook(_scaled)


HOOKS: dict[str, Callable[[nn.Module], None]] = {"that look": _look, "that scale inputs": _scale_inputs}


def _error(mesh: mw.Mesh, options: dict[str, Any], hooks: str) -> float:
    plain, model = _build(), mw.parallelize(_build(), mesh, example=_batch(), **options)
    model.step(share(_batch(), model.data_rank, mesh.data_degree))
    for each in (plain, model.module):
        HOOKS[hooks](each)
    plain(**_batch()).backward()
    model.step(share(_batch(), model.data_rank, mesh.data_degree))
    found = model.full_gradients()
    pairs = [(found[name], each.grad) for name, each in plain.named_parameters()]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs if one is not None)


LAYOUTS: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"dp": 2}, {}),
    ({"fsdp": 2}, {"zero_stage": 3}),
    ({"tp": 2}, {}),
    ({"tp": 2}, {"sequence_parallel": True}),
    ({"cp": 2}, {}),
    ({"pp": 2}, {"schedule": "1f1b", "num_microbatches": 2}),
]


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize(("degrees", "options"), LAYOUTS, ids=str)
def test_hooks_of_modules_change_what_they_change_in_the_plain_run(
    degrees: dict[str, int], options: dict[str, Any], hooks: str
) -> None:
    mesh = mw.Mesh(**degrees)
    assert max(run_ranks(_error, mesh, mesh, options, hooks)) < 1e-10


def _mixing(mesh: mw.Mesh) -> None:
    model = mw.parallelize(_build(), mesh, example=_batch(), sequence_parallel=True)
    wide, added = model.module.get_submodule("layers.0.wide"), nn.Parameter(torch.ones(_WIDTH).double())
    wide.register_forward_pre_hook(lambda module, args: (args[0] + added,))
    with pytest.raises(WrapError, match="made of its block's sequence and of something else"):
        model.step(_batch())


def test_a_hook_that_adds_something_of_its_own_to_a_dealt_sequence_is_refused() -> None:
    mesh = mw.Mesh(tp=2)
    run_ranks(_mixing, mesh, mesh)


def _double(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = 2.0 * parameter.grad


def _after(mesh: mw.Mesh, options: dict[str, Any]) -> list[float]:
    """How much larger gradients are with hooks behind their accumulation."""
    model = mw.parallelize(_build(), mesh, **options)
    batch, found = share(_batch(), model.data_rank, mesh.data_degree), []
    for hooks in (False, True):
        for each in model.module.parameters() if hooks else ():
            each.register_post_accumulate_grad_hook(_double)
        model.step(batch)
        found.append({name: each.clone() for name, each in model.full_gradients().items() if each is not None})
    return [float((found[1][name] / each).mean()) for name, each in found[0].items()]


@pytest.mark.parametrize(("degrees", "options"), [({"dp": 2}, {"bucket_bytes": 1024}), ({"fsdp": 2}, {})], ids=str)
def test_hooks_behind_a_gradient_are_called_before_it_leaves(degrees: dict[str, int], options: dict[str, Any]) -> None:
    mesh = mw.Mesh(**degrees)
    for ratios in run_ranks(_after, mesh, mesh, options):
        assert ratios == pytest.approx([2.0] * len(ratios), rel=1e-9)


def _on_shards(mesh: mw.Mesh) -> None:
    model = mw.parallelize(_build(), mesh)
    hook = model.module.get_parameter("head.weight").register_hook(lambda gradient: 2.0 * gradient)
    with pytest.raises(WrapError, match=r"parameter head.weight has hooks on its gradient, which would not be called"):
        model.step(share(_batch(), model.data_rank, 2))
    hook.remove()
    model.step(share(_batch(), model.data_rank, 2))


def test_hooks_on_gradients_of_shards_are_refused_also_behind_the_wrap() -> None:
    mesh = mw.Mesh(fsdp=2)
    run_ranks(_on_shards, mesh, mesh)


def _clipped(mesh: mw.Mesh, ours: bool) -> list[str]:
    model = mw.parallelize(_build(), mesh, example=_batch())
    optimizer = model.make_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model.step(_batch())
            if ours:
                model.clip_gradients(0.01)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    return [str(each.message) for each in said if "gradients were changed" in str(each.message)]


@pytest.mark.parametrize(("axis", "ours", "warned"), [("tp", False, 1), ("tp", True, 0), ("cp", False, 0)])
def test_a_norm_of_parts_is_told_once(axis: str, ours: bool, warned: int) -> None:
    mesh = mw.Mesh(**{axis: 2})
    for said in run_ranks(_clipped, mesh, mesh, ours):
        assert len(said) == warned
        assert all("call clip_gradients() of the wrapped model" in each for each in said)
