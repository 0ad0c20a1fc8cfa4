"""How nodes of a run meet, and then their ranks: torch's rendezvous over a file, or over stores of the first node.

torch's own stores listen on every interface and believe whoever comes. Ours get a socket that is bound to one address,
and a node only unpickles a state that was signed with the key of its run.
"""

import hmac
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from socket import socket
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStateError,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend, create_backend

from meshwright.clusters.network import bind_free, dial
from meshwright.parallel.keyed import Keyed, derived

__all__ = ["KeyedBackend", "NodeMeeting", "Place", "meet_by_file", "meet_by_store"]

_KEY_OF_RANKS = "meshwright_store_of_ranks"
_STORE_TIMEOUT = timedelta(seconds=60)
_DIAL_S = 10.0
_LOOK_S = 0.05
_MAC_BYTES = 32
_ANY = (0, 0)  # ports: whichever the kernel gives


class Place:
    """Where this node's stores listen, or the first node's do.

    Args:
        address: of the first node.
        ports: that may be taken.
        everywhere: listen on all interfaces.
    """

    def __init__(self, address: str, ports: tuple[int, int], *, everywhere: bool) -> None:
        self.address, self._ports = address, ports
        self._bound = "" if everywhere else address

    def listen(self, port: int | None = None, *, held: socket | None = None) -> TCPStore:
        """A store on this node, at a socket that is held already, at a port, or at any free one."""
        held = held or bind_free(self._bound, port, self._ports)
        number = held.getsockname()[1]
        return TCPStore(
            self.address,
            number,
            is_master=True,
            wait_for_workers=False,
            timeout=_STORE_TIMEOUT,
            master_listen_fd=held.detach(),
        )

    def join(self, port: int) -> TCPStore:
        """A connection to the first node's store."""
        dial(self.address, port, _DIAL_S)
        return TCPStore(self.address, port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)


class KeyedBackend(C10dRendezvousBackend):  # type: ignore[misc, unused-ignore]
    """A shared state that only nodes with the key can write.

    Args:
        store: of the first node.
        run_id: of the run.
        key: of the run, 32 bytes.
    """

    def __init__(self, store: Any, run_id: str, key: bytes) -> None:
        super().__init__(store, run_id)
        self._secret = key

    def _signed(self, state: bytes) -> bytes:
        return hmac.digest(self._secret, state, "sha256") + state

    def _opened(self, signed: bytes) -> bytes:
        mac, state = signed[:_MAC_BYTES], signed[_MAC_BYTES:]
        if not hmac.compare_digest(mac, hmac.digest(self._secret, state, "sha256")):
            raise RendezvousStateError("the state of the rendezvous was not written by a node of this run")
        return state

    def get_state(self) -> tuple[bytes, Any] | None:
        """The state and its token; None where nobody wrote one.

        Raises:
            RendezvousStateError: when it was written by somebody without the key.
        """
        found = super().get_state()
        return None if found is None else (self._opened(found[0]), found[1])

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool] | None:
        """Replaces the state that a token stands for; gives the one that is there now, and whether it is ours."""
        if token and not isinstance(token, bytes):
            now = self.get_state()
            return None if now is None else (*now, False)
        found = super().set_state(self._signed(state), token)
        return None if found is None else (self._opened(found[0]), *found[1:])


