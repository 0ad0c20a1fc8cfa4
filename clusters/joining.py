"""How one node's agent comes to the meeting of its run: as the only machine, as the first of several, or as another."""

import os
import socket
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from meshwright.clusters.errors import RendezvousError
from meshwright.clusters.lease import Beats, keep, watch
from meshwright.clusters.network import bind_free, interface_of, own_address, way_to
from meshwright.parallel.keyed import Keyed

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous.api import RendezvousHandler

__all__ = ["Joining"]


class Joining:
    """One node's way to the others.

    Args:
        message: the first one of the launcher, with plan, node and key.
        tell: sends an event to the launcher.
        cut_off: ends this node, since the first one does not hear of it any more.
    """

    def __init__(
        self, message: Mapping[str, Any], tell: Callable[..., None], cut_off: Callable[[], object] = lambda: None
    ) -> None:
        self._message, self._tell, self._cut_off = message, tell, cut_off
        self._plan: Mapping[str, Any] = message["plan"]
        self._node: Mapping[str, Any] = self._plan["nodes"][message["node"]]
        self._reached = os.environ.get("SSH_CONNECTION", "").split()[2:3]
        self._held: tuple[str, socket.socket] | None = None
        self.told: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
        """Where the first node listens, once the launcher says it."""

    @property
    def near(self) -> bool:
        """Whether all nodes are on this machine."""
        return self._plan["meeting"]["host"] is None

    @property
    def key(self) -> bytes:
        """Of the run."""
        return bytes.fromhex(self._message["key"])

    def hold(self) -> None:
        """Takes the port of the first node, which needs no torch: that none can be had is said before torch is there.

        Raises:
            RendezvousError: when it has no address to listen on, or no port of it can be taken.
        """
        meeting = self._plan["meeting"]
        if self._node["index"] == 0 and not self.near:
            address = own_address(meeting["interface"], self._names())
            bound = "" if meeting["everywhere"] else address
            self._held = address, bind_free(bound, meeting["port"], tuple(meeting["ports"]))

    def meet(self) -> "RendezvousHandler":
        """torch's rendezvous of this run.

        Raises:
            RendezvousError: when the first node cannot be reached.
        """
        if self.near:
            from meshwright.clusters.rendezvous import meet_by_file

            return meet_by_file(self._plan, self._node["index"], key=self.key)
        return self._meet_others()

    def _meet_others(self) -> "RendezvousHandler":
        from meshwright.clusters.rendezvous import Place, meet_by_store

        meeting = self._plan["meeting"]
        ports, everywhere = tuple(meeting["ports"]), meeting["everywhere"]
        if self._node["index"] == 0:
            assert self._held is not None, "hold comes before meet"
            address, held = self._held
            place = Place(address, ports, everywhere=everywhere)
            store = place.listen(held=held)
            self._tell("meeting", address=place.address, port=store.port)
        else:
            found = self._where()
            place = Place(found["address"], ports, everywhere=everywhere)
            store = place.join(found["port"])
        if self._message.get("lease_s") is not None:
            self._take_lease(place.join(store.port), self._message["lease_s"])
        _use_interface(meeting["interface"], place.address)
        return meet_by_store(self._plan, self._node["index"], place=place, store=store, key=self.key)

    def _take_lease(self, store: Any, lost_after_s: float) -> None:
        index, keyed = self._node["index"], Keyed(self.key, self._plan["run_id"])
        if index:
            keep(Beats(store, keyed), index, self._cut_off, lost_after_s=lost_after_s)
            return
        others = [node["index"] for node in self._plan["nodes"] if node["index"]]
        watch(Beats(store, keyed), others, lambda node: self._tell("unheard", of=node), lost_after_s=lost_after_s)

    def _where(self) -> Mapping[str, Any]:
        timeout_s = self._plan["limits"]["join_timeout_s"]
        try:
            return self.told.get(timeout=timeout_s)
        except Empty:
            raise RendezvousError(f"the first node did not say within {timeout_s:g} s where it listens") from None

    def _names(self) -> list[str]:
        """What others may call this node: as planned, its name, as the launcher reached it, its own idea."""
        return [self._plan["meeting"]["host"], self._node["name"], *self._reached, socket.gethostname()]


def _use_interface(interface: str, address: str) -> None:
    """Lets ranks talk over the interface on which the first node is reached; the job's own words win."""
    found = interface if interface != "auto" else interface_of(way_to(address))
    if found is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={found}")
