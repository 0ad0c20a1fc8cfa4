"""What a rank is at is kept in one attribute, cheaply, and put into words when asked."""

import time
from typing import Any

from meshwright.parallel.axis import ProcessAxis
from meshwright.parallel.pending import Pending
from meshwright.parallel.progress import HERE, Call, Progress, Words, doing, patience, told


class Work:
    """A collective that notes what this rank says it is at while it waits."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def wait(self) -> None:
        self.seen.append(told(HERE.at))


def test_a_collective_has_its_name_and_number_while_it_is_waited_for() -> None:
    call, work = Call("all_reduce over dp", (1, 2)), Work()
    HERE.to(Words("backward of micro-batch {}"), 3)
    for _ in range(2):
        Pending(work, call).wait()
    assert [each.words.rpartition("(")[2] for each in work.seen] == ["number 1)", "number 2)"]
    assert work.seen[0].words == "backward of micro-batch 3: all_reduce over dp (number 1)"
    assert work.seen[0].waits_for == (1, 2)
    assert told(HERE.at).words == "backward of micro-batch 3", "what it was at before goes on"


def test_an_axis_without_names_waits_for_nobody() -> None:
    axis = ProcessAxis(None, 0, 2)
    assert axis.call.tell(1).waits_for == ()


def test_coming_out_of_a_wait_is_progress() -> None:
    doing("something")
    before = HERE.at
    Pending(Work(), Call("all_reduce over dp", (1,))).wait()
    assert HERE.at is not before
    assert HERE.at[0] > before[0]


def test_a_process_is_patient_until_its_first_step_is_done() -> None:
    here = Progress()
    assert here.patient
    here.begin(4)
    assert (here.step, here.patient) == (4, True)
    here.end()
    assert (here.step, here.patient, told(here.at).words) == (None, False, "the program's own code after step 4")


def test_patience_lasts_as_long_as_its_block() -> None:
    HERE.begin(1)
    HERE.end()
    doing("before {braces}")
    with patience("saving {0}"):
        assert (told(HERE.at).words, HERE.patient) == ("saving {0}", True)
    assert (told(HERE.at).words, HERE.patient) == ("before {braces}", False)


def test_saying_so_costs_less_than_a_microsecond() -> None:
    here, what = Progress(), Words("x")
    best_s = 1.0
    for _ in range(50):
        begun_s = time.perf_counter()
        for _ in range(1000):
            here.to(what)
        best_s = min(best_s, time.perf_counter() - begun_s)
    assert best_s / 1000 < 1e-6
