"""Modules that look at other positions are found before a proof could miss them, and run on the whole sequence."""

from contextlib import AbstractContextManager
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from meshwright.parallel.context.mixing import looks_around
from meshwright.parallel.context.planner import plan_context
from meshwright.parallel.errors import WrapError
from meshwright.parallel.length import Length
from meshwright.parallel.tensor import install
from meshwright.parallel.tensor_plan import TensorPlan
from meshwright.parallel.threads import ThreadAxis, run_threads
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


class Comparing(nn.Module):
    """Compares all tokens with all, in several heads, as attention written by hand does."""

    lengths: ClassVar[list[int]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.shape[1])
        scores = torch.matmul(tokens, tokens.mT).expand(4, -1, -1).softmax(-1)
        return scores.mean(0) @ tokens[0]


def test_a_module_that_compares_all_tokens_is_tried_on_no_more_than_memory_is_there_for() -> None:
    Comparing.lengths.clear()
    assert not looks_around(Comparing(), 8, 1 << 14)
    assert Comparing.lengths == [37 << number for number in range(7)]
    assert 4 * Comparing.lengths[-1] ** 2 < 1 << 26 < 4 * (2 * Comparing.lengths[-1]) ** 2


def test_more_and_more_tokens_are_tried_until_a_limit_is_found() -> None:
    assert looks_around(Counting(500), 8, 1 << 14)
    assert looks_around(Counting((1 << 14) - 1), 2100, 1 << 14), "what grows with the tokens only is tried on all"
    assert not looks_around(Counting(1 << 14), 8, 1 << 14)


@pytest.mark.parametrize("capacity", [2, 64])
def test_routers_with_a_capacity_run_whole_though_the_example_never_fills_it(capacity: int) -> None:
    model, given = build("switch_transformers", expert_capacity=capacity), words(3)
    plan = plan_context(model, lambda: model(**given), 2)
    routers = [path for path in plan.joined if path.endswith("router")]
    assert routers == ["encoder.block.1.layer.1.mlp.router", "decoder.block.1.layer.2.mlp.router"]
    assert not any("router" in name for name in plan.partial)


class Noise(nn.Module):
    """Changes the tokens in place, as routers of Switch Transformers do."""

    def forward(self, tokens: Tensor) -> Tensor:
        tokens *= torch.empty_like(tokens).uniform_(0.9, 1.1)
        return tokens.mean(-1, keepdim=True)


class NoisyBlock(nn.Module):
    """Scales tokens by what a module says of them, after it has added noise to them."""

    def __init__(self, scale: nn.Module) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4)
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        entered = self.into(tokens)
        scale = self.scale(entered)
        return tokens + entered * scale


def model_of(scale: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(*(NoisyBlock(scale) for _ in range(2))))


def test_noise_that_a_module_adds_in_place_reaches_the_rest_of_the_block() -> None:
    model, tokens = model_of(Noise()), torch.randn(2, 6, 4)
    assert list(plan_context(model, lambda: model(tokens), 2).joined) == ["0.0.scale", "0.1.scale"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changes_in_place_reach_each_rank_also_without_gradients(mode: type[AbstractContextManager[None]]) -> None:
    class Doubling(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            tokens *= 2
            return tokens[..., :1]

    def run(axis: ThreadAxis) -> Tensor:
        module = nn.Sequential(Doubling())
        length = Length(axis, full=4, width=3)
        install(module, TensorPlan(degree=2, sequence=True, joined={"0": (0,)}), axis, {"": length})
        with mode():
            mine = torch.full((1, 2, 3), float(axis.rank + 1))
            module(mine)
            return mine[0, 0, 0].clone()

    assert [float(each) for each in run_threads(run, 2)] == [2.0, 4.0]


def test_a_block_that_draws_by_itself_is_refused_by_the_name_of_what_it_draws_with() -> None:
    class Drawn(NoisyBlock):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens + self.into(tokens) * torch.rand(tokens.shape)

    model, tokens = nn.Sequential(nn.Sequential(Drawn(nn.Identity()), Drawn(nn.Identity()))), torch.randn(2, 6, 4)
    with pytest.raises(WrapError, match="it draws with rand, which only a module whose one argument is the stream may"):
        plan_context(model, lambda: model(tokens), 2)


class BreakingTies(nn.Module):
    """Draws for every token, and looks at what it drew only where two scores are alike."""

    def forward(self, tokens: Tensor) -> Tensor:
        alike = tokens[..., :1] == tokens[..., 1:2]
        return torch.where(alike, torch.rand_like(tokens[..., :1]), tokens.mean(-1, keepdim=True))


def test_a_module_that_draws_runs_whole_though_what_it_draws_does_not_matter_for_the_example() -> None:
    assert looks_around(BreakingTies(), 4, 1000)
    model, tokens = model_of(BreakingTies()), torch.randn(2, 6, 4)
    assert list(plan_context(model, lambda: model(tokens), 2).joined) == ["0.0.scale", "0.1.scale"]


class Sometimes(nn.Module):
    """Leaves out whole samples, as stochastic depth does."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * (torch.rand(len(tokens), 1, 1) > 0.5)


def test_a_module_that_draws_for_samples_stays_as_it_is() -> None:
    assert not looks_around(Sometimes(), 4, 1000)
    model, tokens = model_of(Sometimes()), torch.randn(8, 6, 4)
    assert not plan_context(model, lambda: model(tokens), 2).joined


def test_draws_of_a_block_itself_are_refused_though_they_do_not_matter_for_the_example() -> None:
    class Drawn(NoisyBlock):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens + self.into(tokens) * BreakingTies.forward(self, tokens)

    model, tokens = nn.Sequential(nn.Sequential(Drawn(nn.Identity()), Drawn(nn.Identity()))), torch.randn(2, 6, 4)
    with pytest.raises(WrapError, match="draws other random numbers; it draws with rand_like, which only a module"):
        plan_context(model, lambda: model(tokens), 2)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_routers_that_look_at_one_token_stay_as_they_are(family: str) -> None:
    model, given = build(family), words(3)
    assert not plan_context(model, lambda: model(**given), 2).joined
