"""A node that is cut off is told so on both sides, and first on its own."""

import time
from datetime import timedelta
from threading import Event

import pytest

from meshwright.clusters.lease import keep, watch
from tests.launch.waiting import eventually

SHORT_S = 2.0


class Pretended:
    """A store whose line can be cut, so that nothing comes back, or which can be closed."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.plugged, self.closed = Event(), False
        self.plugged.set()

    def add(self, key: str, amount: int) -> int:
        if self.closed:
            raise ConnectionError("closed")
        if amount:
            self.plugged.wait()
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]


def test_a_node_that_is_cut_off_ends_before_it_is_given_up() -> None:
    store, told = Pretended(), list[tuple[str, float]]()
    keep(store, 1, lambda: told.append(("cut off", time.monotonic())), lost_after_s=SHORT_S)
    watch(store, [1, 2], lambda node: told.append((f"unheard {node}", time.monotonic())), lost_after_s=SHORT_S)
    time.sleep(3 * SHORT_S)
    assert told == [], "a node that is heard, and one that has not come yet, are no losses"
    store.plugged.clear()
    began_s = time.monotonic()
    assert eventually(lambda: len(told) == 2, 10)
    assert [what for what, _ in told] == ["cut off", "unheard 1"]
    assert told[0][1] - began_s > SHORT_S * 0.75
    store.plugged.set()
    time.sleep(3 * SHORT_S)
    assert len(told) == 2, "it is said once"


@pytest.mark.parametrize("others", [[1], []])
def test_a_store_that_is_closed_is_no_silence(others: list[int]) -> None:
    store, told = Pretended(), list[object]()
    keep(store, 1, lambda: told.append("cut off"), lost_after_s=SHORT_S)
    watch(store, others, told.append, lost_after_s=SHORT_S)
    time.sleep(SHORT_S / 2)
    store.closed = True
    time.sleep(3 * SHORT_S)
    assert told == []


def test_torch_s_own_store_carries_beats() -> None:
    from torch.distributed import TCPStore

    first = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    far, near = (
        TCPStore("127.0.0.1", first.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
        for _ in range(2)
    )
    told: list[object] = []
    keep(far, 1, lambda: told.append("cut off"), lost_after_s=SHORT_S)
    watch(near, [1], told.append, lost_after_s=SHORT_S)
    time.sleep(4 * SHORT_S)
    assert told == []
    assert near.add("meshwright/beat/1", 0) >= 4
