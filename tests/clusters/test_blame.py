"""Who failed first, from times, codes and tracebacks alone."""

import pytest

from meshwright.clusters.blame import ErrorRecord, HangRecord, RankEnd, Verdict, judge, traceback_in
from meshwright.parallel.hang import EXIT_CODE

LOST = (
    "Traceback (most recent call last):\n  ...\n"
    "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1\n"
)
OWN = "Traceback (most recent call last):\n  ...\nKeyError: 'a'\n"


def end(rank: int, code: int, time_s: float, *, asked: bool = False) -> RankEnd:
    return RankEnd(rank, "node0", code, time_s, asked)


def first(verdict: Verdict) -> tuple[int, int]:
    assert verdict.first is not None
    return verdict.first.rank, verdict.first.exit_code


def test_the_earliest_death_of_its_own_is_the_first_failure() -> None:
    found = judge([end(0, -15, 3.0, asked=True), end(1, 7, 2.0), end(2, 1, 2.5), end(3, 0, 1.0)])
    assert first(found) == (1, 7)
    assert [victim.rank for victim in found.victims] == [2, 0]
    assert [victim.evidence for victim in found.victims] == ["exited with code 1 later", "was ended by the launcher"]


def test_a_signal_has_its_name_and_128_plus_its_number() -> None:
    found = judge([end(0, -9, 1.0)])
    assert first(found) == (0, 137)
    assert found.first is not None
    assert found.first.signal == "SIGKILL"


def test_a_lost_connection_is_a_victim_even_if_it_died_first() -> None:
    found = judge([end(0, 1, 1.0), end(1, 3, 2.0)], tails={0: LOST, 1: OWN})
    assert first(found) == (1, 3)
    assert found.victims[0].evidence.startswith("lost its connection")


def test_where_all_lost_their_connection_the_earliest_is_blamed() -> None:
    assert first(judge([end(0, 1, 2.0), end(1, 1, 1.0)], tails={0: LOST, 1: LOST})) == (1, 1)


def test_a_record_tells_when_it_happened_not_when_the_process_was_gone() -> None:
    records = {1: ErrorRecord(1, 0.5, OWN, 1)}
    assert first(judge([end(0, 9, 1.0), end(1, 1, 2.0)], records)) == (1, 1)


def test_a_culprit_that_was_ended_while_tearing_down_keeps_the_code_of_its_record() -> None:
    records = {1: ErrorRecord(1, 0.5, OWN, 65)}
    assert first(judge([end(0, 9, 1.0), end(1, -15, 2.0, asked=True)], records)) == (1, 65)


def test_a_traceback_in_a_log_counts_only_against_lost_connections() -> None:
    ended = end(1, -15, 2.0, asked=True)
    assert first(judge([end(0, 1, 1.0), ended], tails={0: LOST, 1: OWN})) == (1, 1)
    assert first(judge([end(0, 4, 1.0), ended], tails={1: OWN})) == (0, 4)
    assert judge([ended], tails={1: OWN}).first is None, "an interrupted run blames nobody"


def test_a_keyboard_interrupt_is_nobodys_fault() -> None:
    stopped = "Traceback (most recent call last):\n  ...\nKeyboardInterrupt\n"
    ends = [end(0, 1, 1.0), end(1, -15, 2.0, asked=True)]
    assert first(judge(ends, tails={0: LOST, 1: stopped})) == (0, 1)


def test_nothing_failed_where_all_ended_well() -> None:
    assert judge([end(0, 0, 1.0)]) == Verdict(None)


@pytest.mark.parametrize("log", ["", "fine\n"])
def test_a_log_without_a_traceback_has_none(log: str) -> None:
    assert traceback_in(log) == ""


def test_the_last_traceback_is_taken() -> None:
    assert traceback_in(f"{LOST}more\n{OWN}") == OWN.rstrip()


def hang(*suspects: int, time_s: float = 5.0) -> HangRecord:
    ranks = {0: "waits for rank 1 at 0RECV_B0", 1: "has not answered", 2: "waits for rank 0 at all_reduce over dp"}
    return HangRecord(time_s, 0, "hang: all of it", suspects, ranks, {0: "stack of 0"})


def test_of_a_hang_the_rank_that_was_behind_is_blamed_though_it_was_ended_by_us() -> None:
    ends = [end(0, 125, 5.1), end(1, -15, 5.3, asked=True), end(2, 125, 5.1)]
    found = judge(ends, hang=hang(1))
    assert first(found) == (1, EXIT_CODE)
    assert found.first is not None
    assert found.first.evidence == "has not answered"
    assert [(each.rank, each.evidence, each.traceback) for each in found.victims] == [
        (0, "waits for rank 1 at 0RECV_B0", "stack of 0"),
        (2, "waits for rank 0 at all_reduce over dp", ""),
    ]
    assert found.hang == "hang: all of it"


def test_where_none_is_behind_the_rank_that_found_it_speaks() -> None:
    assert first(judge([end(0, 125, 5.1), end(1, -15, 5.3, asked=True)], hang=hang())) == (0, EXIT_CODE)


def test_a_rank_that_failed_before_the_hang_is_its_cause() -> None:
    ends = [end(0, 125, 5.1), end(1, -15, 5.3, asked=True)]
    assert first(judge(ends, {1: ErrorRecord(1, 1.0, OWN, 65)}, hang=hang(1))) == (1, 65)


def test_of_the_first_to_fail_it_is_told_what_it_was_last_at_and_what_the_kernel_says() -> None:
    ends = [RankEnd(0, "node0", -9, 1.0, kernel="the kernel killed it"), end(1, 1, 2.0)]
    found = judge(ends, last={0: "all_reduce over dp (number 41) in step 7", 1: "forward in step 7"})
    assert found.first is not None
    assert found.first.evidence == (
        "was killed by SIGKILL; no rank died before it by itself; the kernel killed it; "
        "last: all_reduce over dp (number 41) in step 7"
    )
    assert "last" not in found.victims[0].evidence


def test_what_a_rank_wrote_down_as_it_failed_is_newer_than_what_it_told_before() -> None:
    records = {0: ErrorRecord(0, 1.0, OWN, 1, "backward in step 8")}
    found = judge([end(0, 1, 2.0)], records, last={0: "forward in step 8"})
    assert found.first is not None
    assert found.first.evidence.endswith("; last: backward in step 8")
