"""What is proved of a block that works on its positions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.parallel.context.plan import ContextPlan
from meshwright.parallel.context.planner import plan_context
from meshwright.parallel.errors import WrapError
from meshwright.parallel.microbatch import call
from tests.parallel.families import FAMILIES, words

WIDTH = 16


def planned(family: str) -> ContextPlan:
    build_model, build_batch = FAMILIES[family]
    model, batch = build_model(), build_batch()
    return plan_context(model, lambda: call(model, batch), 2)


class Block(nn.Module):
    """Attention by torch's function and a feed-forward layer; `mix` is done to the stream besides."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mix = mix

    def forward(self, stream: Tensor, shift: Tensor | None = None) -> Tensor:
        parts = self.into(stream).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*parts, is_causal=True)
        mixed = stream + self.out(attended.transpose(1, 2).flatten(2))
        return self.mix(mixed if shift is None else mixed + shift)


class Model(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor], *, shifted: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(mix) for _ in range(2))
        self.shift = nn.Parameter(torch.randn(1, 5, WIDTH)) if shifted else None

    def forward(self, stream: Tensor) -> Tensor:
        for layer in self.layers:
            stream = layer(stream, self.shift)
        return stream


def plan_of(model: nn.Module) -> ContextPlan:
    given: Any = torch.randn(2, 5, WIDTH)
    return plan_context(model, lambda: model(given), 4)


def test_rotary_tables_are_dealt_with_the_stream_and_attention_fetches_keys() -> None:
    plan = planned("llama")
    assert dict(plan.dealt["model.layers.0"])["position_embeddings"] == (-2, -2)
    assert plan.attends["model.layers.1.self_attn"].dealt
    assert (plan.attends["model.layers.1.self_attn"].heads, plan.attends["model.layers.1.self_attn"].kv_heads) == (4, 2)
    assert "model.layers.0.input_layernorm.weight" in plan.partial
    assert not any(name.startswith("model.embed") for name in plan.partial)


def test_tables_as_wide_as_the_example_is_long_are_dealt_by_rows() -> None:
    build_model, _ = FAMILIES["llama"]
    model, batch = build_model(), words(2, 8)  # heads are 8 wide
    plan = plan_context(model, lambda: call(model, batch), 2)
    assert dict(plan.dealt["model.layers.0"])["position_embeddings"] == (-2, -2)
    assert plan.attends["model.layers.0.self_attn"].dealt


def test_keys_of_an_encoder_are_whole_and_their_gradients_summed() -> None:
    plan = planned("whisper")
    assert not plan.attends["model.decoder.layers.0.encoder_attn"].dealt
    assert plan.entered["model.decoder.layers.0"]
    assert len(plan.streams) == 2


def test_attention_that_makes_a_bias_from_positions_runs_whole() -> None:
    plan = planned("t5")
    assert "encoder.block.0.layer.0.SelfAttention" in plan.joined
    assert not plan.attends


def test_a_learned_value_for_each_position_is_dealt() -> None:
    plan = plan_of(Model(nn.Identity(), shifted=True))
    assert plan.dealt["layers.0"] == ((1, (-2,)),)


@pytest.mark.parametrize(
    "mix",
    [
        lambda stream: stream + stream.mean(1, keepdim=True),
        lambda stream: stream.cumsum(1),
        lambda stream: functional.pad(stream, (0, 0, 1, 0))[:, :-1] + stream,
        lambda stream: stream * torch.arange(stream.shape[1], dtype=stream.dtype).unsqueeze(-1),
    ],
    ids=["mean", "sum", "shift", "own positions"],
)
def test_a_block_that_mixes_positions_beside_its_attention_is_refused(mix: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(WrapError, match=r"layers\.0 does not work on a dealt sequence"):
        plan_of(Model(mix))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(WrapError, match="no list of blocks"):
        plan_context(nn.Linear(2, 2), lambda: None, 2)


def test_the_plan_says_of_each_block_how_it_works() -> None:
    table = planned("llama").table()
    assert "attention of self_attn, the rest position by position" in table
