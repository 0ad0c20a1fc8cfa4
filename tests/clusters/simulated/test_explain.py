"""Explanations: causes add up to the difference, options differ in one thing, ways out lead to what fits."""

from dataclasses import replace

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Transformer
from meshwright.clusters.simulated.candidates import Question
from meshwright.clusters.simulated.explain import differences, options, ways_out, words
from meshwright.clusters.simulated.search import price, search

SMALL = Transformer(layers=24, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, sequence=4096, gated=True)


def _asked(num_gpus: int = 16, kind: str = "A100", memory_bytes: float | None = None) -> Question:
    found = gpu(kind)
    found = replace(found, memory_bytes=memory_bytes or found.memory_bytes)
    return Question(model=SMALL, cluster=Cluster(gpu=found, num_gpus=num_gpus), global_batch=32)


def test_causes_add_up_to_the_difference_of_equally_many_sequences() -> None:
    asked = _asked()
    first, *others = search(asked, 5).best
    for other in [*others, price(replace(asked, global_batch=16), replace(others[0].layout, global_batch=16 * 4))]:
        found = differences(first, other)
        scale = first.layout.global_batch / other.layout.global_batch
        assert sum(found.values()) == pytest.approx(scale * other.step.total_s - first.step.total_s)
        assert [*map(abs, found.values())] == sorted(map(abs, found.values()), reverse=True)


def test_words_say_how_much_slower_and_for_what() -> None:
    asked = _asked()
    first = search(asked, 1).best[0]
    again = price(asked, replace(first.layout, recompute="full"))
    assert words(first, first) == "+0.0%"
    assert "recomputing +" in words(first, again)
    assert words(first, again, num_causes=1).count(" s") == 1


def test_options_differ_in_one_thing_and_say_by_how_much_they_do_not_fit() -> None:
    asked = _asked()
    first = search(asked, 1).best[0]
    found = options(asked, first)
    kinds = {each.changed.split(" ")[0] for each in found}
    assert kinds >= {"recompute", "zero", "schedule"}
    for each in found:
        assert each.over_bytes == max(0.0, each.priced.memory_bytes - 80e9)
        assert each.over_bytes > 0 or each.priced.rank > first.rank, "the first is the best of all"
    assert [each.over_bytes > 0 for each in found] == sorted(each.over_bytes > 0 for each in found)
    assert any(each.over_bytes > 0 for each in found)


def test_ways_out_fit_and_half_of_each_does_not() -> None:
    asked = _asked(4, memory_bytes=30e9)
    assert not search(asked, 1).best
    more, *shorter = ways_out(asked)
    assert more.text == f"{more.priced.layout.num_ranks} GPUs instead of 4"
    for each in (more, *shorter):
        assert each.priced.memory_bytes <= 30e9
    fewer = _asked(more.priced.layout.num_ranks // 2, memory_bytes=30e9)
    assert not search(fewer, 1).best


def test_a_shorter_sequence_is_a_way_out_where_activations_are_what_does_not_fit() -> None:
    asked = _asked(8, memory_bytes=30e9)
    long = replace(asked, model=replace(SMALL, sequence=1 << 17), space=replace(asked.space, max_cp=1))
    texts = [each.text for each in ways_out(long)]
    assert any(text.startswith("sequences of") and text.endswith("instead of 131072") for text in texts)


def test_where_no_change_helps_there_is_none() -> None:
    assert ways_out(_asked(2, memory_bytes=1e9)) == []
