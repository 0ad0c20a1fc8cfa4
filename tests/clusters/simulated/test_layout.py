"""How a training is dealt: counts, and words that are refused."""

from typing import Any

import pytest

from meshwright.clusters.simulated.layout import Engine, Layout


def test_ranks_and_microbatches_are_products_and_quotients() -> None:
    layout = Layout(tp=8, cp=2, dp=4, pp=16, vpp=3, micro_batch=2, global_batch=512)
    assert (layout.num_ranks, layout.num_microbatches, layout.replicas) == (1024, 64, 8)
    assert (layout.pipe.num_ranks, layout.pipe.num_microbatches, layout.pipe.num_loops) == (16, 64, 3)


def test_a_ragged_micro_batch_is_a_whole_one_to_the_schedule() -> None:
    layout = Layout(dp=2, micro_batch=4, global_batch=20)
    assert (layout.num_microbatches, layout.pipe.num_microbatches) == (2.5, 3)


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble", "gpipe", "breadth-first"])
def test_schedules_go_depth_first_or_keep_all_micro_batches(schedule: str) -> None:
    assert Layout(schedule=schedule).depth_first == (schedule in {"1f1b", "zero-bubble"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tp": 0}, "positive"),
        ({"dp": 8, "micro_batch": 2, "global_batch": 8}, "it needs 16"),
        ({"recompute": "some"}, "recompute is one of none, selective, full, not 'some'"),
        ({"schedule": "1F1B"}, "schedule is one of 1f1b, .* not '1F1B'"),
        ({"zero_stage": 4}, "zero_stage is one of 0, 1, 2, 3, not 4"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Layout(**given)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="fp32"):
        Engine(precision="fp32")
