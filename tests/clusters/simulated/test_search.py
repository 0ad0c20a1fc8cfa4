"""The search finds what pricing every layout finds, and prices few of them."""

import time
from dataclasses import replace

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Transformer, step
from meshwright.clusters.simulated.candidates import RUNNABLE, Question, Space, groups
from meshwright.clusters.simulated.search import Found, Priced, price, search
from tests.clusters.simulated.settings import GPT_175B, LLAMA_405B, any_question

LLAMA_70B = replace(LLAMA_405B, layers=80, hidden=8192, heads=64, ffn=28672)
LLAMA_8B = replace(LLAMA_405B, layers=32, hidden=4096, heads=32, ffn=14336)
MIXTRAL = replace(LLAMA_8B, vocab=32000, sequence=4096, experts=8, top_k=2)


def _asked(model: Transformer, num_gpus: int, batch: int, kind: str = "H100", **more: object) -> Question:
    cluster = Cluster(gpu=gpu(kind), num_gpus=num_gpus)
    return Question(model=model, cluster=cluster, global_batch=batch, **more)  # type: ignore[arg-type]


def _all(asked: Question) -> list[Priced]:
    """Every layout, priced."""
    return [
        price(asked, group.layout(dp=dp, microbatches=number, schedule=schedule, vpp=vpp, zero_stage=stage))
        for group in groups(asked)
        for dp, number, schedule, vpp, stage in group.choices()
    ]


def _by_brute_force(priced: list[Priced], asked: Question, num_best: int) -> list[Priced]:
    best: dict[object, Priced] = {}
    for each in priced:
        if each.memory_bytes <= asked.cluster.gpu.memory_bytes:
            before = best.setdefault(each.axes, each)
            best[each.axes] = min(before, each, key=lambda one: one.rank)
    return sorted(best.values(), key=lambda each: each.rank)[:num_best]


@pytest.mark.parametrize("seed", range(12))
def test_it_finds_what_pricing_everything_finds_on_any_model_and_cluster(seed: int) -> None:
    asked = any_question(seed)
    if asked.at_most:
        asked = replace(asked, global_batch=8, cluster=replace(asked.cluster, num_gpus=6))
    found, priced = search(asked, 5), _all(asked)
    assert [each.layout for each in found.best] == [each.layout for each in _by_brute_force(priced, asked, 5)]
    assert found.seen == len(priced) == found.pruned + found.too_large + found.priced
    if not found.best:
        assert found.nearest is not None
        assert found.nearest.memory_bytes == min(each.memory_bytes for each in priced)


@pytest.mark.parametrize(
    "asked",
    [
        _asked(LLAMA_8B, 32, 64, space=Space(micro_batches=(1, 2), max_cp=2, recomputes=("none", "full"))),
        _asked(LLAMA_8B, 16, 32, space=replace(RUNNABLE, micro_batches=(1, 2), max_cp=2)),
        _asked(MIXTRAL, 16, 32, space=Space(micro_batches=(1,), max_cp=1, recomputes=("full",))),
    ],
)
def test_it_finds_what_pricing_everything_finds_on_real_models(asked: Question) -> None:
    found = search(asked, 4)
    assert [each.layout for each in found.best] == [each.layout for each in _by_brute_force(_all(asked), asked, 4)]
    assert found.best


def test_ten_thousand_layouts_for_1024_gpus_take_seconds() -> None:
    start_s = time.perf_counter()
    found = search(_asked(LLAMA_70B, 1024, 1024))
    assert found.seen > 100_000
    assert found.priced < 0.05 * found.seen
    assert time.perf_counter() - start_s < 60


def test_layouts_known_before_change_nothing_but_the_work() -> None:
    asked = _asked(LLAMA_8B, 64, 128)
    alone = search(asked, 3)
    helped = search(asked, 3, known=[each.layout for each in alone.best])
    assert helped.best == alone.best
    assert helped.seen == alone.seen
    assert helped.priced <= alone.priced


def test_what_is_offered_fits_and_is_priced_as_it_is() -> None:
    found = search(_asked(GPT_175B, 128, 256, "A100"), 6)
    assert len({each.axes for each in found.best}) == len(found.best) == 6
    for each in found.best:
        assert each.memory_bytes <= 80e9
        assert each.step == step(each.training)
        assert 0.2 < each.mfu < 0.7
        assert each.tokens_per_s == pytest.approx(256 * 2048 / each.step.total_s)
    assert [each.sequence_s for each in found.best] == sorted(each.sequence_s for each in found.best)


def test_when_nothing_fits_the_nearest_is_told() -> None:
    found = search(_asked(LLAMA_405B, 64, 64))
    assert found.best == ()
    assert found.nearest is not None
    assert found.nearest.memory_bytes > 80e9
    assert found.too_large == found.seen


def test_states_that_parallelize_keeps_on_ranks_of_cp_count_there() -> None:
    dealt = _asked(LLAMA_8B, 16, 16)
    kept = replace(dealt, space=RUNNABLE)
    layout = next(each.base for each in groups(dealt) if each.base.cp == 4 and each.base.tp == each.base.pp == 1)
    layout = replace(layout, dp=4, global_batch=16, zero_stage=1)
    assert price(kept, layout).memory_bytes - price(dealt, layout).memory_bytes == pytest.approx(
        12 * LLAMA_8B.parameters * (1 / 4 - 1 / 16)
    )
    assert price(kept, layout).step == price(dealt, layout).step


def test_an_empty_space_finds_nothing() -> None:
    found: Found = search(_asked(LLAMA_8B, 37, 3))
    assert (found.best, found.nearest, found.seen) == ((), None, 0)
