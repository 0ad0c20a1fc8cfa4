"""Only what was written with the key, under that name and for that attempt, is read; the rest is said once."""

import pytest

from meshwright.parallel.keyed import Keyed, derived

KEY = bytes(range(32))


def test_what_is_of_another_key_name_or_attempt_or_was_changed_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    ours = Keyed(KEY, "run r1, attempt 1")
    signed = ours.signed("decided", "äyes")
    assert ours.opened("decided", signed.encode()) == "äyes"
    assert capfd.readouterr().err == ""
    others = (
        Keyed(KEY[::-1], "run r1, attempt 1").signed("decided", "äyes"),
        Keyed(KEY, "run r1, attempt 0").signed("decided", "äyes"),
        ours.signed("failure/0", "äyes"),
        signed.replace("yes", "no"),
        "äyes",
        "",
        "é" * 100,
    )
    for other in others:
        assert ours.opened("decided", other.encode()) is None, other
    assert ours.opened("decided", b"\xff" * 100) is None
    told = "meshwright: decided in the store was not written by this run, and is ignored; who reaches its port?\n"
    assert capfd.readouterr().err == told, "once"
    ours.opened("failure/1", b"x")
    assert "failure/1 in the store" in capfd.readouterr().err


def test_names_and_texts_cannot_be_told_apart_otherwise() -> None:
    ours = Keyed(KEY, "r")
    assert ours.opened("a", ours.signed("ab", "c").encode()) is None
    assert ours.opened("ab", ours.signed("a", "bc").encode()) is None


def test_a_key_of_ranks_does_not_open_what_agents_say() -> None:
    agents, ranks = Keyed(KEY, "r"), Keyed(derived(KEY, "board"), "r")
    assert agents.opened("a", ranks.signed("a", "x").encode()) is None
