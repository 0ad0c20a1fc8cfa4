"""A node that is cut off is told so on both sides, and first on its own."""

import threading
import time
from datetime import timedelta
from threading import Event

import pytest

from meshwright.clusters.lease import Beats, keep, watch
from meshwright.parallel.keyed import Keyed
from tests.launch.waiting import eventually

SHORT_S = 2.0


class Pretended:
    """A store to which a line can be cut, so that nothing gets through and no answer comes, or which can be closed."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.plugged, self.closed = Event(), False
        self.plugged.set()

    def set(self, key: str, value: str) -> None:
        if self.closed:
            raise ConnectionError("closed")
        if self.plugged.is_set():  # torch's own waits for no answer
            self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        if self.closed:
            raise ConnectionError("closed")
        if threading.current_thread().name == "lease-beat":
            self.plugged.wait()
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]


def beats(store: object) -> Beats:
    return Beats(store, Keyed(bytes(32), "r1"))


def test_a_node_that_is_cut_off_ends_before_it_is_given_up() -> None:
    store, told = Pretended(), list[tuple[str, float]]()
    keep(beats(store), 1, lambda: told.append(("cut off", time.monotonic())), lost_after_s=SHORT_S)
    watch(beats(store), [1, 2], lambda node: told.append((f"unheard {node}", time.monotonic())), lost_after_s=SHORT_S)
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
    keep(beats(store), 1, lambda: told.append("cut off"), lost_after_s=SHORT_S)
    watch(beats(store), others, told.append, lost_after_s=SHORT_S)
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
    keep(beats(far), 1, lambda: told.append("cut off"), lost_after_s=SHORT_S)
    watch(beats(near), [1], told.append, lost_after_s=SHORT_S)
    time.sleep(4 * SHORT_S)
    assert told == []
    assert beats(near).newest(1) >= 4


def test_nobody_without_the_key_beats_for_a_node_that_is_gone_or_silences_one_that_is_there(
    capfd: pytest.CaptureFixture[str],
) -> None:
    store, told = Pretended(), list[object]()
    ours, name = beats(store), "meshwright/beat/1"
    keep(ours, 1, lambda: told.append("cut off"), lost_after_s=SHORT_S)
    assert eventually(lambda: ours.newest(1) >= 2)
    old = store.values[name]
    watch(ours, [1], told.append, lost_after_s=SHORT_S)
    for value in (b"9", Keyed(bytes(range(32)), "r1").signed(name, "999").encode(), old):
        store.values[name] = value
        time.sleep(SHORT_S)
    assert told == [], "the next beat is in its place"
    assert capfd.readouterr().err.count(f"{name} in the store was not written by this run") == 1
    store.plugged.clear()
    end_s = time.monotonic() + 30
    while 1 not in told and time.monotonic() < end_s:
        store.values[name] = Keyed(bytes(range(32)), "r1").signed(name, str(time.monotonic_ns())).encode()
        time.sleep(0.02)
        store.values[name] = old
        time.sleep(0.02)
    assert 1 in told, "beats of before do not count again"
    assert eventually(lambda: sorted(map(str, told)) == ["1", "cut off"])
