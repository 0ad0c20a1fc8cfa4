"""Nodes of one run hear of each other over the network, where nothing else tells soon that one of them is cut off.

    node N --(one more beat)--> store of the first node <--(looks)-- the first node

A beat that does not get through for so long ends node N on both sides: N ends its ranks itself, and the first node,
which waits a little longer, says that N is lost. A store that was closed is no silence: what closed it says why.
"""

import time
from collections.abc import Callable, Iterable
from threading import Event, Thread
from typing import Protocol

__all__ = ["LOST_AFTER_S", "Counters", "keep", "watch"]

LOST_AFTER_S = 10.0
_BEATS = 5  # in that time
_LOOKS = 20
_LATER = 1.1  # whoever is cut off has ended its ranks before others take their places


class Counters(Protocol):
    """What is used of torch's store."""

    def add(self, key: str, amount: int) -> int:
        """Adds to a counter, from 0; its new value."""


def _key(node: int) -> str:
    return f"meshwright/beat/{node}"


def keep(store: Counters, node: int, cut_off: Callable[[], object], *, lost_after_s: float = LOST_AFTER_S) -> None:
    """Lets the first node hear of this one, in threads of their own.

    Args:
        store: a connection of its own: one that is used otherwise may have to wait.
        node: index of this node.
        cut_off: called once no beat got through for so long.
        lost_after_s: that time.
    """
    closed, through_s = Event(), [time.monotonic()]

    def beat() -> None:
        while True:
            began_s = time.monotonic()
            try:
                store.add(_key(node), 1)
            except Exception:
                closed.set()
                return
            through_s[0] = began_s
            time.sleep(lost_after_s / _BEATS)

    def look() -> None:
        while not closed.wait(lost_after_s / _LOOKS):
            if time.monotonic() - through_s[0] > lost_after_s:
                cut_off()
                return

    for run in (beat, look):
        Thread(target=run, name=f"lease-{run.__name__}", daemon=True).start()


def watch(
    store: Counters, nodes: Iterable[int], unheard: Callable[[int], object], *, lost_after_s: float = LOST_AFTER_S
) -> None:
    """Hears of other nodes, in a thread of its own.

    Args:
        store: a connection of its own.
        nodes: indices of the others; who has not come yet is not missed.
        unheard: called with each that was not heard of for so long, once.
        lost_after_s: that time; it is waited for a tenth longer.
    """
    heard = {node: (0, 0.0) for node in nodes}

    def look() -> None:
        while heard:
            for node, (beats, at_s) in list(heard.items()):
                try:
                    now = store.add(_key(node), 0)
                except Exception:
                    return
                if now != beats:
                    heard[node] = (now, time.monotonic())
                elif beats and time.monotonic() - at_s > lost_after_s * _LATER:
                    del heard[node]
                    unheard(node)
            time.sleep(lost_after_s / _LOOKS)

    Thread(target=look, name="lease-watch", daemon=True).start()
