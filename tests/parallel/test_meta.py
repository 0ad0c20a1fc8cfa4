"""Experts that torch multiplies at once, which it does in narrow floats only, are planned and proved as well."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import meshwright as mw
from meshwright.parallel.meta import MetaAnswers, grouped_on_shapes, unnoticed
from tests.parallel.families import lm, words

EXPERTS = {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}


def test_products_of_groups_have_the_shapes_and_the_floats_of_what_they_are_made_of() -> None:
    ends = torch.tensor([16, 48], dtype=torch.int32)
    for device in ("cpu", "meta"):
        rows = torch.ones(48, 16, dtype=torch.float64, device=device, requires_grad=True)
        with MetaAnswers():
            made = functional.grouped_mm(
                rows, torch.ones(2, 16, 32, dtype=rows.dtype, device=device), offs=ends.to(device)
            )
            made.sum().backward()
        assert (made.shape, made.dtype) == ((48, 32), torch.float64)
        assert rows.grad is not None
        assert rows.grad.dtype is torch.float64


def test_a_product_of_groups_on_shapes_keeps_what_it_was_given_and_tells_of_three_products() -> None:
    rows, matrices = (torch.ones(shape, device="meta", requires_grad=True) for shape in ((48, 16), (2, 16, 32)))
    kept: list[torch.Tensor] = []
    told: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        made = grouped_on_shapes(rows, matrices, told=lambda: told.append(len(kept)))
        with MetaAnswers():
            functional.grouped_mm(rows, matrices, offs=torch.tensor([16, 48], device="meta", dtype=torch.int32))
    assert [(each.shape, each.dtype) for each in kept] == [(each.shape, torch.float32) for each in (rows, matrices)] * 2
    assert len(told) == 1
    made.sum().backward()
    assert len(told) == 3  # one for each gradient
    with torch.no_grad():
        rows.requires_grad_(False)
    grouped_on_shapes(rows, matrices, told=lambda: told.append(0)).sum().backward()
    assert len(told) == 5


def test_modules_without_values_that_are_held_elsewhere_are_converted_to_what_they_are_and_to_nothing_else() -> None:
    with unnoticed(), FakeTensorMode():
        layer = nn.Linear(2, 2)
        held = layer.weight.view(4)
        layer.to(torch.float32)
        assert held.dtype is layer.weight.dtype is torch.float32
        with pytest.raises(RuntimeError, match="swap"):  # and is not left as it was without a word
            layer.double()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ({"cp": 2, "ep": 2}, {"moe": mw.Experts()}),
        ({"cp": 2}, {"num_microbatches": 3, "schedule": "layered"}),
        ({"pp": 2}, {"num_microbatches": 2, "schedule": "1f1b"}),
        ({"tp": 2, "fsdp": 2}, {"sequence_parallel": True}),
    ],
    ids=["cp2-ep2", "cp2-layered", "pp2-1f1b", "tp2-fsdp2"],
)
def test_experts_as_transformers_runs_them_are_proved_on_every_axis(
    mesh: dict[str, int], options: dict[str, Any]
) -> None:
    model = lm("qwen3_moe", moe_intermediate_size=16, **EXPERTS)
    report = mw.verify(model, words, mw.Mesh(**mesh), **options)
    assert report.ok, report
