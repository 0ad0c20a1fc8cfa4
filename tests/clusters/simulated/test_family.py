"""The claim of the 2021 paper in the whole simulator: layered accumulation in a modular pipeline halves the time."""

from dataclasses import replace
from functools import cache

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Layout, Training, memory, step
from meshwright.clusters.simulated.candidates import Space
from meshwright.clusters.simulated.family import CONTIGUOUS, ENGINE, MODULAR, Family, at_peak, fastest, promised
from meshwright.clusters.simulated.search import Priced
from meshwright.parallel.pipeline.closed_form import Pipe

X_160 = Family(160)
INFINIBAND, ETHERNET = 25e9, 25e9 / 8  # 200 and 25 Gb/s, in one direction


@cache
def _fastest(space: Space, network: float = INFINIBAND, *, peak: bool = True) -> Priced:
    return fastest(X_160, gpu("A100"), space, network_bytes_per_s=network, peak=peak)


def _training(**layout: int | str) -> Training:
    dealt = replace(Layout(recompute="full", sequence_parallel=True), **layout)  # type: ignore[arg-type]
    cluster = Cluster(gpu=promised(gpu("A100")), num_gpus=dealt.num_ranks, gpus_per_node=16, network_bytes_per_s=25e9)
    return Training(model=X_160.model, layout=dealt, cluster=cluster, engine=ENGINE, efficiency=at_peak())


@pytest.mark.slow
def test_x_160_trains_in_at_most_three_fifths_of_the_time_of_the_best_contiguous_layout() -> None:
    modular, contiguous = _fastest(MODULAR), _fastest(CONTIGUOUS)
    for each in (modular, contiguous):
        assert each.layout.num_ranks <= 40_000
        assert each.layout.global_batch <= X_160.critical_sequences
        assert each.memory_bytes <= 80e9
    assert modular.sequence_s / contiguous.sequence_s <= 0.6, (modular.layout, contiguous.layout)


@pytest.mark.slow
def test_the_ratio_holds_with_what_hardware_reaches() -> None:
    modular, contiguous = (_fastest(space, peak=False) for space in (MODULAR, CONTIGUOUS))
    assert modular.sequence_s / contiguous.sequence_s <= 0.7


@pytest.mark.slow
def test_over_ethernet_it_is_still_faster_than_the_best_contiguous_layout_over_infiniband() -> None:
    slow = _fastest(MODULAR, ETHERNET)
    assert slow.sequence_s < 0.75 * _fastest(CONTIGUOUS).sequence_s
    assert slow.sequence_s < 1.4 * _fastest(MODULAR).sequence_s


def test_the_layout_of_the_paper_keeps_six_gigabytes_of_states_and_checkpoints_and_waits_little() -> None:
    """483 x 5 x 16 GPUs, 5 micro-batches of one sequence, parameters shared by all replicas."""
    training = _training(
        dp=483, pp=5, tp=16, vpp=32, schedule="breadth-first", zero_stage=3, global_batch=2415, micro_batch=1
    )
    found, needed = step(training), memory(training)
    assert found.pp_bubble_s / (found.compute_s + found.recompute_s + found.tp_s) == pytest.approx(0.025)
    assert needed.activations_bytes == pytest.approx(1.31e9, rel=0.01)
    assert needed.state_bytes + needed.activations_bytes < 10e9
    assert found.dp_s < 0.05 * found.total_s


def test_shared_parameters_are_hidden_when_gathered_once_a_step_and_not_when_gathered_for_each_micro_batch() -> None:
    settings = {"dp": 96, "tp": 16, "global_batch": 96 * 25, "zero_stage": 3}
    layered, plain = (step(_training(**settings, schedule=each)) for each in ("breadth-first", "1f1b"))
    whole = step(_training(**settings | {"zero_stage": 1}, schedule="breadth-first"))
    assert layered.total_s == pytest.approx(whole.total_s, rel=0.01)
    assert plain.total_s > 1.2 * layered.total_s


def test_a_step_at_peak_is_its_flops_and_what_tensor_parallelism_sends() -> None:
    """8 p b tokens with recomputation; six all-reduces of a layer's stream over NVLink's 300 GB/s in each direction."""
    training = _training(dp=64, tp=16, schedule="breadth-first", global_batch=2400 // 64 * 64)
    found = step(training)
    tokens = training.layout.global_batch * X_160.model.sequence
    flops = tokens * X_160.model.flops_per_token(recompute=True)
    assert found.compute_s + found.recompute_s == pytest.approx(flops / training.cluster.num_gpus / 312e12, rel=1e-3)
    sent = 6 * 2 * 2 * X_160.model.hidden * (tokens / 64) * 160 * 15 / 16
    assert found.tp_s == pytest.approx(sent / 300e9)


def test_the_bubble_alone_gives_about_half() -> None:
    """The layouts that the paper is remembered to name: 38,640 devices against 35,840, with no network at all."""
    modular = (1 + float(Pipe(5, 5, 32).bubble)) / (483 * 5 * 16)
    contiguous = (1 + float(Pipe(160, 172).bubble)) / (14 * 160 * 16)
    assert modular / contiguous == pytest.approx(0.49, abs=0.01)


def test_what_fits_nowhere_is_refused() -> None:
    tiny = replace(gpu("A100"), memory_bytes=1e6)
    with pytest.raises(ValueError, match="X_32"):
        fastest(Family(32), tiny, replace(MODULAR, micro_batches=(1,), zero_stages=(0,)))
