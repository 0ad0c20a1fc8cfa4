"""Rates of a network that change the verdict: on both sides of them the search says what they say."""

from dataclasses import replace

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Transformer
from meshwright.clusters.simulated.candidates import Question, Space
from meshwright.clusters.simulated.networks import best_at, sufficient, turn
from meshwright.clusters.simulated.search import search

SMALL = Transformer(layers=16, hidden=2048, heads=16, kv_heads=16, ffn=8192, vocab=50304, sequence=2048)
ASKED = Question(
    model=SMALL,
    cluster=Cluster(gpu=gpu("A100"), num_gpus=32),
    global_batch=64,
    space=Space(max_cp=1, micro_batches=(1, 2), recomputes=("none", "full")),
)


def test_below_the_turn_another_layout_is_best_and_above_it_not() -> None:
    first = search(ASKED, 1).best[0]
    found = turn(ASKED, first)
    assert found is not None
    assert found.bytes_per_s < ASKED.cluster.network
    below, above = (best_at(ASKED, factor * found.bytes_per_s) for factor in (1 / 1.06, 1.01))
    assert below is not None
    assert above is not None
    assert above.axes == first.axes != below.axes
    assert found.instead.axes != first.axes


def test_what_suffices_costs_at_most_a_tenth_and_less_costs_more() -> None:
    first = search(ASKED, 1).best[0]
    rate = sufficient(ASKED, first)
    assert rate is not None
    at, below = best_at(ASKED, rate), best_at(ASKED, rate / 1.06)
    assert at is not None
    assert below is not None
    assert at.sequence_s <= 1.1 * first.sequence_s < below.sequence_s
    generous = sufficient(ASKED, first, within=0.5)
    assert generous is not None
    assert generous < rate


def test_one_node_asks_for_no_network() -> None:
    alone = replace(ASKED, cluster=replace(ASKED.cluster, num_gpus=8))
    first = search(alone, 1).best[0]
    assert turn(alone, first) is None
    assert sufficient(alone, first) is None
    assert best_at(replace(alone, global_batch=1), 1e9) is not None
