"""Nodes of one run hear of each other over the network, where nothing else tells soon that one of them is cut off.

    node N --(one more beat)--> store of the first node <--(looks)-- the first node

A beat that does not get through for so long ends node N on both sides: N ends its ranks itself, and the first node,
which waits a little longer, says that N is lost. A store that was closed is no silence: what closed it says why.
Beats are numbered and have a mac of the run's key, so that nobody else beats for a node that is gone.
"""

import time
from collections.abc import Callable, Iterable
from itertools import count
from threading import Event, Thread
from typing import Any

from meshwright.parallel.keyed import Keyed

__all__ = ["LOST_AFTER_S", "Beats", "keep", "watch"]

LOST_AFTER_S = 10.0
_BEATS = 5  # in that time
_LOOKS = 20
_LATER = 1.1  # whoever is cut off has ended its ranks before others take their places


class Beats:
    """Beats of nodes in torch's store.

    Args:
        store: a connection of its own: one that is used otherwise may have to wait.
        keyed: of the run.
    """

    def __init__(self, store: Any, keyed: Keyed) -> None:
        self._store, self._keyed = store, keyed

    def beat(self, node: int, number: int) -> None:
        """Beats for a node, and comes back once the store has that.

        Args:
            node: its index.
            number: larger than any before.
        """
        name = f"meshwright/beat/{node}"
        self._store.set(name, self._keyed.signed(name, str(number)))
        self._store.check([name])  # an answer: `set` itself waits for none

    def newest(self, node: int) -> int:
        """Number of the last beat of a node; 0 where there is none of its own."""
        name = f"meshwright/beat/{node}"
        text = self._keyed.opened(name, self._store.get(name)) if self._store.check([name]) else None
        return 0 if text is None else int(text)


def keep(beats: Beats, node: int, cut_off: Callable[[], object], *, lost_after_s: float = LOST_AFTER_S) -> None:
    """Lets the first node hear of this one, in threads of their own.

    Args:
        beats: of all nodes.
        node: index of this node.
        cut_off: called once no beat got through for so long.
        lost_after_s: that time.
    """
    closed, through_s = Event(), [time.monotonic()]

    def beat() -> None:
        for number in count(1):
            began_s = time.monotonic()
            try:
                beats.beat(node, number)
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
    beats: Beats, nodes: Iterable[int], unheard: Callable[[int], object], *, lost_after_s: float = LOST_AFTER_S
) -> None:
    """Hears of other nodes, in a thread of its own.

    Args:
        beats: of all nodes.
        nodes: indices of the others; who has not come yet is not missed.
        unheard: called with each that was not heard of for so long, once.
        lost_after_s: that time; it is waited for a tenth longer.
    """
    heard = {node: (0, 0.0) for node in nodes}

    def look() -> None:
        while heard:
            for node, (last, at_s) in list(heard.items()):
                try:
                    now = beats.newest(node)
                except Exception:
                    return
                if now > last:
                    heard[node] = (now, time.monotonic())
                elif last and time.monotonic() - at_s > lost_after_s * _LATER:
                    del heard[node]
                    unheard(node)
            time.sleep(lost_after_s / _LOOKS)

    Thread(target=look, name="lease-watch", daemon=True).start()
