"""Parameters that are partial in one place and whole in another."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.parallel.context.planner import plan_context
from meshwright.parallel.errors import WrapError
from meshwright.parallel.tensor_planner import plan_tensor

WIDTH = 16


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, stream: Tensor) -> Tensor:
        parts = self.into(self.norm(stream)).unflatten(-1, (3, -1, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return stream + self.out(attended.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Blocks that share a norm, with what stands behind them too where `outside`."""

    def __init__(self, *, outside: bool) -> None:
        super().__init__()
        norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Block(norm) for _ in range(2))
        self.last = norm if outside else nn.Identity()

    def forward(self, stream: Tensor) -> Tensor:
        for layer in self.layers:
            stream = layer(stream)
        return self.last(stream)


def given() -> Tensor:
    return torch.randn(2, 6, WIDTH)


def test_a_parameter_of_several_blocks_is_partial_wherever_it_stands() -> None:
    model = Model(outside=False)
    both = {"layers.0.norm.weight", "layers.1.norm.weight"}
    assert both <= plan_context(model, lambda: model(given()), 2).partial
    assert both <= plan_tensor(model, lambda: model(given()), 2, sequence=True).partial


def test_a_parameter_of_blocks_and_of_what_stands_around_them_is_refused() -> None:
    model = Model(outside=True)
    named = r"layers\.0\.norm\.weight and .*last\.weight are one parameter"
    with pytest.raises(WrapError, match=f"cp=2: {named}"):
        plan_context(model, lambda: model(given()), 2)
    with pytest.raises(WrapError, match=f"tp=2: {named}"):
        plan_tensor(model, lambda: model(given()), 2, sequence=True)


def test_it_may_be_shared_where_every_rank_does_all_of_its_work() -> None:
    model = Model(outside=True)
    assert not plan_tensor(model, lambda: model(given()), 2).partial
