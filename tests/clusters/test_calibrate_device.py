"""Times of operations: robust to other programs, and there for every part."""

import time
from itertools import cycle

import pytest
import torch

from meshwright.clusters.calibrate_device import measured_device, quartile_s


def test_samples_that_others_made_longer_do_not_count() -> None:
    now_s, spans_s = [0.0], cycle([0.001, 0.001, 0.1])

    def call() -> None:
        now_s[0] += next(spans_s)

    assert quartile_s(call, lambda: None, span_s=0.05, clock=lambda: now_s[0]) == pytest.approx(0.001)


def test_short_calls_are_timed_many_at_a_time() -> None:
    calls = iter(range(10**6))
    assert quartile_s(lambda: next(calls), lambda: None, span_s=0.01) < 1e-5
    assert next(calls) > 1000


def test_one_thread_is_timed_by_its_own_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("another program's seconds would count"))
    try:
        assert measured_device(torch.device("cpu"), brief=True, begin=lambda part: None)["op_s"] > 0
    finally:
        torch.set_num_threads(threads)


def test_every_part_is_measured_and_named() -> None:
    parts: list[str] = []
    found = measured_device(torch.device("cpu"), brief=True, begin=parts.append)
    assert parts == ["products in fp32", "memory", "attention", "starts of operations"]
    seconds = [row[-1] for name in ("products", "memory", "attention", "attention_backward") for row in found[name]]
    assert min(*seconds, found["op_s"], found["layer_s"]) > 0
    assert found["layer_s"] > 3 * found["op_s"]
    assert found["exponentials_per_s"] > found["drawn_per_s"] > 1e6
