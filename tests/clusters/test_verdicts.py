"""The table of verdicts and its JSON."""

import json

import pytest

from meshwright.clusters.verdicts import BAD, OK, SKIPPED, WARNING, Diagnosis, Verdict

VERDICTS = (
    *(Verdict("clock", node, OK, "0.1 ms") for node in ("gpu01", "gpu02")),
    Verdict("disk", "gpu01", WARNING, "5 GB free", "free some space"),
    Verdict("gpu", "gpu02", BAD, "GPU 3: GPU is lost", "reboot the node"),
    Verdict("allreduce", None, SKIPPED, "not met"),
)


def test_the_table_puts_what_is_alike_in_one_row_and_remedies_below() -> None:
    assert str(Diagnosis(("gpu01", "gpu02"), VERDICTS, ("gpu03",))) == (
        "check      node          verdict  found\n"
        "clock      gpu01, gpu02  ok       0.1 ms\n"
        "disk       gpu01         warning  5 GB free\n"
        "                                  -> free some space\n"
        "gpu        gpu02         bad      GPU 3: GPU is lost\n"
        "                                  -> reboot the node\n"
        "allreduce  all           skipped  not met\n"
        "\n"
        "not fit: sick: gpu02; to go on without: --exclude gpu02; left out: gpu03"
    )


def test_colours_change_nothing_but_the_verdict() -> None:
    diagnosis = Diagnosis(("gpu01", "gpu02"), VERDICTS)
    coloured = diagnosis.table(colour=True)
    assert "\x1b[1;31mbad    \x1b[0m" in coloured
    for code in ("32", "33", "1;31", "2"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured.replace("\x1b[0m", "") == diagnosis.table()


def test_the_json_names_who_is_sick_and_who_is_left() -> None:
    told = json.loads(json.dumps(Diagnosis(("gpu01", "gpu02"), VERDICTS).as_dict()))
    assert (told["fit"], told["sick"], told["healthy"], told["excluded"]) == (False, ["gpu02"], ["gpu01"], [])
    assert told["verdicts"][3] == {
        "check": "gpu",
        "node": "gpu02",
        "state": "bad",
        "found": "GPU 3: GPU is lost",
        "remedy": "reboot the node",
    }


def test_a_fault_of_nobody_in_particular_makes_nobody_sick() -> None:
    slow = Diagnosis(("a", "b"), (Verdict("allreduce", None, BAD, "slow", "look"),))
    assert (slow.fit, slow.sick) == (False, ())
    assert str(slow).endswith("not fit")


def test_a_verdict_that_is_not_good_says_what_to_do() -> None:
    with pytest.raises(AssertionError, match="what to do"):
        Verdict("disk", "a", BAD, "full")
