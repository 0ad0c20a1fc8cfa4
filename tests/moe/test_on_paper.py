"""Experts on shapes: tokens spread evenly, each rank runs its own."""

import pytest
import torch

from meshwright.moe.on_paper import spread_evenly
from meshwright.parallel.options import Options
from meshwright.parallel.tracing import trace
from meshwright.parallel.work import Work
from tests.parallel.families import FAMILIES, lm, words


def _forward(ep: int, **more: int) -> Work:
    build = lm("mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **more)
    prepare = lambda model, tracer: spread_evenly(model, tracer.send, ep=ep, runs=tracer.runs)  # noqa: E731
    found = trace(build(), Options(example=words(8, 12)), precision=torch.bfloat16, prepare=prepare)
    return found.blocks["model.layers.1"].forward


def test_every_token_is_computed_by_as_many_experts_as_it_has() -> None:
    rows, width, inner = 8 * 12 * 2, 32, 64
    grouped = [each for each in _forward(1).products if each.batch == 4]
    assert sum(each.flops for each in grouped) == 2 * rows * width * 3 * inner


@pytest.mark.parametrize("ep", [2, 4])
def test_a_rank_sends_its_rows_to_experts_and_back_and_computes_as_many(ep: int) -> None:
    alone, among = _forward(1), _forward(ep)
    assert among.flops == alone.flops
    assert max(each.batch for each in among.products) == 4 // ep
    assert [each.kind for each in among.sent] == ["all_to_all"] * 2
    assert not alone.sent


def test_a_model_without_experts_is_left_alone() -> None:
    assert not spread_evenly(FAMILIES["gpt2"][0](), lambda *_: None)
