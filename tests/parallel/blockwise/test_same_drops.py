"""Attention that drops is compared with a plain run that drops the same."""

from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.parallel.blockwise.same_drops import drop_as_blocks_do, drops
from tests.parallel.families import FAMILIES

SIZES = {"query_block": 5, "kv_block": 4}


@pytest.mark.parametrize(("name", "expected"), [("llama", True), ("t5", True), ("translator", True), ("qwen3", False)])
def test_whether_attention_drops_is_found_without_changing_a_model(name: str, expected: bool) -> None:
    build_model, build_batch = FAMILIES[name]
    model, batch = build_model(), build_batch()
    state = torch.get_rng_state()
    assert drops(model, batch) is expected
    assert not drops(model.eval(), batch)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plain_run_that_drops_nothing_in_attention_stays_the_models_own() -> None:
    build_model, build_batch = FAMILIES["qwen3"]
    model = build_model()
    drop_as_blocks_do(model, build_batch())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "degrees", "options"),
    [
        ("llama", {"tp": 2}, {"sequence_parallel": True, "num_microbatches": 2}),
        ("llama", {"dp": 2}, {"schedule": "layered", "recompute": "blocks"}),
        ("translator", {"pp": 2}, {"schedule": "gpipe", "num_microbatches": 2}),
    ],
    ids=str,
)
def test_what_drops_does_not_depend_on_the_mesh(name: str, degrees: dict[str, int], options: dict[str, Any]) -> None:
    report = mw.verify(*FAMILIES[name], mw.Mesh(**degrees), blockwise=SIZES, **options)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11
