"""What the planner sees and decides, and what it refuses."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.parallel.errors import WrapError
from meshwright.parallel.microbatch import call
from meshwright.parallel.options import Options
from meshwright.parallel.plan import make_plan
from meshwright.parallel.regions import Heads, find_regions
from meshwright.parallel.tensor_plan import TensorPlan
from meshwright.parallel.watch import matrix_form, watch
from tests.parallel.families import FAMILIES
from tests.parallel.models import regressor


def plan_of(family: str, degree: int = 2, **options: Any) -> TensorPlan:
    return _new_plan(family, degree, options) if options else _plan(family, degree)


@cache
def _plan(family: str, degree: int) -> TensorPlan:
    return _new_plan(family, degree, {})


def _new_plan(family: str, degree: int, options: dict[str, Any]) -> TensorPlan:
    build_model, build_batch = FAMILIES[family]
    return make_plan(build_model(), mw.Mesh(tp=degree), Options.of(example=build_batch(), **options))


def reason_of(plan: TensorPlan, module: str) -> tuple[str, str]:
    return next((each.placement, each.reason) for each in plan.decisions if each.module == module)


def test_a_matrix_is_known_by_what_it_computes() -> None:
    from transformers.pytorch_utils import Conv1D

    class Odd(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    assert [matrix_form(each) for each in (nn.Linear(3, 3), Conv1D(3, 3), Odd(3, 3), nn.Embedding(3, 3))] == [
        "linear",
        "transposed",
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("family", "heads"),
    [("llama", Heads(4, 2)), ("phi3", Heads(4, 2)), ("gpt2", Heads(4, 4)), ("modernbert", Heads(4, 4))],
)
def test_heads_are_found_in_separate_and_fused_projections(family: str, heads: Heads) -> None:
    build_model, build_batch = FAMILIES[family]
    model, batch = build_model(), build_batch()
    attention, feed_forward = find_regions(watch(model, lambda: call(model, batch)))[:2]
    assert (attention.heads, feed_forward.heads) == (heads, None)


def test_sources_come_in_order_and_say_so() -> None:
    llama, gpt2 = plan_of("llama"), plan_of("gpt2")
    assert reason_of(llama, "model.layers.0.mlp.up_proj") == ("column", "the model's own tp_plan; 64 features")
    assert reason_of(gpt2, "transformer.h.0.mlp.c_proj")[1].startswith("rule:")
    wished = plan_of("llama", tensor_plan={"model.layers.*.mlp.*": "replicate"})
    assert reason_of(wished, "model.layers.1.mlp.up_proj")[0] == "replicate"
    assert "your pattern" in reason_of(wished, "model.layers.1.mlp.up_proj")[1]
    assert "model.layers.1.self_attn.q_proj" in wished.columns


def test_what_cannot_be_dealt_stays_whole_and_is_named() -> None:
    placement, reason = reason_of(plan_of("olmo2"), "model.layers.0.self_attn.q_proj")
    assert placement == "replicate"
    assert "not equal to the plain run when dealt" in reason


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "residual_net"])
def test_every_region_of_every_family_is_dealt_but_for_known_ones(family: str) -> None:
    refuted = [each.module for each in plan_of(family).decisions if "not equal to the plain run" in each.reason]
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    known = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in attention]
    assert refuted == (known if family == "olmo2" else [])  # olmo2 normalises over all heads


def test_gradients_of_norms_inside_heads_are_known_to_be_sums() -> None:
    assert {name.rpartition("self_attn.")[2] for name in plan_of("qwen3").partial} == {"q_norm.weight", "k_norm.weight"}


def test_key_value_heads_are_replicated_where_there_are_too_few() -> None:
    splits = plan_of("llama", degree=4).splits
    assert splits["model.layers.0.self_attn.k_proj.weight"].held == (((0, 8),), ((0, 8),), ((8, 16),), ((8, 16),))
    assert splits["lm_head.weight"].held[0] == ((0, 25),)


def test_key_value_heads_inside_a_fused_projection_are_replicated_too() -> None:
    plan = plan_of("phi3", degree=4)
    assert plan.splits["model.layers.0.self_attn.qkv_proj.weight"].held[1] == ((8, 16), (32, 40), (48, 56))


def test_the_table_shows_equal_blocks_once() -> None:
    rows = plan_of("llama").table().splitlines()
    assert rows[0].split() == [
        "model.layers.*.self_attn.q_proj",
        "column",
        *["the", "model's", "own", "tp_plan;", "4", "heads,", "2", "key-value", "heads", "(2", "times)"],
    ]
    assert len(rows) == 9


@pytest.mark.parametrize(
    ("family", "degree", "options", "message"),
    [
        (
            "llama",
            8,
            {},
            r"tp=8 does not fit model\.layers\.0\.self_attn\.o_proj: 4 heads.*legal degrees of tp: 1, 2, 4",
        ),
        ("residual_net", 2, {}, r"nothing can be dealt.*nearest legal layout: dp=2"),
        ("llama", 2, {"tensor_plan": {"model.layrs.*": "row"}}, r"no module of the model fits 'model\.layrs\.\*'"),
        ("llama", 2, {"tensor_plan": {"lm_head": "colum"}}, r"did you mean 'column'|column"),
        ("llama", 2, {"tensor_plan": {"*.o_proj": "column"}}, r"cannot be had"),
        ("mixer", 2, {"sequence_parallel": True}, r"blocks\.0 cannot work on a dealt sequence"),
    ],
)
def test_refusals_name_what_where_and_what_instead(family: str, degree: int, options: Any, message: str) -> None:
    with pytest.raises(WrapError, match=message):
        plan_of(family, degree, **options)


def test_a_model_without_an_example_is_asked_for_one() -> None:
    with pytest.raises(WrapError, match="pass example= one micro-batch"):
        make_plan(regressor()(), mw.Mesh(tp=2), Options())


def test_models_of_transformers_bring_their_own_example() -> None:
    model = FAMILIES["llama"][0]()
    assert make_plan(model, mw.Mesh(tp=2), Options()).columns == plan_of("llama").columns


def test_a_model_without_memory_is_planned_alike() -> None:
    build_model, build_batch = FAMILIES["llama"]
    with torch.device("meta"):
        model = build_model()
    assert make_plan(model, mw.Mesh(tp=2), Options.of(example=build_batch())).splits == plan_of("llama").splits
