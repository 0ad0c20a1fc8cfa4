"""Who is behind, from what ranks said last; nothing else is asked."""

import pytest

from meshwright.parallel.hang import PATIENCE_S, Hang, Note, Sight, find_hang

LIMIT_S = 20.0


def at(words: str, age_s: float, *waits_for: int, step: int = 7, call: str = "") -> Sight:
    return Sight(Note(words, age_s, step, waits_for, call))


def found(*sights: Sight) -> Hang:
    hang = find_hang(dict(enumerate(sights)), LIMIT_S)
    assert hang is not None
    return hang


def reduce(rank: int, age_s: float, number: int = 3, ranks: int = 4) -> Sight:
    call = f"all_reduce over dp (number {number})"
    return at(call, age_s, *(other for other in range(ranks) if other != rank), call=call)


def test_a_chain_of_waits_ends_at_the_rank_that_computes() -> None:
    hang = found(at("0RECV_B1", 40.0, 1), at("1RECV_B1", 30.0, 2), at("2F1", 21.0))
    assert hang.suspects == (2,)
    assert hang.line == (
        "hang: rank 2 has been at step 7, 2F1 for 21 s; rank 0 waits for rank 1 at step 7, 0RECV_B1; "
        "rank 1 waits for rank 2 at step 7, 1RECV_B1"
    )


def test_a_rank_that_no_longer_answers_is_behind_whatever_it_was_at() -> None:
    silent = Sight(Note("1RECV_F0", 0.2, 7, (0,), place="pp=1, dp=1"), 21.0, "its process is stopped")
    hang = found(at("0RECV_B0", 22.0, 1), silent)
    assert hang.suspects == (1,)
    assert (
        "rank 1 (pp=1, dp=1) has not answered for 21 s (its process is stopped); it was last heard of at" in hang.line
    )


def test_one_that_all_wait_for_is_behind_though_it_moved_last() -> None:
    hang = found(reduce(0, 90.0), reduce(1, 80.0), reduce(2, 70.0), at("reading a batch", 20.5))
    assert hang.suspects == (3,)
    assert hang.ranks[0] == "waits for rank 3 at step 7, all_reduce over dp (number 3)"


def test_a_rank_that_computes_and_that_nobody_waits_for_is_no_suspect() -> None:
    hang = found(at("0RECV_B0", 30.0, 1), at("1F0", 25.0), at("own code", 99.0))
    assert hang.suspects == (1,)


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    hang = found(at("a", 30.0, 1), at("b", 30.0, 2), at("c", 30.0, 1), at("d", 30.0, 0))
    assert hang.suspects == (1, 2)
    assert hang.line.startswith("hang: ranks 1, 2 wait for each other; rank 1 waits for rank 2 at step 7, b; ")


def test_two_collectives_of_one_group_wait_for_each_other() -> None:
    assert found(reduce(0, 30.0, 3, ranks=2), reduce(1, 30.0, 4, ranks=2)).suspects == (0, 1)


def test_the_same_call_met_from_different_actions_is_one_call() -> None:
    call = "all_reduce over pp (number 5)"
    hang = found(at(f"0REDUCE: {call}", 30.0, 1, call=call), at(f"1REDUCE: {call}", 30.0, 0, call=call))
    assert hang.suspects == ()
    assert hang.line.startswith("hang: every rank waits, and none is missing; rank 0 waits at step 7, 0REDUCE")


def test_a_call_that_did_not_say_that_it_waits_is_known_by_its_function() -> None:
    inside = Sight(Note("backward", 25.0, 7, inside="reduce_scatter"))
    hang = found(inside, inside, at("reading a batch", 24.0))
    assert hang.suspects == (2,)
    assert hang.ranks[1] == "waits for rank 2 at step 7, backward, inside reduce_scatter"


def test_a_rank_that_left_is_behind_where_others_wait_for_it() -> None:
    hang = found(reduce(0, 30.0, ranks=2), Sight(Note("own code", 0.0, left=True), 0.0))
    assert hang.suspects == (1,)
    assert "rank 1 has left" in hang.line


@pytest.mark.parametrize("moved_s", [0.0, 19.9])
def test_nothing_hangs_while_one_rank_moves(moved_s: float) -> None:
    assert find_hang({0: reduce(0, 900.0, ranks=2), 1: at("1B3", moved_s)}, LIMIT_S) is None


def test_a_word_that_is_late_counts_from_when_it_was_heard() -> None:
    assert find_hang({0: reduce(0, 30.0, ranks=2), 1: Sight(Note("1F0", 2.0, 7), 17.0)}, LIMIT_S) is None
    assert found(reduce(0, 30.0, ranks=2), Sight(Note("1F0", 3.0, 7), 18.0)).suspects == (1,)


def test_a_rank_that_may_take_long_gives_all_of_them_time() -> None:
    patient = Note("saving", PATIENCE_S - 1, None, patient=True)
    assert find_hang({0: reduce(0, 9999.0, ranks=2), 1: Sight(patient)}, LIMIT_S) is None
    late = Note("saving", PATIENCE_S + 1, None, patient=True)
    assert found(reduce(0, 9999.0, ranks=2), Sight(late)).suspects == (1,)


def test_a_rank_that_fell_silent_as_it_saved_gives_nobody_time_but_one_that_was_never_heard_does() -> None:
    saving = Note("saving", 0.5, None, patient=True)
    silent = found(reduce(0, 99.0, ranks=2), Sight(saving, 98.0))
    assert silent.suspects == (1,)
    assert "rank 1 has not answered for 98 s; it was last heard of at saving" in silent.line
    assert find_hang({0: reduce(0, 99.0, ranks=2), 1: Sight(saving, 0.5)}, LIMIT_S) is None
    assert find_hang({0: reduce(0, 99.0, ranks=2), 1: Sight(saving, 98.0, heard=False)}, LIMIT_S) is None


def test_a_rank_that_saves_and_waits_for_one_that_fell_silent_gives_nobody_time() -> None:
    saving = Sight(Note("saving", 30.0, None, inside="gather", patient=True))
    stopped = Sight(Note("forward", 0.1, 12), 30.0, "its process is stopped by a signal")
    hang = found(saving, stopped)
    assert hang.suspects == (1,)
    assert hang.line.startswith("hang: rank 1 has not answered for 30 s (its process is stopped by a signal); ")
    writing = Sight(Note("saving", 30.0, None, patient=True))
    assert find_hang({0: writing, 1: stopped}, LIMIT_S) is None, "it gets on by itself, and the other may yet come"
    answering = Sight(Note("saving", 30.0, None, inside="gather", patient=True), 1.0)
    assert find_hang({0: saving, 1: answering}, LIMIT_S) is None, "a gather of much may take long"


def test_a_job_whose_ranks_have_all_left_does_not_hang() -> None:
    assert find_hang({0: Sight(Note("own code", 99.0, left=True), 99.0)}, LIMIT_S) is None


def test_of_a_thousand_ranks_a_few_are_named() -> None:
    hang = found(at("own code", 30.0), *(at("r", 30.0, 0) for _ in range(999)))
    assert "and 991 more" in hang.line
    assert len(hang.line) < 1000
