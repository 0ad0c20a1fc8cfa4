"""Nodes meet over a store that listens on one address, and believe only what is signed with the key of their run."""

from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from meshwright.clusters import rendezvous
from meshwright.clusters.rendezvous import KeyedBackend, NodeMeeting, Place, meet_by_store
from meshwright.parallel.keyed import Keyed, derived

KEY = bytes(range(32))
PLACE = Place("127.0.0.1", (29400, 29999), everywhere=False)
PLAN: dict[str, Any] = {"run_id": "r1", "nodes": [{}, {}], "limits": {"join_timeout_s": 30.0, "past": []}}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")


def listening(port: int) -> list[str]:
    """Local addresses, in hexadecimal, of sockets that listen at a port."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                found.append(local.rpartition(":")[0])
    return found


def test_stores_listen_on_their_address_only() -> None:
    store = PLACE.listen()
    assert listening(store.port) == ["0100007F"]
    everywhere = Place("127.0.0.1", (29400, 29999), everywhere=True).listen()
    assert listening(everywhere.port) == ["00000000"]


def test_a_state_of_somebody_without_the_key_is_never_unpickled() -> None:
    store = PLACE.listen()
    ours = KeyedBackend(store, "r1", KEY)
    assert ours.get_state() is None
    written = ours.set_state(b"state")
    assert written is not None
    assert (written[0], written[2]) == (b"state", True)
    stranger = C10dRendezvousBackend(PLACE.join(store.port), "r1")
    assert stranger.set_state(b"evil", written[1])[2]
    with pytest.raises(RendezvousStateError, match="not written by a node of this run"):
        ours.get_state()
    with pytest.raises(RendezvousStateError):
        KeyedBackend(store, "r1", KEY[::-1]).get_state()


def test_states_are_replaced_only_by_who_saw_the_last() -> None:
    store = PLACE.listen()
    backend = KeyedBackend(store, "r1", KEY)
    first = backend.set_state(b"one")
    assert first is not None
    second = backend.set_state(b"two", first[1])
    late = backend.set_state(b"three", first[1])
    odd = backend.set_state(b"four", 7)
    assert second is not None
    assert second[:1] + second[2:] == (b"two", True)
    assert [(found[0], found[2]) for found in (late, odd) if found] == [(b"two", False)] * 2


def both(nodes: list[NodeMeeting]) -> list[RendezvousInfo]:
    """What each node is told when they meet."""
    found: list[RendezvousInfo] = []
    threads = [Thread(target=lambda each=node: found.append(each.next_rendezvous()), daemon=True) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_where_ranks_meet_is_believed_of_the_first_node_only(capfd: pytest.CaptureFixture[str]) -> None:
    store, writer = PLACE.listen(), Keyed(derived(KEY, "attempt 0"), "r1, round 0")
    node = meet_by_store(PLAN, 1, place=PLACE, store=PLACE.join(store.port), key=KEY)
    name = "meshwright_store_of_ranks"
    store.set(name, "4444")
    found: list[int] = []
    thread = Thread(target=lambda: found.append(node._port_of_ranks(PLACE.join(store.port))), daemon=True)
    thread.start()
    thread.join(0.5)
    assert found == []
    store.set(name, writer.signed(name, "29777"))
    thread.join(60)
    assert found == [29777]
    assert capfd.readouterr().err.count(f"{name} in the store was not written by this run") == 1


def test_where_ranks_met_in_another_round_or_attempt_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    store, name = PLACE.listen(), "meshwright_store_of_ranks"
    monkeypatch.setattr(rendezvous, "_STORE_TIMEOUT", timedelta(seconds=0.3))

    def told(attempt: int, now: int) -> int:
        plan = {**PLAN, "limits": {**PLAN["limits"], "past": [{}] * attempt}}
        node = meet_by_store(plan, 1, place=PLACE, store=store, key=KEY)
        node._inner._state_holder.state.round = now
        return node._port_of_ranks(store)

    store.set(name, Keyed(derived(KEY, "attempt 1"), "r1, round 2").signed(name, "29777"))
    assert told(1, 2) == 29777
    for attempt, now in ((1, 1), (1, 3), (0, 2), (2, 2)):
        with pytest.raises(RendezvousStateError, match="did not say where ranks meet"):
            told(attempt, now)


def test_a_state_of_another_attempt_is_not_that_of_this_one() -> None:
    store = PLACE.listen()
    again = {**PLAN, "limits": {**PLAN["limits"], "past": [{}]}}
    first, second = (meet_by_store(plan, 0, place=PLACE, store=store, key=KEY) for plan in (PLAN, again))
    first._inner._state_holder.mark_dirty()
    assert first._inner._state_holder.sync()
    with pytest.raises(RendezvousStateError, match="not written by a node of this run"):
        second._inner._state_holder.sync()


def test_two_nodes_meet_and_every_round_has_a_new_store_of_ranks() -> None:
    store = PLACE.listen()
    nodes = [
        meet_by_store(PLAN, node, place=PLACE, store=store if node == 0 else PLACE.join(store.port), key=KEY)
        for node in (0, 1)
    ]
    ports = []
    for _ in range(2):
        found = both(nodes)
        assert sorted(each.rank for each in found) == [0, 1]
        told = {(each.bootstrap_store_info.master_addr, each.bootstrap_store_info.master_port) for each in found}
        assert len(told) == 1
        ((address, port),) = told
        assert (address, listening(port)) == ("127.0.0.1", ["0100007F"])
        ports.append(port)
    assert ports[0] != ports[1]
    for node in nodes:
        node.shutdown()
