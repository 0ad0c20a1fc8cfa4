"""The launcher's own exit codes mean the same everywhere."""

import os

import pytest

from meshwright.clusters.failure import kind_of
from meshwright.launch.exits import Exit


def test_codes_are_those_of_sysexits_and_none_looks_like_a_signal() -> None:
    names = ("USAGE", "UNAVAILABLE", "IOERR", "NOPERM", "TEMPFAIL", "DATAERR", "SOFTWARE")
    known = (Exit.USAGE, Exit.UNAVAILABLE, Exit.IO, Exit.PERMISSION, Exit.PREEMPTED, Exit.BAD_JOB, Exit.INTERNAL)
    assert [getattr(os, f"EX_{name}") for name in names] == [int(each) for each in known]
    assert all(each < 126 for each in Exit)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(Exit.USAGE, "config"), (Exit.BAD_JOB, "config"), (Exit.PREEMPTED, "preempt"), (Exit.HANG, "hang")],
)
def test_agents_take_them_for_what_they_are(code: Exit, kind: str) -> None:
    assert kind_of(code, "") == kind
