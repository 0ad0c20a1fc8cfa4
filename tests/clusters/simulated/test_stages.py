"""Which layers a rank of a pipeline has."""

import pytest

from meshwright.clusters.simulated.layout import Layout
from meshwright.clusters.simulated.stages import largest_stage, layers_of_ranks, stage_parameters
from tests.clusters.simulated.settings import GPT_175B, LLAMA_405B


@pytest.mark.parametrize("pp", [1, 2, 5, 8, 16, 126])
def test_no_layer_is_lost(pp: int) -> None:
    layers = layers_of_ranks(LLAMA_405B, pp)
    assert (len(layers), sum(layers)) == (pp, 126)


def test_embedding_and_head_count_as_layers_where_that_deals_evenly() -> None:
    assert layers_of_ranks(LLAMA_405B, 16) == (7, *[8] * 14, 7)


def test_the_head_makes_the_last_rank_the_slowest_unless_it_has_fewer_layers() -> None:
    assert largest_stage(GPT_175B, Layout(pp=8), head_in_layers=0.3) == (12, True)
    assert largest_stage(LLAMA_405B, Layout(pp=16), head_in_layers=0.3) == (8, False)
    assert largest_stage(LLAMA_405B, Layout(pp=16), head_in_layers=1.5) == (7, True)


def test_shards_of_all_ranks_are_the_model() -> None:
    assert 8 * stage_parameters(GPT_175B, Layout(tp=8)) == GPT_175B.parameters
    assert stage_parameters(LLAMA_405B, Layout()) == LLAMA_405B.parameters


def test_the_end_of_a_pipeline_holds_one_table() -> None:
    mine = stage_parameters(GPT_175B, Layout(tp=8, pp=8))
    ends = GPT_175B.embedding_parameters + GPT_175B.last_norm_parameters
    assert 8 * mine == 12 * GPT_175B.layer_parameters + ends
