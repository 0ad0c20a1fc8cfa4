"""Everything that a prediction is made from."""

from dataclasses import replace

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Layout, Training
from tests.clusters.simulated.settings import GPT_175B, setting


def test_a_layout_that_does_not_cover_the_cluster_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"tp 8 x cp 1 x dp 2 x pp 4 are 64 ranks; the cluster has 72 GPUs"):
        Training(
            model=GPT_175B,
            layout=Layout(tp=8, dp=2, pp=4, global_batch=2),
            cluster=Cluster(gpu=gpu("A100"), num_gpus=72),
        )


def test_tokens_of_a_rank_are_its_part_of_the_sequences() -> None:
    assert setting(micro_batch=4, cp=2).tokens == 4 * 2048 / 2


def test_trainings_are_values() -> None:
    one = setting(tp=8)
    assert one == replace(one, layout=replace(one.layout))
    assert one != replace(one, layout=replace(one.layout, recompute="full"))
