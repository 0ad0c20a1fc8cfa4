"""The claim of the 2021 paper, from closed forms alone: layered accumulation and a modular pipeline halve the time."""

from collections.abc import Iterator
from functools import cache

import pytest

from meshwright.parallel.pipeline.closed_form import Pipe
from meshwright.parallel.pipeline.sizing import Device, Family, Layout, memory_bytes, step_s, tokens_to_hide

_MODEL, _DEVICE = Family(160), Device()
_MOST_DEVICES, _MOST_SAMPLES = 40_000, int(_MODEL.critical_samples)
_DIVISORS = [each for each in range(1, _MODEL.x + 1) if _MODEL.x % each == 0]  # layers and heads are dealt evenly
_ISLAND = 16  # devices that NVLink joins


def _starts(layered: bool) -> list[tuple[float, tuple[int, int, int]]]:
    """Ranks along all axes, in the order of what they would take with a perfect network."""
    found = []
    for pipe in _DIVISORS:
        for tensor in (each for each in _DIVISORS if each <= _ISLAND):
            for data in range(1, min(_MOST_SAMPLES, _MOST_DEVICES // (pipe * tensor)) + 1):
                ranks = pipe, tensor, data
                found.append((_least_s(ranks, _MOST_SAMPLES // data, layered), ranks))
    return sorted(found)


def _least_s(ranks: tuple[int, int, int], microbatches: int, layered: bool) -> float:
    """Time of a sample that no layout of these numbers can be below."""
    pipe, tensor, data = ranks
    alone = Layout(data=1, pipe=1, tensor=tensor, num_microbatches=1, schedule="modular", zero_stage=0)
    bubble = Pipe(pipe, microbatches, _MODEL.x // pipe if layered else 1).bubble
    return _step_alone_s(alone) / (data * pipe) * (1 + float(bubble))


@cache
def _step_alone_s(layout: Layout) -> float:
    return step_s(_MODEL, layout, Device(network_bytes_per_s=1e30))


def _best(schedules: tuple[str, ...], zero_stages: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[float, Layout]:
    """The layout that fits into memory and takes the least time for a sample, among all there are."""
    layered = schedules == ("modular",)
    best_s, best = float("inf"), None
    for least_s, ranks in _starts(layered):
        if least_s >= best_s:
            break
        pipe, tensor, data = ranks
        for samples, number in _batches(_MOST_SAMPLES // data):
            if _least_s(ranks, number, layered) >= best_s:
                continue
            for schedule, zero_stage in ((each, stage) for each in schedules for stage in zero_stages):
                layout = Layout(
                    data=data,
                    pipe=pipe,
                    tensor=tensor,
                    num_microbatches=number,
                    microbatch_samples=samples,
                    zero_stage=zero_stage,
                    schedule=schedule,
                )
                found_s = step_s(_MODEL, layout, _DEVICE) / layout.batch_samples
                if found_s < best_s and memory_bytes(_MODEL, layout) <= _DEVICE.memory_bytes:
                    best_s, best = found_s, layout
    assert best is not None, schedules
    return best_s, best


def _batches(most: int) -> Iterator[tuple[int, int]]:
    for samples in range(1, most + 1):
        for number in range(most // samples, 0, -1):
            yield samples, number


_CONTIGUOUS = ("gpipe", "1f1b")


@cache
def _fastest() -> tuple[tuple[float, Layout], tuple[float, Layout]]:
    return _best(("modular",)), _best(_CONTIGUOUS)


@pytest.mark.slow
def test_x_160_trains_in_at_most_three_fifths_of_the_time_of_the_best_contiguous_layout() -> None:
    (modular_s, modular), (contiguous_s, contiguous) = _fastest()
    for layout in (modular, contiguous):
        assert layout.num_devices <= _MOST_DEVICES
        assert layout.batch_samples <= _MODEL.critical_samples
        assert memory_bytes(_MODEL, layout) <= 80e9
    assert modular_s / contiguous_s <= 0.6, (modular, contiguous)


@pytest.mark.slow
def test_the_search_finds_the_layout_of_the_paper() -> None:
    found = _fastest()[0][1]
    assert (found.data, found.pipe, found.tensor, found.num_microbatches, found.microbatch_samples) == (
        483,
        5,
        16,
        5,
        1,
    )


@pytest.mark.slow
def test_shared_parameters_cost_next_to_nothing_when_gathered_once_a_step_and_free_the_memory() -> None:
    modular_s, _ = _fastest()[0]
    partitioned_s, partitioned = _best(("modular",), (3,))
    assert partitioned_s <= 1.05 * modular_s
    assert memory_bytes(_MODEL, partitioned) <= 10e9
    assert partitioned.num_microbatches * _MODEL.tokens >= tokens_to_hide(_DEVICE, 3)


def test_the_bubble_alone_gives_about_half() -> None:
    """The layouts that the paper is remembered to name: 38,640 devices against 35,840, with no network at all."""
    modular = (1 + float(Pipe(5, 5, 32).bubble)) / (483 * 5 * 16)
    contiguous = (1 + float(Pipe(160, 172).bubble)) / (14 * 160 * 16)
    assert modular / contiguous == pytest.approx(0.49, abs=0.01)
