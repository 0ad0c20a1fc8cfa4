"""Who forks does not wait for ever for who asks a driver, and who asks waits for who forks."""

from threading import Event, Thread

from meshwright.clusters.turns import Turns


def test_who_forks_is_told_that_somebody_is_still_asking() -> None:
    turns, asking, answered = Turns(), Event(), Event()

    def ask() -> None:
        with turns:
            asking.set()
            answered.wait(60)

    thread = Thread(target=ask)
    thread.start()
    assert asking.wait(60)
    with turns.still(0.01) as free:
        assert not free
    answered.set()
    thread.join(60)
    with turns.still(60) as free:
        assert free


def test_nobody_asks_while_somebody_forks() -> None:
    turns, asked = Turns(), Event()

    def ask() -> None:
        with turns:
            asked.set()

    thread = Thread(target=ask)
    with turns.still(60):
        thread.start()
        assert not asked.wait(0.1)
    thread.join(60)
    assert asked.is_set()
