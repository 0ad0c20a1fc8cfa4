"""Which pods of an elastic run take part in it: the first one calls, before agents start, and the others answer.

    pod 2 ---(connects)--> pod 0:  a number of this connection
    pod 2 ---------------> pod 0:  "2", and a number of its own, with a mac
    pod 2 <--------------- pod 0:  who takes part, then where agents meet, each with a mac

A mac is that of the run's key for this start of its pods and this connection: nobody else counts as a pod or tells one
anything. A pod that comes late, or is one too many for the mesh, gets the same answers and waits.
"""

import json
import secrets
import socket
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from math import inf
from threading import Condition, Thread
from time import monotonic, sleep
from typing import Any

from meshwright.clusters.errors import RendezvousError
from meshwright.clusters.network import bind_free, own_address
from meshwright.parallel.keyed import Keyed, derived

__all__ = ["AGAIN_S", "Answering", "Calling", "taking_part"]

AGAIN_S = 60.0
"""How long other pods are waited for at most where they were all there before, and their images are."""

_HEAR_S, _RETRY_S, _LEAVE_S, _SAY_S = 10.0, 0.5, 30.0, 30.0
_MOST_BYTES = 1 << 20
_PLACE = "to the roll call"
Message = Mapping[str, Any]


def taking_part(came: Collection[int], sizes: Collection[int], *, whole: int, over: bool) -> tuple[int, ...] | None:
    """Pods that take part, in the order of their nodes; None while others are waited for.

    Args:
        came: indices of pods.
        sizes: numbers of nodes on which the job can run.
        whole: pods that there may be.
        over: whether pods were waited for long enough.

    >>> taking_part([0, 2], [1, 2, 3], whole=3, over=False), taking_part([2, 0], [1, 2, 3], whole=3, over=True)
    (None, (0, 2))
    >>> taking_part([0, 1, 3], [2, 4], whole=4, over=True), taking_part([0], [2, 4], whole=4, over=True)
    ((0, 1), None)
    """
    if len(came) < whole and not over:
        return None
    number = max((size for size in sizes if size <= len(came)), default=None)
    return None if number is None else tuple(sorted(came)[:number])


def _say(text: str) -> None:
    sys.stdout.write(f"meshwright: {text}\n")
    sys.stdout.flush()


