"""Experts that torch multiplies at once, which it does in narrow floats only, are planned and proved as well."""

from typing import Any

import pytest
import torch
from torch.nn import functional

import meshwright as mw
from meshwright.parallel.meta import MetaAnswers
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
