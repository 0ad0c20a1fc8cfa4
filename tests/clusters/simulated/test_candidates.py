"""Candidates: all legal layouts, each once, counted without being listed."""

from dataclasses import replace
from itertools import product

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Layout, Transformer
from meshwright.clusters.simulated.candidates import RUNNABLE, Group, Question, Space, groups
from meshwright.clusters.simulated.search import price

SMALL = Transformer(layers=8, hidden=512, heads=8, kv_heads=4, ffn=2048, vocab=1000, sequence=256)
SPARSE = replace(SMALL, experts=8, top_k=2)


def _asked(num_gpus: int = 16, batch: int = 24, model: Transformer = SMALL, **more: object) -> Question:
    settled = {"space": Space(max_cp=2)} | more
    return Question(
        model=model,
        cluster=Cluster(gpu=gpu("A100"), num_gpus=num_gpus),
        global_batch=batch,
        **settled,  # type: ignore[arg-type]
    )


def _listed(asked: Question) -> list[Layout]:
    return [
        group.layout(dp=dp, microbatches=number, schedule=schedule, vpp=vpp, zero_stage=stage)
        for group in groups(asked)
        for dp, number, schedule, vpp, stage in group.choices()
    ]


@pytest.mark.parametrize("model", [SMALL, SPARSE])
@pytest.mark.parametrize("at_most", [False, True])
@pytest.mark.parametrize(("num_gpus", "batch"), [(8, 12), (12, 7), (1, 3)])
def test_every_layout_is_there_once_and_counted(model: Transformer, at_most: bool, num_gpus: int, batch: int) -> None:
    asked = _asked(num_gpus, batch, model, at_most=at_most)
    found = _listed(asked)
    assert len(set(found)) == len(found) == sum(each.size for each in groups(asked)) > 0
    assert found == _listed(asked)
    for layout in found:
        assert (layout.num_ranks <= num_gpus) if at_most else (layout.num_ranks == num_gpus)
        assert (layout.global_batch <= batch) if at_most else (layout.global_batch == batch)
        assert layout.num_microbatches == int(layout.num_microbatches)


def test_degrees_divide_what_they_share() -> None:
    for layout in _listed(_asked(model=SPARSE)):
        assert SMALL.heads % layout.tp == SMALL.sequence % layout.cp == 0
        assert (layout.dp * layout.cp) % layout.ep == SPARSE.experts % layout.ep == 0
        assert layout.vpp == 1 or SMALL.layers % (layout.pp * layout.vpp) == 0
        assert layout.tp > 1 or not layout.sequence_parallel
        assert layout.dp * layout.cp > 1 or layout.zero_stage == 0
        if layout.vpp > 1 and layout.schedule == "1f1b":
            assert layout.num_microbatches % layout.pp == 0


def test_all_kinds_are_offered() -> None:
    found = _listed(_asked())
    assert {each.schedule for each in found} == {"1f1b", "gpipe", "breadth-first", "zero-bubble"}
    assert {each.vpp for each in found if each.schedule == "breadth-first" and each.pp == 2} == {2, 4}
    assert {each.vpp for each in found if each.schedule == "1f1b" and each.pp == 4} == {1, 2}
    assert {each.zero_stage for each in found} == {0, 1, 2, 3}
    assert {each.recompute for each in found} == {"none", "selective", "full"}
    assert {each.micro_batch for each in found} >= {1, 2, 3, 4, 6, 8, 12, 24}


def test_stage_2_is_offered_where_gradients_are_reduced_once_a_step() -> None:
    for layout in _listed(_asked()):
        assert layout.zero_stage != 2 or layout.schedule == "breadth-first" or layout.num_microbatches == 1


def test_what_parallelize_cannot_run_is_not_offered() -> None:
    asked = _asked(space=replace(RUNNABLE, max_cp=2))
    found = _listed(asked)
    assert found
    for layout in found:
        assert layout.recompute != "selective"
        assert not (layout.cp > 1 and layout.sequence_parallel)
        assert layout.dp > 1 or layout.zero_stage == 0
    assert not any(each.base.pp == 5 for each in groups(replace(asked, at_most=True)))  # 8 + 2 would be 5 stages of 2


def test_contiguous_spaces_have_one_stage_for_each_rank() -> None:
    found = _listed(_asked(space=Space(contiguous=True, max_cp=1)))
    assert {each.vpp for each in found} == {1}
    assert all(each.pp == 1 for each in found if each.schedule == "breadth-first")


def test_a_batch_that_nothing_divides_has_no_layouts_and_none_at_all_is_refused() -> None:
    assert not _listed(_asked(num_gpus=11, batch=3))
    with pytest.raises(ValueError, match="global_batch 0"):
        _asked(batch=0)


def test_a_group_lists_most_replicas_first() -> None:
    group: Group = next(iter(groups(_asked(at_most=True))))
    assert list(group.replicas)[:2] == [16, 15]
    assert [list(group.microbatches(dp)) for dp in (16, 12, 11, 8, 6, 1)] == [
        [1],
        [2],
        [],
        [3],
        [4],
        [*range(24, 12, -1)],
    ]


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_of_layouts_with_equal_micro_batches_the_one_with_more_replicas_takes_less_for_a_sequence(
    zero_stage: int,
) -> None:
    """Why no fewer are offered than GPUs and batch allow, once they are on several nodes."""
    asked = _asked(4096, 512, replace(SMALL, heads=16, kv_heads=16, hidden=4096, ffn=16384), at_most=True)
    for network in (None, 1e8):
        slow = replace(asked, cluster=replace(asked.cluster, network_bytes_per_s=network))
        for schedule, pp, tp in product(("1f1b", "breadth-first"), (1, 4), (1, 8)):
            base = Layout(pp=pp, tp=tp, vpp=2 if pp > 1 and schedule != "1f1b" else 1, schedule=schedule)
            layouts = [
                replace(base, dp=dp, global_batch=4 * dp, zero_stage=zero_stage) for dp in (9, 12, 16, 17, 40, 64)
            ]
            found = [price(slow, each) for each in layouts]
            assert [each.sequence_s for each in found] == sorted((each.sequence_s for each in found), reverse=True)
            assert [each.memory_bytes for each in found] == sorted((each.memory_bytes for each in found), reverse=True)
