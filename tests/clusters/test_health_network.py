"""Verdicts on the network: who is not reached, and whose fault a slow all-reduce is."""

from dataclasses import replace

import pytest

from meshwright.clusters.evidence import Dial, Endpoint, Evidence, Reach, Reduced, Wishes, endpoint_of
from meshwright.clusters.health_network import allreduce_verdicts, expected_bandwidth, port_verdicts
from meshwright.clusters.interfaces import Interface
from meshwright.clusters.verdicts import BAD, OK, SKIPPED, WARNING
from tests.clusters.evidence import evidence, spoiled

WISHES = Wishes(ports=(29400, 29999))


def _failing(*pairs: str) -> Evidence:
    """Nodes of which some do not reach others: "ab" is a not reaching b."""
    well = evidence()
    dials = [
        replace(dial, seconds=None, error="no answer") if dial.source + dial.target in pairs else dial
        for dial in well.dials
    ]
    return replace(well, dials=tuple(dials))


def _states(found: Evidence) -> dict[str | None, str]:
    return {each.node: each.state for each in port_verdicts(found, WISHES)}


def test_nodes_that_reach_each_other_say_where() -> None:
    verdicts = list(port_verdicts(evidence(), WISHES))
    assert [each.state for each in verdicts] == [OK] * 3
    assert verdicts[0].found == "eth0 10.0.0.97:29500, reached from 2 nodes in 1.0 ms"


@pytest.mark.parametrize(
    ("pairs", "sick"),
    [
        (("ab", "cb"), "b"),
        (("ba", "bc"), "b"),
        (("ab", "cb", "ba", "bc"), "b"),
        (("ab",), "b"),
        (("ab", "ac", "ba", "bc", "ca", "cb"), "abc"),
    ],
)
def test_who_is_not_reached_or_reaches_nobody_is_the_sick_one(pairs: tuple[str, ...], sick: str) -> None:
    assert {node for node, state in _states(_failing(*pairs)).items() if state == BAD} == set(sick)


def test_a_dead_way_says_from_where_to_where_and_which_ports_to_open() -> None:
    verdict = next(each for each in port_verdicts(_failing("ab", "cb"), WISHES) if each.node == "b")
    assert (
        verdict.found
        == "not reached: a to b at eth0 10.0.0.98:29500: no answer; c to b at eth0 10.0.0.98:29500: no answer"
    )
    assert "TCP 29400-29999" in verdict.remedy


def test_an_interface_that_leads_elsewhere_is_passed_over() -> None:
    bridge, eth = Endpoint("br9", "172.17.0.1", 1), Endpoint("eth0", "10.0.0.1", 2)
    dials = (Dial("b", "a", bridge, error="another machine answers there"), Dial("b", "a", eth, 0.1))
    assert endpoint_of("a", evidence("ab", listening={"a": (bridge, eth)}, dials=dials)) == eth


def test_a_node_that_cannot_listen_says_why_and_a_public_address_is_pointed_out() -> None:
    deaf = evidence(
        "a", listening={"a": ()}, dials=(), deaf={"a": ("eth0 10.0.0.97: port 29500: Address already in use",)}
    )
    (verdict,) = port_verdicts(deaf, WISHES)
    assert (verdict.state, "Address already in use" in verdict.found) == (BAD, True)
    public = spoiled("a", "a", interfaces=(Interface("eth0", "9.9.9.9", True),))
    seen = Endpoint("eth0", "9.9.9.9", 29500)
    public = replace(public, listening={"a": (seen,)}, dials=(Dial("a", "a", seen, 0.1),))
    assert _states(public) == {"a": WARNING}


def _reduced(speed: float | None, nodes: str = "abc", backend: str = "gloo") -> Reduced:
    return Reduced(tuple(nodes), backend, len(nodes), 64 << 20, speed, None if speed else "b: timed out")


@pytest.mark.parametrize(("speed", "state"), [(2.5e9, OK), (2.4e9, BAD), (None, BAD)])
def test_an_all_reduce_is_held_against_the_share_of_the_slowest_link(speed: float | None, state: str) -> None:
    verdicts = list(allreduce_verdicts(evidence(reduced=_reduced(speed)), WISHES))
    assert [each.state for each in verdicts] == [state]
    assert ("20% of the 12.5 GB/s of eth0" in verdicts[0].found) == (speed is not None)


def test_the_job_s_own_demand_comes_first() -> None:
    found = expected_bandwidth(evidence(), Wishes(min_bus_bytes_per_s=7.0), _reduced(1.0))
    assert found is not None
    assert found.bytes_per_s == 7.0


def test_gpus_of_one_node_are_held_against_their_links_and_nodes_of_one_machine_against_loopback() -> None:
    board = expected_bandwidth(evidence("a", gpus=8), WISHES, _reduced(1.0, "a", "nccl"))
    assert board is not None
    assert board.bytes_per_s == 270e9
    here = replace(evidence("ab"), reaches=(Reach("a", ()), Reach("b", ())))
    loopback = expected_bandwidth(here, WISHES, _reduced(1.0, "ab"))
    assert loopback is not None
    assert "loopback" in loopback.why


def test_a_link_of_unknown_speed_is_measured_and_not_judged() -> None:
    unknown = spoiled("b", interfaces=(Interface("eth0", "10.0.0.98", True),))
    (verdict,) = allreduce_verdicts(replace(unknown, reduced=_reduced(1e6)), WISHES)
    assert (verdict.state, "nothing is known" in verdict.found) == (OK, True)


def test_the_node_whose_every_pair_is_slow_is_the_sick_one() -> None:
    pairs = tuple(_reduced(speed, pair) for pair, speed in (("ab", 9e9), ("ac", 1e8), ("bc", None)))
    verdicts = list(allreduce_verdicts(evidence(reduced=_reduced(1e8), pairs=pairs), WISHES))
    assert [(each.node, each.state) for each in verdicts] == [(None, BAD), ("c", BAD)]


def test_where_nothing_can_be_reduced_the_reason_is_said() -> None:
    (alone,) = allreduce_verdicts(evidence("a", gpus=1), WISHES)
    (apart,) = allreduce_verdicts(_failing("ab", "ba"), WISHES)
    assert (alone.state, alone.found) == (SKIPPED, "one GPU has nothing to reduce")
    assert (apart.state, apart.found) == (SKIPPED, "the nodes do not meet")
