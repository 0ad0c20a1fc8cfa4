"""Operations that cost a CPU more than their bytes are timed one by one, by the names that a trace counts them by."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.clusters.calibrate_functions import _calls, measured_functions, streamed, streamed_s
from meshwright.parallel.work import FUNCTIONS
from tests.parallel.counting import Counting


def _called(call):  # type: ignore[no-untyped-def]
    """A clock that calls, and says how long that took: two seconds."""
    call()
    return 2.0


def test_every_function_that_a_trace_counts_is_timed() -> None:
    assert set(measured_functions(_called)) == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_timed_is_counted_under_its_name_with_its_bytes(name: str) -> None:
    rows = torch.randn(512, 256)
    _, call = _calls(rows, torch.randn(512, 256))[name]
    with Counting() as counting:
        call()
    num_bytes, took_s = measured_functions(_called)[name]
    assert counting.tally.computed == {name: rows.numel()}
    assert counting.tally.moved_bytes == pytest.approx(
        num_bytes * rows.numel(), rel=0.02
    )  # rows' sums and scales besides
    assert took_s == 2.0 / rows.numel()


def test_vectors_are_taken_in_turns_so_that_no_cache_holds_them() -> None:
    seen: list[int] = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.extend(each.data_ptr() for each in args)
            return func(*args, **(kwargs or {}))

    def timed(call) -> float:  # type: ignore[no-untyped-def]
        with Looking():  # type: ignore[no-untyped-call]
            for _ in range(4):
                call()
        return 1.0

    assert streamed_s(2**20, timed) == 1.0
    assert len(seen) == len(set(seen)) == 8  # of vectors of 4 MiB


def test_bytes_of_a_stream_are_those_of_two_operands_and_a_result() -> None:
    assert [size for size, _ in streamed(lambda _: 1.0)] == [12.0 * 2**power for power in (14, 16, 17, 18, 19)]
