"""Modules that look at other positions are found before a proof could miss them, and run on the whole sequence."""

import pytest
from torch import Tensor, nn

from meshwright.parallel.context.mixing import looks_around
from meshwright.parallel.context.planner import plan_context
from tests.moe.models import build
from tests.parallel.test_experts import words


class Counting(nn.Module):
    """Says of each token how many like it stand before it, up to a limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.calls = 0

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        ids = nn.functional.one_hot(tokens.argmax(-1), tokens.shape[-1])
        return ids * (ids.cumsum(-2) <= self.limit), tokens


def test_a_limit_is_found_that_random_tokens_do_not_reach() -> None:
    counting = Counting(500)
    assert looks_around(counting, 8, 1000)
    assert not looks_around(counting, 8, 500)
    assert counting.calls == 0
    assert not looks_around(nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5)).double(), 8, 100)
    assert not looks_around(nn.Bilinear(8, 8, 1).double(), 8, 100)


@pytest.mark.parametrize("capacity", [2, 64])
def test_routers_with_a_capacity_run_whole_though_the_example_never_fills_it(capacity: int) -> None:
    model, given = build("switch_transformers", expert_capacity=capacity), words(3)
    plan = plan_context(model, lambda: model(**given), 2)
    routers = [path for path in plan.joined if path.endswith("router")]
    assert routers == ["encoder.block.1.layer.1.mlp.router", "decoder.block.1.layer.2.mlp.router"]
    assert not any("router" in name for name in plan.partial)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_routers_that_look_at_one_token_stay_as_they_are(family: str) -> None:
    model, given = build(family), words(3)
    assert not plan_context(model, lambda: model(**given), 2).joined
