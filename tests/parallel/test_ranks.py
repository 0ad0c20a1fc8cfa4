import os
import signal
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from meshwright.parallel import ranks
from meshwright.parallel.collectives import world
from meshwright.parallel.errors import MeshError, RankError
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.ranks import RankPool, default_pool
from meshwright.testing import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def own_ranks() -> Iterator[None]:
    """Ranks for this module alone: it ends them often, and to warm up those of other tests again takes long."""
    pool = RankPool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "default_pool", lambda: pool)
        yield
    pool.close()


def _sum_of_ranks(extra: int) -> float:
    tensor = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(tensor)
    return float(tensor) + extra


def _process() -> int:
    return os.getpid()


def test_every_rank_answers_in_order_and_processes_stay_warm() -> None:
    assert run_ranks(_sum_of_ranks, Mesh(dp=3), 10) == [13.0] * 3
    first = run_ranks(_process, Mesh(dp=3))
    assert run_ranks(_process, Mesh(dp=2)) == first[:2]
    assert run_ranks(lambda: world().rank, Mesh(dp=2)) == [0, 1]


def test_large_results_and_closures_travel() -> None:
    size = 3_000_000
    assert [len(each) for each in run_ranks(lambda: torch.zeros(size), Mesh(dp=2))] == [size, size]


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the culprit")
    dist.barrier()


def test_the_culprit_is_reported_not_its_victims() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*the culprit"):
        run_ranks(_fail_on_one, Mesh(dp=3))
    assert run_ranks(_sum_of_ranks, Mesh(dp=2), 0) == [1.0, 1.0]  # the pool has recovered


def _refuse() -> None:
    raise MeshError("no such mesh")


def test_errors_of_this_library_keep_their_type() -> None:
    with pytest.raises(MeshError, match="no such mesh"):
        run_ranks(_refuse, Mesh(dp=2))


def test_processes_stay_where_every_rank_refused() -> None:
    first = run_ranks(_process, Mesh(dp=2))
    with pytest.raises(MeshError, match="no such mesh"):
        run_ranks(_refuse, Mesh(dp=2))
    assert run_ranks(_process, Mesh(dp=2)) == first
    assert run_ranks(_sum_of_ranks, Mesh(dp=2), 0) == [1.0, 1.0]


def _refuse_on_one() -> None:
    if dist.get_rank() == 1:
        _refuse()
    dist.barrier()


def _wait_for_one_that_refused() -> None:
    if dist.get_rank() == 1:
        _refuse()
    dist.barrier()


def _sleep_beside_one_that_refused() -> None:
    if dist.get_rank() == 1:
        _refuse()
    time.sleep(60)


def test_ranks_that_wait_for_one_that_refused_are_let_go_and_those_that_do_not_hear_it_are_ended() -> None:
    first = run_ranks(_process, Mesh(dp=3))
    with pytest.raises(MeshError, match="no such mesh"):
        run_ranks(_wait_for_one_that_refused, Mesh(dp=3))
    assert run_ranks(_process, Mesh(dp=3)) == first
    assert run_ranks(_sum_of_ranks, Mesh(dp=3), 0) == [3.0] * 3
    with pytest.raises(MeshError, match="no such mesh"):
        run_ranks(_sleep_beside_one_that_refused, Mesh(dp=2))
    assert not set(run_ranks(_process, Mesh(dp=2))) & set(first)


class _EndsWhenCollected:
    def __init__(self) -> None:
        self.myself = self

    def __del__(self) -> None:
        time.sleep(0.5)
        os._exit(9)


def _leave_something_that_ends_this_process() -> int:
    _EndsWhenCollected()
    return os.getpid()


def test_a_rank_that_dies_between_two_calls_is_said_and_costs_the_next_call_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = RankPool()
    try:
        first = pool.run(_leave_something_that_ends_this_process, 2, (), timeout_s=60)
        assert not set(pool.run(_process, 2, (), timeout_s=60)) & set(first)
    finally:
        pool.close()
    assert "2 ranks are started anew" in caplog.text
    assert "died between two calls with exit code 9" in caplog.text


def _nobody_answers(tries: list[float], timeout_s: float) -> NoReturn:
    tries.append(timeout_s)
    raise RankError("nobody answers")


def test_ranks_that_never_meet_are_started_anew_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ranks, "_MEETING_S", 8.0)
    pool = RankPool()
    try:
        first = pool.run(_process, 2, (), timeout_s=60)
        for each in pool._ranks:
            each.get_ready()  # both have left their group
        os.kill(first[1], signal.SIGSTOP)
        assert not set(pool.run(_process, 2, (), timeout_s=60)) & set(first)
        assert "ranks [0, 1] of 2 did not finish within 8 s" in caplog.text
        tries: list[float] = []
        monkeypatch.setattr(ranks, "_collect", lambda _, timeout_s: _nobody_answers(tries, timeout_s))
        with pytest.raises(RankError, match="nobody answers"):
            pool.run(_process, 2, (), timeout_s=60)
        assert len(tries) == 2
    finally:
        pool.close()


def test_a_rank_that_dies_is_named_with_its_code() -> None:
    with pytest.raises(RankError, match="rank 0 died with exit code 7"):
        run_ranks(lambda: os._exit(7) if dist.get_rank() == 0 else time.sleep(0.1), Mesh(dp=2))


def test_a_rank_that_is_killed_is_named_with_its_signal() -> None:
    with pytest.raises(RankError, match=r"rank 1 died with signal 9 \(SIGKILL\)"):
        run_ranks(lambda: os.kill(os.getpid(), signal.SIGKILL) if dist.get_rank() == 1 else time.sleep(60), Mesh(dp=2))


def _sleep_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_a_hang_names_the_rank_and_what_it_does() -> None:
    with pytest.raises(RankError, match=r"(?s)ranks \[1\] of 2 did not finish within 1 s.*_sleep_on_one"):
        run_ranks(_sleep_on_one, Mesh(dp=2), timeout_s=1.0)


def test_closing_a_pool_leaves_no_process() -> None:
    pool = RankPool()
    processes = pool.run(_process, 2, (), timeout_s=60)
    pool.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert default_pool() is not pool