class NodeMeeting(RendezvousHandler):
    """torch's rendezvous, with a new store of ranks per round that listens on one address of the first node.

    Args:
        inner: torch's handler of the nodes.
        place: where stores listen.
        port: of the stores of ranks, one after the other; None takes any.
        key: of this attempt at the run: a port is believed in the round of it for which it was said.
    """

    def __init__(self, inner: Any, place: Place, port: int | None = None, *, key: bytes) -> None:
        self._inner, self._place, self._port, self.key = inner, place, port, key
        self._store: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        """Ranks connect to the store; rank 0 starts none."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meets the other nodes again.

        Raises:
            RendezvousStateError: when the first one does not say where ranks meet.
        """
        found = self._inner.next_rendezvous()
        if found.rank == 0:
            if self._port is not None:
                self._store = None  # lets go of the port
            self._store = self._place.listen(self._port)
            found.store.set(_KEY_OF_RANKS, self._keyed().signed(_KEY_OF_RANKS, str(self._store.port)))
        told = RendezvousStoreInfo(self._place.address, self._port_of_ranks(found.store))
        return RendezvousInfo(found.store, found.rank, found.world_size, told)

    def _keyed(self) -> Keyed:
        """Of this round, which ends only once every node has left it; torch tells it to nobody."""
        return Keyed(self.key, f"{self.get_run_id()}, round {self._inner._state_holder.state.round}")

    def _port_of_ranks(self, store: Any) -> int:
        """Where the first node says that ranks meet in this round; what others say is passed over."""
        keyed, end_s = self._keyed(), time.monotonic() + _STORE_TIMEOUT.total_seconds()
        while time.monotonic() < end_s:
            text = keyed.opened(_KEY_OF_RANKS, store.get(_KEY_OF_RANKS))
            if text is not None:
                return int(text)
            time.sleep(_LOOK_S)
        raise RendezvousStateError("the first node did not say where ranks meet; somebody else did in its place")

    def get_backend(self) -> str:
        """Name of torch's backend."""
        return str(self._inner.get_backend())

    def is_closed(self) -> bool:
        """Whether nodes have left for good."""
        return bool(self._inner.is_closed())

    def set_closed(self) -> None:
        """Says that nobody need come any more."""
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """Nodes that came too late for this round."""
        return int(self._inner.num_nodes_waiting())

    def get_run_id(self) -> str:
        """The run's id."""
        return str(self._inner.get_run_id())

    def shutdown(self) -> bool:
        """Leaves."""
        return bool(self._inner.shutdown())


def _parameters(plan: Mapping[str, Any], node: int, endpoint: str) -> RendezvousParameters:
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch's own store of ranks would listen on every interface
    num_nodes = len(plan["nodes"])
    return RendezvousParameters(
        backend="c10d",
        endpoint=endpoint,
        run_id=plan["run_id"],
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        local_addr=f"node{node:04d}",  # only a name: torch ranks nodes in the order of these
        store_type="file",
        join_timeout=max(1, int(plan["limits"]["join_timeout_s"])),
    )


def _of_attempt(key: bytes, plan: Mapping[str, Any]) -> bytes:
    """A key with which nothing counts that was written in an attempt before."""
    return derived(key, f"attempt {len(plan['limits']['past'])}")


def meet_by_file(plan: Mapping[str, Any], node: int, *, key: bytes) -> NodeMeeting:
    """A meeting of nodes that are all on this machine: a file of the run directory; ranks' stores are on loopback.

    Args:
        plan: of the run, as a dictionary.
        node: index of this node.
        key: of the run.
    """
    if len(plan["nodes"]) == 1:  # torch waits up to 0.3 s so that nodes do not all come at once
        setattr(dynamic_rendezvous, "_delay", lambda seconds: None)  # noqa: B010 (torch keeps it to itself)
    name = f"rendezvous-{len(plan['limits']['past'])}"  # other nodes have met in this directory before
    parameters = _parameters(plan, node, str(Path(plan["run_dir"], "private", name)))
    backend, store = create_backend(parameters)
    handler = dynamic_rendezvous.create_handler(store, backend, parameters)
    return NodeMeeting(
        handler, Place("127.0.0.1", _ANY, everywhere=False), plan["meeting"]["port"], key=_of_attempt(key, plan)
    )


def meet_by_store(plan: Mapping[str, Any], node: int, *, place: Place, store: TCPStore, key: bytes) -> NodeMeeting:
    """A meeting over the first node's store.

    Args:
        plan: of the run, as a dictionary.
        node: index of this node.
        place: where stores listen.
        store: of the first node.
        key: of the run.
    """
    parameters = _parameters(plan, node, f"{place.address}:{store.port}")
    key = _of_attempt(key, plan)
    backend = KeyedBackend(store, plan["run_id"], key)
    return NodeMeeting(dynamic_rendezvous.create_handler(store, backend, parameters), place, key=key)
