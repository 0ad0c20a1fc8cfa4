"""An agent that is asked to end does what its launcher says of it, and ends without a word."""

import time

import pytest

from meshwright.clusters.asking import Asking


@pytest.mark.parametrize(("command", "ends"), [("leave", False), ("stop", False), ("alive", True), (None, True)])
def test_only_a_word_of_the_launcher_that_came_since_keeps_an_agent_from_ending(
    command: str | None, ends: bool
) -> None:
    said: list[str] = []
    asking = Asking(said.append, lambda: said.append("ends"), silent_s=lambda: 0.0, word_s=0.5)
    asking.hear("leave")
    asking()
    time.sleep(0.2)
    assert said == ["asked"]
    if command is not None:
        asking.hear(command)
    time.sleep(0.6)
    assert said == ["asked", "ends"][: 1 + ends]


def test_a_launcher_that_is_not_heard_of_any_more_gives_no_word_that_were_waited_for() -> None:
    said: list[str] = []
    Asking(said.append, lambda: said.append("ends"), silent_s=lambda: 7.0, word_s=60.0)()
    end_s = time.monotonic() + 20.0
    while "ends" not in said and time.monotonic() < end_s:
        time.sleep(0.01)
    assert said == ["asked", "ends"]
