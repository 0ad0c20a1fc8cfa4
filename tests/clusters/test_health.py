"""Verdicts on nodes: who is sick is named, with the fact and what to do."""

from dataclasses import replace

import pytest

from meshwright.clusters.evidence import CHECKS, Clock, Evidence, Wishes
from meshwright.clusters.health import diagnose
from meshwright.clusters.inventory import Directory
from meshwright.clusters.verdicts import BAD, OK, SKIPPED, WARNING, Verdict
from tests.clusters.evidence import VERSIONS, evidence, spoiled


def _verdicts(found: Evidence, check: str) -> list[Verdict]:
    return list(diagnose(found, Wishes(checks=(check,))).verdicts)


def _of(found: Evidence, check: str) -> dict[str | None, str]:
    return {each.node: each.state for each in _verdicts(found, check)}


def test_healthy_nodes_are_fit_and_every_check_says_something() -> None:
    found = evidence(gpus=8, clocks={node: Clock(0.001, 0.0005) for node in "abc"})
    diagnosis = diagnose(found, Wishes())
    assert diagnosis.fit
    assert {each.check for each in diagnosis.verdicts} == set(CHECKS)
    assert {each.state for each in diagnosis.verdicts} <= {OK, SKIPPED}


@pytest.mark.parametrize(
    ("why", "remedy"),
    [
        ("b: Permission denied (publickey).", "ssh-copy-id"),
        ("Host key verification failed.", "known_hosts"),
        ("/opt/python: No module named meshwright", "MESHWRIGHT_PYTHON"),
        ("it ended with exit code 9", "run it by hand: ssh b"),
    ],
)
def test_a_silent_node_is_sick_even_where_reaching_it_was_not_asked_about(why: str, remedy: str) -> None:
    found = replace(evidence(), silent={"b": why})
    assert _of(found, "ssh") == {"a": OK, "b": BAD, "c": OK}
    diagnosis = diagnose(found, Wishes(checks=("disk",)))
    assert diagnosis.sick == ("b",)
    assert why in diagnosis.verdicts[0].found
    assert remedy in diagnosis.verdicts[0].remedy


def test_a_clock_is_judged_by_what_it_is_off_at_the_least() -> None:
    clocks = {"a": Clock(-0.2, 0.15), "b": Clock(0.3, 0.01), "c": Clock(-7.0, 0.01), "d": Clock(7.0, 6.5)}
    assert _of(evidence("abcd", clocks=clocks), "clock") == {"a": OK, "b": WARNING, "c": BAD, "d": WARNING}
    said = _verdicts(evidence("abcd", clocks=clocks), "clock")[2]
    assert said.found == "7 s behind this machine, give or take 10.0 ms"
    assert "NTP" in said.remedy


def test_the_node_that_differs_from_most_is_the_one_with_a_wrong_version() -> None:
    found = spoiled("b", versions={**VERSIONS, "torch": "2.12.1", "nccl": None})
    assert _of(found, "versions") == {"a": OK, "b": BAD, "c": OK}
    assert "torch 2.12.1 (others: 2.13.0+cu130), nccl none (others: 2.28.9)" in _verdicts(found, "versions")[1].found


def test_a_patch_of_python_is_no_difference_and_a_missing_torch_is_one() -> None:
    assert _of(spoiled("b", versions={**VERSIONS, "python": "3.11.9"}), "versions")["b"] == OK
    assert _of(spoiled("b", versions={**VERSIONS, "python": "3.12.7"}), "versions")["b"] == BAD
    found = spoiled("b", versions={**VERSIONS, "torch": None})
    assert _verdicts(found, "versions")[1].remedy == "/opt/python -m pip install torch"


@pytest.mark.parametrize(
    ("directory", "state"),
    [
        (Directory("/runs", error="Read-only file system (/)"), BAD),
        (Directory("/runs", 500 * 10**6, 1e9), BAD),
        (Directory("/runs", 5 * 10**9, 1e9), WARNING),
        (Directory("/runs", 10**12, 3e6), WARNING),
        (Directory("/runs", 10**12, None), OK),
    ],
)
def test_a_disk_has_to_be_writable_roomy_and_not_too_slow(directory: Directory, state: str) -> None:
    assert _of(spoiled("c", directories=(directory,)), "disk") == {"a": OK, "b": OK, "c": state}
