"""The roll call of pods over sockets of this machine: who is counted, who is told, and who waits."""

import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from threading import Event, Thread
from threading import enumerate as enumerate_threads
from typing import Any

import pytest

from meshwright.clusters import roll_call
from meshwright.clusters.errors import RendezvousError
from meshwright.clusters.network import bind_free, interfaces
from meshwright.clusters.roll_call import Answering, Calling
from tests.launch.waiting import eventually

SIZES = (1, 2, 3)


@pytest.fixture
def key() -> str:
    """One of each test's own: pods that another test left behind call at the port that this one takes."""
    return secrets.token_hex(32)


@pytest.fixture
def plan() -> Mapping[str, Any]:
    address = next((each for each in interfaces().values() if not each.startswith("127.")), None)
    if address is None:
        pytest.skip("this machine has no address besides loopback, at which pods could meet")
    with bind_free(address, None, (29400, 29999)) as free:
        port = free.getsockname()[1]
    meeting = {"host": address, "port": port, "ports": [29400, 29999], "interface": "auto", "everywhere": False}
    return {"nodes": [{"name": f"n{index}"} for index in range(3)], "meeting": meeting}


class Over(Exception):
    """The test is."""


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pods that still call when a test is over give up."""
    over, before = Event(), set(enumerate_threads())

    def wait(seconds: float) -> None:
        if over.wait(seconds):
            raise Over

    monkeypatch.setattr(roll_call, "sleep", wait)
    yield
    over.set()
    for each in set(enumerate_threads()) - before:
        each.join(2 * roll_call._RETRY_S)


def begun(act: Callable[[], Any]) -> list[Any]:
    """What an act gives, once it has come back."""
    found: list[Any] = []

    def run() -> None:
        with suppress(Over):
            found.append(act())

    Thread(target=run, daemon=True).start()
    return found


def answering(plan: Mapping[str, Any], index: int, key: str) -> tuple[Answering, list[Any]]:
    pod = Answering(plan, index, key)
    return pod, begun(pod.pods)


def test_ranks_start_when_all_are_there_and_everybody_learns_where_agents_meet(
    plan: Mapping[str, Any], key: str
) -> None:
    calling, others = Calling(plan, key), [answering(plan, index, key) for index in (2, 1)]
    assert calling.pods(SIZES, window_s=60.0, most_s=60.0) == (0, 1, 2)
    assert eventually(lambda: all(told == [(0, 1, 2)] for _, told in others), 30)
    calling.meet("10.0.0.1", 29401)
    assert [pod.meeting() for pod, _ in others] == [("10.0.0.1", 29401)] * 2


def test_a_pod_that_comes_late_waits_and_says_so_once(
    plan: Mapping[str, Any], key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    calling, (_, told) = Calling(plan, key), answering(plan, 2, key)
    assert eventually(lambda: calling.came == (0, 2), 30)
    assert calling.pods(SIZES, window_s=0.1, most_s=60.0) == (0, 2)
    _, late = answering(plan, 1, key)
    assert eventually(lambda: calling.came == (0, 1, 2), 30)
    assert told == [(0, 2)]
    calling.meet("10.0.0.1", 29401)
    assert late == []
    said = capfd.readouterr().out
    assert said.count("2 of 3 pods came; ranks run on 2 nodes") == 1
    assert said.count("this pod has no ranks: the run has 2 nodes without it") == 1


def test_a_pod_that_the_mesh_cannot_use_waits(plan: Mapping[str, Any], key: str) -> None:
    calling, others = Calling(plan, key), [answering(plan, index, key) for index in (1, 2)]
    assert calling.pods((2,), window_s=60.0, most_s=60.0) == (0, 1)
    assert eventually(lambda: others[0][1] == [(0, 1)], 30)
    assert others[1][1] == []


def test_too_few_are_waited_for_until_it_is_said_that_they_are(plan: Mapping[str, Any], key: str) -> None:
    calling, _ = Calling(plan, key), answering(plan, 1, key)
    with pytest.raises(RendezvousError, match=r"2 of 3 pods came within 1 s .* no fewer than 3 nodes"):
        calling.pods((3,), window_s=0.5, most_s=1.0)
    later = begun(lambda: calling.pods((3,), window_s=0.1, most_s=60.0))
    _, told = answering(plan, 2, key)
    assert eventually(lambda: later == [(0, 1, 2)] == told, 30), "as soon as they are enough"


def test_strangers_are_not_counted_and_tell_nobody_anything(
    plan: Mapping[str, Any], key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    calling, (_, told) = Calling(plan, key), answering(plan, 1, "cd" * 32)
    place = (plan["meeting"]["host"], plan["meeting"]["port"])
    with socket.create_connection(place) as silent, socket.create_connection(place) as loud:
        loud.sendall(b"x" * 100 + b"\nabc 2\n")
        with pytest.raises(RendezvousError, match="1 of 3 pods"):
            calling.pods((2, 3), window_s=0.2, most_s=2.0)
        del silent
    assert told == []
    assert "an answer to the roll call was not written by this run" in capfd.readouterr().err


def recorded(plan: Mapping[str, Any], port: int) -> Iterator[tuple[bytes, bytes]]:
    """Lines of one true conversation, as somebody between the two sees it: from the first pod, and to it."""
    with bind_free(plan["meeting"]["host"], port, (1, 1)) as held:
        near, _ = held.accept()
        far = socket.create_connection((plan["meeting"]["host"], plan["meeting"]["port"]))
        with near, far, near.makefile("rwb") as pod, far.makefile("rwb") as first:
            number = first.readline()
            pod.write(number)
            pod.flush()
            answer = pod.readline()
            first.write(answer)
            first.flush()
            yield number, answer
            yield first.readline(), b""


def test_what_was_overheard_does_not_count_again(plan: Mapping[str, Any], key: str) -> None:
    calling = Calling(plan, key)
    with bind_free(plan["meeting"]["host"], None, (29400, 29999)) as free:
        port = free.getsockname()[1]
    between = {**plan, "meeting": {**plan["meeting"], "port": port}}
    heard = recorded(plan, port)
    _, told = answering(between, 1, key)
    _, answer = next(heard)
    assert eventually(lambda: calling.came == (0, 1), 30)
    assert calling.pods(SIZES, window_s=0.1, most_s=60.0) == (0, 1)
    said, _ = next(heard)
    heard.close()
    assert eventually(lambda: calling.came == (0,), 30), "whoever hung up is not there"
    with socket.create_connection((plan["meeting"]["host"], plan["meeting"]["port"])) as stranger:
        stranger.sendall(answer)
        stranger.settimeout(30)
        while stranger.recv(1000):
            pass
    assert calling.came == (0,)
    with bind_free(plan["meeting"]["host"], port, (1, 1)) as held:
        pod, told = answering(between, 2, key)
        near, _ = held.accept()
        with near:
            near.sendall(b"0" * 32 + b"\n")
            assert near.recv(1000)
            near.sendall(said)
            time.sleep(0.5)
        assert told == []
        del pod


def test_the_first_pod_waits_for_those_with_ranks_only(plan: Mapping[str, Any], key: str) -> None:
    calling, (_, told) = Calling(plan, key), answering(plan, 1, key)
    assert eventually(lambda: calling.came == (0, 1), 30)
    calling.pods((1,), window_s=0.1, most_s=60.0)
    calling.wait_for((0,))
    assert calling.came == (0, 1)
    assert told == []
