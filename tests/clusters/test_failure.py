"""The kind of a failure follows from its exit code, its signal and its last words."""

import pytest

from meshwright.clusters.blame import ErrorRecord, HangRecord, RankEnd, judge
from meshwright.clusters.failure import failure_of, kind_of

TRACE = "Traceback (most recent call last):\n  File 'x', line 1\n"
LOST = TRACE + "RuntimeError: Connection closed by peer [127.0.0.1]:1"


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (7, "", "exit"),
        (1, TRACE + "KeyError: 'a'", "exit"),
        (1, TRACE + "ModuleNotFoundError: No module named 'flash'", "import_error"),
        (1, "  File 'x.py', line 3\n    def f(:\n          ^\nSyntaxError: invalid syntax", "import_error"),
        (1, "ImportError: optional thing, ignored\n" + 9 * "step\n" + TRACE + "KeyError: 'a'", "exit"),
        (65, TRACE + "meshwright.parallel.errors.WrapError: tp=3", "config"),
        (127, "meshwright: cannot start 'trian'", "config"),
        (2, "usage: train.py [-h]\ntrain.py: error: unrecognized arguments: --x", "config"),
        (2, "/usr/bin/python: can't open file '/w/trian.py': [Errno 2] No such file or directory", "config"),
        (2, "", "exit"),
        (75, "", "preempt"),
        (125, "", "hang"),
        (137, "", "signal"),
        (1, TRACE + "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", "node"),
        (1, TRACE + "OSError: [Errno 116] Stale file handle", "node"),
    ],
)
def test_a_failure_has_a_kind_by_its_code_and_its_last_words(code: int, text: str, kind: str) -> None:
    assert kind_of(code, text) == kind


def test_the_judge_s_verdict_becomes_what_a_node_knows() -> None:
    ends = [RankEnd(0, "a", 1, 2.0), RankEnd(1, "a", -9, 1.0)]
    found = failure_of("a", judge(ends, tails={0: LOST}), time_unix_s=1.0, step=4)
    assert (found.kind, found.exit_code, found.rank, found.only_lost) == ("signal", 137, 1, False)
    assert (found.step, found.evidence) == (4, "was killed by SIGKILL; no rank died before it by itself")


def test_a_record_tells_more_than_the_exit_code() -> None:
    records = {0: ErrorRecord(0, 1.0, TRACE + "ImportError: no", 1)}
    found = failure_of("a", judge([RankEnd(0, "a", 1, 2.0)], records))
    assert found.kind == "import_error"
    assert found.evidence.endswith("; its error record is the earliest: ImportError: no")


def test_connections_that_nobody_is_known_to_have_broken_are_the_fault_of_a_node() -> None:
    found = failure_of("a", judge([RankEnd(0, "a", 1, 2.0)], tails={0: LOST}))
    assert (found.kind, found.only_lost) == ("node", True)


def test_a_hang_is_told_by_the_rank_that_found_it() -> None:
    hang = HangRecord(1.0, 0, "hang: rank 1 waits", (1,), {}, {})
    found = failure_of("a", judge([RankEnd(0, "a", 125, 2.0), RankEnd(1, "a", -9, 3.0, True)], hang=hang))
    assert (found.kind, found.exit_code, found.evidence) == ("hang", 125, "hang: rank 1 waits")
