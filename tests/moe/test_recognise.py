"""Experts of models are found by what they are, not by their names."""

import re
from typing import Any

import pytest
from torch import nn

from meshwright.moe.errors import SwapError
from meshwright.moe.recognise import find_experts
from tests.moe.models import FAMILIES, NUM_EXPERTS, build

FOUND = {
    "mixtral": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
    "qwen3_moe": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
    "olmoe": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
    "deepseek_v3": ["model.layers.1.mlp.experts"],
    "gpt_oss": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
    "switch_transformers": [f"{half}.block.1.layer.{at}.mlp.experts" for half, at in (("encoder", 1), ("decoder", 2))],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_experts(family: str) -> None:
    found = find_experts(build(family))
    assert [each.path for each in found] == FOUND[family]
    assert {each.num_experts for each in found} == {NUM_EXPERTS}
    assert {each.kind for each in found} == {"listed" if family == "switch_transformers" else "stacked"}


class Listed(nn.ModuleList):
    num_experts = 2

    def forward(self, tokens: Any, ids: Any, weights: Any) -> None: ...


class Unlike(Listed):
    def forward(self, tokens: Any) -> None: ...  # type: ignore[override]


def test_what_only_looks_like_experts_is_not_taken_for_them() -> None:
    good = Listed([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert [each.path for each in find_experts(nn.Sequential(good))] == ["0"]
    others = (
        Listed([nn.Linear(2, 2)]),  # fewer than it says
        Listed([nn.Linear(2, 2), nn.Tanh()]),  # of two kinds
        Unlike([nn.Linear(2, 2), nn.Linear(2, 2)]),  # called with tokens only
    )
    for each in others:
        with pytest.raises(SwapError, match=re.escape("is recognised as experts: one called with (tokens, choices, w")):
            find_experts(nn.ModuleDict({"experts": each}))


def test_a_norm_that_experts_share_is_refused() -> None:
    model = build("mixtral")
    model.get_submodule(FOUND["mixtral"][0]).has_post_expert_norm = True  # type: ignore[assignment]
    with pytest.raises(SwapError, match=re.escape("experts model.layers.0.mlp.experts share a norm behind them")):
        find_experts(model)
