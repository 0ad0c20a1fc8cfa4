"""What blocks cost is what is counted by hand, and counting leaves the model as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.costs import block_flops, block_parameters, settled
from meshwright.parallel.errors import WrapError
from meshwright.parallel.options import Options
from meshwright.parallel.stages import stages_of


class Growing(nn.Module):
    """Blocks whose later ones are dearer, with a state that a forward changes."""

    def __init__(self, *, asks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 4)) for width in (2, 2, 2, 12)
        )
        self.asks = asks

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs)
            if self.asks and inputs.sum() > 0:
                inputs = -inputs
        return inputs.square().mean()


def _options(**given: Any) -> Options:
    return Options.of(schedule="gpipe", loss="sample_mean", num_microbatches=2, **given)


def test_parameters_and_flops_of_a_block_are_those_counted_by_hand() -> None:
    model = Growing()
    assert block_parameters(find_blocks(model)) == {
        **dict.fromkeys(["layers.0", "layers.1", "layers.2"], 26),
        "layers.3": 136,
    }
    found = block_flops(model, _options(example=torch.ones(5, 4)))
    assert list(found.values()) == [2 * 5 * 4 * width * 2 for width in (2, 2, 2, 12)]


def test_counting_leaves_the_model_as_it_was() -> None:
    model = Growing()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    block_flops(model, _options(example=torch.ones(5, 4)))
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


@pytest.mark.parametrize("costs", ["parameters", "flops", (1, 1, 1, 6)])
def test_the_dearest_stage_is_as_cheap_as_can_be(costs: Any) -> None:
    model = Growing()
    chosen = settled(_options(stage_costs=costs, example=torch.ones(5, 4)), model)
    assert stages_of(model, mw.Mesh(pp=2), 0, chosen).stage_of == {f"layers.{each}": each // 3 for each in range(4)}


def test_flops_that_cannot_be_counted_are_refused_with_another_way() -> None:
    with pytest.raises(WrapError, match=r"no example was given; pass example= .* stage_costs='parameters'"):
        settled(_options(stage_costs="flops"), Growing())
    with pytest.raises(WrapError, match=r"for shapes alone .*; use stage_costs='parameters', or give numbers"):
        settled(_options(stage_costs="flops", example=torch.ones(5, 4)), Growing(asks=True))
