"""A training that is warned leaves with the others, and one that nothing warns pays nothing."""

import os
import signal

import pytest

from meshwright.launch.worker.leave import Leave


def refuse(value: int) -> list[int]:
    raise AssertionError("nobody is to be asked")


def test_without_a_warner_nobody_is_asked() -> None:
    assert Leave({})(refuse) is False


def test_the_warning_of_any_rank_decides_for_all() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    try:
        leave = Leave({"MESHWRIGHT_SAVE_SIGNAL": "USR2"})
        assert leave(lambda value: [value, 0]) is False
        assert leave(lambda value: [value, 1]) is True, "another rank was told"
        assert leave(refuse) is True, "it stays decided"
        other = Leave({"MESHWRIGHT_SAVE_SIGNAL": "USR2"})
        os.kill(os.getpid(), signal.SIGUSR2)
        assert other(lambda value: [value, 0]) is True
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_name_that_is_no_signal_is_an_error_at_once() -> None:
    with pytest.raises(KeyError, match="SIGNONE"):
        Leave({"MESHWRIGHT_SAVE_SIGNAL": "NONE"})
