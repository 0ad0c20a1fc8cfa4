"""A node comes to the meeting of its run over the loopback interface as it would over any other."""

import os
from threading import Thread
from typing import Any

import pytest

from meshwright.clusters.errors import RendezvousError
from meshwright.clusters.joining import Joining

MEETING = {"host": "first", "interface": "lo", "port": None, "ports": [29400, 29999], "everywhere": False}
NODES = [{"name": "a", "index": 0}, {"name": "b", "index": 1}]


def message(node: int, join_timeout_s: float = 20.0) -> dict[str, Any]:
    limits = {"join_timeout_s": join_timeout_s, "past": []}
    plan = {"run_id": "r1", "run_dir": "/nowhere", "meeting": MEETING, "nodes": NODES, "limits": limits}
    return {"plan": plan, "node": node, "key": "00" * 32}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_the_first_node_says_where_it_listens_and_the_others_come_there() -> None:
    told: dict[str, Any] = {}
    first = Joining(message(0), lambda event, **fields: told.update(fields, event=event))
    other = Joining(message(1), lambda *_, **__: None)
    first.hold()
    other.hold()
    nodes: dict[int, Any] = {0: first.meet()}
    assert (told["event"], told["address"]) == ("meeting", "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    other.told.put(told)
    nodes[1] = other.meet()
    ranks: dict[int, int] = {}
    threads = [
        Thread(target=lambda n=n: ranks.update({n: nodes[n].next_rendezvous().rank}), daemon=True) for n in nodes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ranks == {0: 0, 1: 1}
    for node in nodes.values():
        node.shutdown()


def test_a_first_node_that_says_nothing_is_not_waited_for_longer_than_asked() -> None:
    with pytest.raises(RendezvousError, match=r"did not say within 0\.1 s where it listens"):
        Joining(message(1, join_timeout_s=0.1), lambda *_, **__: None).meet()
