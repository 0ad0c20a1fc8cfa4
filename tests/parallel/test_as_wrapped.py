"""What is done to a model behind its wrap: it is followed, or refused, and never changes numbers unnoticed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.errors import WrapError
from meshwright.parallel.microbatch import share
from meshwright.testing import run_ranks
from tests.parallel.families import FAMILIES

pytestmark = pytest.mark.slow

_WIDTH = 8


class _Block(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.inner, self.outer = nn.Dropout(p), nn.Dropout(p)

    def forward(self, values: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        return values + self.outer(self.narrow(self.inner(self.wide(values).tanh())))


class _Model(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(p) for _ in range(3))

    def forward(self, values: Tensor, labels: Tensor) -> Tensor:
        """Mean over labels."""
        for layer in self.layers:
            values = layer(values)
        return nn.functional.cross_entropy(values.transpose(1, 2), labels)


def _build(p: float = 0.0) -> Any:
    torch.manual_seed(0)
    return _Model(p).double()


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, _WIDTH, (4, 6), generator=generator)
    return {"values": torch.randn(4, 6, _WIDTH, generator=generator).double(), "labels": labels}


Found = list[tuple[float, dict[str, Tensor | None]]]


def _steps(
    mesh: mw.Mesh,
    options: dict[str, Any],
    *,
    p: float = 0.0,
    before: Callable[[Any], object] = lambda model: None,
    first: Callable[[Any], object] = lambda model: None,
    between: Callable[[Any], object] = lambda model: None,
) -> Found:
    """Loss and gradients of three steps; something is done before the wrap, behind it, and behind the first step."""
    plain, found = _build(p), Found()
    before(plain)
    model = mw.parallelize(plain, mesh, example=_batch(), **options)
    optimizer = model.make_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    for step in range(3):
        if step < 2:
            (first, between)[step](model.module)
        loss = model.step(share(_batch(), model.data_rank, mesh.data_degree))
        found.append((float(loss), {name: each for name, each in model.full_gradients().items()}))
        optimizer.step()
    return found


def _same(one: Found, other: Found) -> bool:
    return all(
        loss == pytest.approx(expected, rel=1e-12)
        and all(torch.allclose(each, gradients[name], rtol=1e-10, atol=1e-14) for name, each in wanted.items())
        for (loss, gradients), (expected, wanted) in zip(one, other, strict=True)
    )


LAYERED = {"schedule": "layered", "num_microbatches": 2}
DATA: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"dp": 2}, {}),
    ({"dp": 2}, LAYERED),
    ({"fsdp": 2}, {"zero_stage": 3}),
    ({"fsdp": 2}, LAYERED),
]


def _there_and_back(mesh: mw.Mesh, options: dict[str, Any]) -> tuple[Found, Found]:
    return _steps(mesh, options), _steps(mesh, options, between=lambda model: model.to("cpu").float().double())


@pytest.mark.parametrize(("degrees", "options"), DATA, ids=str)
def test_a_model_that_got_new_memory_goes_on_as_before(degrees: dict[str, int], options: dict[str, Any]) -> None:
    mesh = mw.Mesh(**degrees)
    for plain, moved in run_ranks(_there_and_back, mesh, mesh, options):
        assert moved[1][0] == pytest.approx(plain[1][0], rel=1e-6)  # weights were rounded on the way
        assert moved[2][0] == pytest.approx(plain[2][0], rel=1e-6)
        assert moved[2][0] < moved[1][0] < moved[0][0]


def _narrowed(mesh: mw.Mesh, options: dict[str, Any]) -> str:
    with pytest.raises(WrapError) as refused:
        _steps(mesh, options, between=lambda model: model.float())
    return str(refused.value)


def test_shards_of_another_dtype_are_refused() -> None:
    mesh = mw.Mesh(fsdp=2)
    for said in run_ranks(_narrowed, mesh, mesh, LAYERED):
        assert "change dtypes and devices before parallelize()" in said


def _frozen_behind(mesh: mw.Mesh, options: dict[str, Any]) -> tuple[list[bool], list[bool]]:
    model = mw.parallelize(_build(), mesh, **options)
    frozen = [name for name, _ in model.module.named_parameters() if name.startswith("layers.1.")]
    found = []
    for trains in (False, True):
        for name in frozen:
            model.module.get_parameter(name).requires_grad_(trains)
        model.step(share(_batch(), model.data_rank, mesh.data_degree))
        gradients = model.full_gradients()
        found.append([name in frozen for name, each in gradients.items() if each is None])
    return found[0], found[1]


@pytest.mark.parametrize(("degrees", "options"), DATA, ids=str)
def test_what_is_frozen_behind_the_wrap_has_no_gradient_until_it_is_thawed(
    degrees: dict[str, int], options: dict[str, Any]
) -> None:
    mesh = mw.Mesh(**degrees)
    for frozen, thawed in run_ranks(_frozen_behind, mesh, mesh, options):
        assert frozen == [True] * 4
        assert thawed == []


def _thawed(mesh: mw.Mesh) -> None:
    model = mw.parallelize(_build().requires_grad_(False), mesh)
    model.module.get_parameter("layers.1.wide.bias").requires_grad_(True)
    with pytest.raises(WrapError, match=r"parameter layers.1.wide.bias was frozen when the model was wrapped"):
        model.make_optimizer(torch.optim.SGD)
    with pytest.raises(WrapError, match="freeze it behind that"):
        model.step(_batch())


def test_what_was_frozen_at_the_wrap_does_not_train_unnoticed() -> None:
    run_ranks(_thawed, mw.Mesh(), mw.Mesh())


def _frozen_up_to_a_block(mesh: mw.Mesh) -> None:
    model = mw.parallelize(_build(), mesh, schedule="1f1b", num_microbatches=2)
    model.step(_batch())
    for name, each in model.module.named_parameters():
        each.requires_grad_(not name.startswith("layers.0."))
    model.step(_batch())


def test_a_pipeline_whose_first_block_is_frozen_behind_a_step_is_told_why_it_cannot_go_on() -> None:
    with pytest.raises(WrapError, match=r"layers.0 gave .* \(what is frozen up to this block, say before"):
        run_ranks(_frozen_up_to_a_block, mw.Mesh(pp=2), mw.Mesh(pp=2))


def _copied(mesh: mw.Mesh) -> None:
    model = mw.parallelize(_build(), mesh, example=_batch())
    with pytest.raises(WrapError, match=r"copy its parameters .*, or save the model by save_w"):
        copy.deepcopy(model.module)


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_a_module_that_is_dealt_over_ranks_is_not_copied(axis: str) -> None:
    mesh = mw.Mesh(**{axis: 2})
    run_ranks(_copied, mesh, mesh)


DEALS: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"tp": 2}, {}),
    ({"tp": 2}, {"sequence_parallel": True}),
    ({"cp": 2}, {}),
    ({"cp": 2}, LAYERED),
]


def _in_evaluation(mesh: mw.Mesh, options: dict[str, Any]) -> tuple[Found, Found]:
    return (
        _steps(mesh, options, p=0.3, before=lambda model: model.eval(), between=lambda model: model.train()),
        _steps(mesh, options, p=0.3, first=lambda model: model.eval(), between=lambda model: model.train()),
    )


@pytest.mark.parametrize(("degrees", "options"), DEALS, ids=str)
def test_a_model_that_was_wrapped_in_evaluation_drops_as_the_plain_one_when_it_trains(
    degrees: dict[str, int], options: dict[str, Any]
) -> None:
    mesh = mw.Mesh(**degrees)
    for found, expected in run_ranks(_in_evaluation, mesh, mesh, options):
        assert _same(found, expected)


def _switched(mesh: mw.Mesh, which: str, how: str) -> str:
    def between(model: Any) -> None:
        dropout = getattr(model.layers[1], which)
        if how == "evaluation":
            dropout.eval()
        else:
            dropout.p = float(how)

    with pytest.raises(WrapError) as refused:
        _steps(mesh, {"sequence_parallel": True}, p=0.0 if how == "0.3" else 0.3, between=between)
    return str(refused.value)


@pytest.mark.parametrize("which", ["inner", "outer"])
@pytest.mark.parametrize(
    ("how", "said"), [("evaluation", "drop otherwise"), ("0", "drop otherwise"), ("0.3", "had p=0")]
)
def test_dropouts_of_parts_that_are_switched_by_themselves_are_refused(which: str, how: str, said: str) -> None:
    mesh = mw.Mesh(tp=2)
    for each in run_ranks(_switched, mesh, mesh, which, how):
        assert said in each


def _attending_otherwise(mesh: mw.Mesh, options: dict[str, Any], change: str) -> None:
    plain = FAMILIES["bert"][0]()
    batch = FAMILIES["bert"][1]()
    model = mw.parallelize(plain, mesh, example=batch, **options)
    module: Any = model.module
    model.step(batch)
    module.set_attn_implementation("sdpa")  # what it had
    model.step(batch)
    if change == "eager":
        module.set_attn_implementation("eager")
    else:
        module.config._output_attentions = True
    with pytest.raises(WrapError, match="behind the wrap, and would compute attention by itself"):
        model.step(batch)
    with pytest.raises(WrapError, match="set it before parallelize"):
        model.evaluate(batch)


@pytest.mark.parametrize("change", ["eager", "weights"])
@pytest.mark.parametrize(("degrees", "options"), [({"cp": 2}, {}), ({}, {"blockwise": {}})], ids=str)
def test_a_model_that_would_attend_by_itself_behind_the_wrap_is_refused(
    degrees: dict[str, int], options: dict[str, Any], change: str
) -> None:
    mesh = mw.Mesh(**degrees)
    run_ranks(_attending_otherwise, mesh, mesh, options, change)
