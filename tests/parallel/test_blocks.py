from torch import nn

from meshwright.parallel.blocks import find_blocks, own_blocks
from tests.parallel.models import gpt2, llama


def test_blocks_of_models_not_written_for_us_are_found() -> None:
    assert list(find_blocks(llama()())) == [f"model.layers.{index}" for index in range(3)]
    assert list(find_blocks(gpt2()())) == ["transformer.h.0", "transformer.h.1"]
    translator = nn.Transformer(8, 2, 2, 3, 8, batch_first=True)
    assert list(find_blocks(translator)) == [
        *(f"encoder.layers.{index}" for index in range(2)),
        *(f"decoder.layers.{index}" for index in range(3)),
    ]


def test_the_outermost_list_wins_where_lists_nest() -> None:
    stage = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]
    assert list(find_blocks(nn.ModuleDict({"stages": nn.ModuleList(stage)}))) == ["stages.0", "stages.1"]


def test_a_block_that_shares_a_parameter_with_the_rest_is_no_unit_of_its_own() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
    model["head"].weight = model["layers"][1].weight
    assert list(own_blocks(model)) == ["layers.0"]


def test_models_without_repetition_have_no_blocks() -> None:
    assert find_blocks(nn.Linear(2, 2)) == {}
    assert find_blocks(nn.ModuleDict({"one": nn.ModuleList([nn.Linear(2, 2)])})) == {}