class _Talk:
    """One connection: texts with macs, each of which counts once and in its place."""

    def __init__(self, connection: socket.socket, key: str) -> None:
        self._connection, self._key = connection, derived(bytes.fromhex(key), "roll call")
        self._read = connection.makefile("rb")
        self._keyed, self._count = Keyed(self._key, "", _PLACE), 0
        connection.settimeout(_HEAR_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with suppress(AttributeError, OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)

    def called(self) -> int | None:
        """The index of who answers; None of a stranger."""
        number = secrets.token_hex(16)
        self._connection.sendall(f"{number}\n".encode())
        other, _, signed = self._line().partition(b" ")
        if not signed:  # somebody only looks whether the port is open
            return None
        self._begin(number, other.decode(errors="replace"))
        text = self._keyed.opened("an answer", signed)
        return None if text is None else int(text)

    def answer(self, index: int) -> None:
        """Says who we are."""
        own, number = secrets.token_hex(16), self._line().decode(errors="replace")
        self._begin(number, own)
        self._connection.sendall(f"{own} {self._keyed.signed('an answer', str(index))}\n".encode())

    def _begin(self, number: str, other: str) -> None:
        self._keyed = Keyed(self._key, f"{number} {other}", _PLACE)
        self._connection.settimeout(None)

    def say(self, message: Message) -> None:
        """Tells the other something."""
        text = self._keyed.signed(f"word {self._count}", json.dumps(message))
        self._count += 1
        self._connection.sendall(f"{text}\n".encode())

    def heard(self) -> Iterator[Message]:
        """What the other tells, to its end."""
        while line := self._line():
            text = self._keyed.opened(f"word {self._count}", line)
            if text is None:
                return
            self._count += 1
            yield json.loads(text)

    def _line(self) -> bytes:
        return self._read.readline(_MOST_BYTES).rstrip(b"\n")

    def close(self) -> None:
        """Hangs up."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Calling:
    """The first pod, which says what the others are to do.

    Args:
        plan: with a node per pod.
        key: of this start of the pods.
    """

    def __init__(self, plan: Mapping[str, Any], key: str) -> None:
        self._whole, self._key = len(plan["nodes"]), key
        meeting = plan["meeting"]
        names = [meeting["host"], plan["nodes"][0]["name"], socket.gethostname()]
        bound = "" if meeting["everywhere"] else own_address(meeting["interface"], names)
        self._socket = bind_free(bound, meeting["port"], tuple(meeting["ports"]))
        self._talks: dict[int, _Talk] = {}
        self._said: list[Message] = []
        self._changed = Condition()
        Thread(target=self._listen, name="roll call", daemon=True).start()

    def _listen(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            Thread(target=self._hear, args=(_Talk(connection, self._key),), daemon=True).start()

    def _hear(self, talk: _Talk) -> None:
        """One connection to its end: whoever holds it is there."""
        index = None
        with suppress(OSError, ValueError):
            index = talk.called()
            if index is not None and 0 < index < self._whole:
                with self._changed:
                    self._talks[index] = talk
                    for message in self._said:
                        talk.say(message)
                    self._changed.notify_all()
                next(talk.heard(), None)
        talk.close()
        with self._changed:
            if index is not None and self._talks.get(index) is talk:
                del self._talks[index]
                self._changed.notify_all()

    @property
    def came(self) -> tuple[int, ...]:
        """Pods that are there now, ours too."""
        return (0, *sorted(self._talks))

    def pods(self, sizes: Collection[int], *, window_s: float, most_s: float) -> tuple[int, ...]:
        """Waits for pods and tells them who takes part.

        Args:
            sizes: numbers of nodes on which the job can run.
            window_s: how long all are waited for.
            most_s: how long as many as it takes are.

        Raises:
            RendezvousError: when these did not come.
        """

        def found(*, over: bool) -> tuple[int, ...] | None:
            return taking_part(self.came, sizes, whole=self._whole, over=over)

        with self._changed:
            self._changed.wait_for(lambda: found(over=False) is not None, window_s)
            self._changed.wait_for(lambda: found(over=True) is not None, most_s - window_s)
            came, pods = self.came, found(over=True)
            if pods is None:
                raise RendezvousError(
                    f"{len(came)} of {self._whole} pods came within {most_s:g} s (rendezvous.join_timeout); the job "
                    f"runs on no fewer than {min(sizes)} nodes; are the others pending?"
                )
            self._say({"pods": pods})
        _say(f"{len(came)} of {self._whole} pods came; ranks run on {len(pods)} nodes")
        return pods

    def meet(self, address: str, port: int) -> None:
        """Tells where agents meet."""
        with self._changed:
            self._say({"address": address, "port": port})

    def wait_for(self, pods: Collection[int]) -> None:
        """Waits a moment until pods have gone, since their Job ends with this one."""
        with self._changed:
            self._changed.wait_for(lambda: not set(pods) & set(self._talks), _LEAVE_S)

    def _say(self, message: Message) -> None:
        self._said.append(message)
        for talk in self._talks.values():
            with suppress(OSError):
                talk.say(message)


class Answering:
    """Another pod.

    Args:
        plan: with a node per pod.
        index: of this one.
        key: of this start of the pods.
    """

    def __init__(self, plan: Mapping[str, Any], index: int, key: str) -> None:
        self._place = (plan["meeting"]["host"], plan["meeting"]["port"])
        self._index, self._key = index, key
        self._words: Iterator[Message] = iter(())

    def pods(self) -> tuple[int, ...] | None:
        """Pods that take part; None once the run is over without this one, which waits for that."""
        pods = self._told()
        if self._index in pods:
            return pods
        _say(
            f"this pod has no ranks: the run has {len(pods)} nodes without it; it waits for the next start of all pods"
        )
        with suppress(OSError):
            while next(self._words, None):
                pass
        return None

    def _told(self) -> tuple[int, ...]:
        """What the first pod says, however long it takes to come."""
        say_s = monotonic() + _SAY_S
        while True:
            with suppress(OSError, ValueError):
                self._words = self._called()
                first = next(self._words, None)
                if first is not None:
                    return tuple(first["pods"])
            if monotonic() > say_s:
                say_s = inf
                host, port = self._place
                _say(f"this pod waits for the first one, at {host} port {port}")
            sleep(_RETRY_S)

    def _called(self) -> Iterator[Message]:
        """What the first pod says on a new connection."""
        talk = _Talk(socket.create_connection(self._place, _HEAR_S), self._key)
        try:
            talk.answer(self._index)
            yield from talk.heard()
        finally:
            talk.close()

    def meeting(self) -> tuple[str, int] | None:
        """Where agents meet; None where the first pod went before."""
        with suppress(OSError):
            found = next(self._words, {})
            return (found["address"], found["port"]) if found else None
        return None
