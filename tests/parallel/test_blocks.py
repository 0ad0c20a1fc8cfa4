import pytest
from torch import nn

from meshwright.parallel.blocks import candidates, find_blocks, own_blocks
from meshwright.parallel.errors import WrapError
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


def _nested() -> nn.Module:
    stages = [nn.Module(), nn.Module()]
    for stage in stages:
        stage.layers = nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])
    return nn.ModuleDict({"stages": nn.ModuleList(stages), "head": nn.Linear(2, 1)})


def test_named_blocks_come_in_the_order_of_patterns_and_then_of_the_model() -> None:
    inner = [f"stages.{stage}.layers.{layer}" for stage in range(2) for layer in range(2)]
    assert list(find_blocks(_nested(), ["*.layers.*"])) == inner
    assert list(find_blocks(_nested(), ["head", "stages.?"])) == ["head", "stages.0", "stages.1"]
    assert list(own_blocks(_nested(), ["*.layers.*"])) == inner[::2]  # the others hold nothing


def test_a_pattern_means_the_outermost_modules_that_it_fits() -> None:
    assert list(find_blocks(llama()(), ["model.layers.*"])) == list(find_blocks(llama()()))


@pytest.mark.parametrize(
    ("patterns", "why"),
    [
        (["*.layerz.*"], r"no module has a path like '\*.layerz.\*'; nearest: stages.\*.layers"),
        (["x"], "choose from: stages, "),
        (["stages.*", "stages.1.layers.0"], "stages.1.layers.0 is inside of stages.1, which is named too"),
        (["stages.1.layers.0", "stages.*"], "stages.1.layers.0 is inside of stages.1, which is named too"),
        (["stages"], r"stages is a ModuleList, which is never called; name stages\.\*"),
    ],
)
def test_patterns_that_name_no_blocks_are_refused(patterns: list[str], why: str) -> None:
    with pytest.raises(WrapError, match=why):
        find_blocks(_nested(), patterns)


def test_one_module_under_several_names_is_refused() -> None:
    shared = nn.Linear(2, 2)
    with pytest.raises(WrapError, match=r"0 and 1 are one module that is called several times"):
        find_blocks(nn.Sequential(shared, shared), ["*"])


def test_what_may_be_named_is_listed() -> None:
    assert candidates(_nested()) == ["stages.*", "head"]
    named = nn.ModuleDict(
        {"layers": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), "head": nn.Linear(2, 1)}
    )
    assert candidates(named) == ["layers.*", "head"]
    assert candidates(nn.Linear(2, 2)) == []
