"""The program that mpiexec starts once per rank: finds its place by MPI, starts the rank, and ends with all others.

    launcher --(plan on the first one's standard input; then stop, kill)--> mpi_rank 0 --(MPI)--> mpi_rank 1, 2, ...
             <--(started, exit, result: lines that mpiexec passes on)------ all of them

Which ranks share a node is what MPI says of shared memory, not what a host file promises. The rank itself is a child
that knows nothing of MPI: when it fails, all others are told and end theirs with grace, and the job ends with its code.
Only the main thread calls MPI, and while ranks run it never waits in a call, since waiting would burn a core.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from signal import SIGTERM
from threading import Thread
from typing import Any, NoReturn

from meshwright.clusters import bootstrap
from meshwright.clusters import sweep as sweeping
from meshwright.clusters.deaths import Death, Deaths, exit_code_of
from meshwright.clusters.environment import rank_environment
from meshwright.clusters.errors import RendezvousError
from meshwright.clusters.mpi_hosts import place_of
from meshwright.clusters.mpi_seat import Seat, seat_of
from meshwright.clusters.mpi_words import gathered, spread
from meshwright.clusters.network import own_address
from meshwright.clusters.node_counters import counters_of
from meshwright.clusters.setup import SetupError, run_setup
from meshwright.parallel.importing import import_all
from meshwright.parallel.keyed import BOARD_KEY, derived

__all__ = ["main", "own_environment"]

_STOP_TAG = 7
_TICK_S = 0.02
_SETUP_FAILED, _NOT_MET = 70, 76
_OF_MPI = ("OMPI_", "PMI", "PRTE_", "HYDRA")
"""Starts of variables that tie a process to its mpiexec, which a rank is not to take itself for a part of."""


def own_environment(
    plan: Mapping[str, Any], node: Mapping[str, Any], *, secrets: Mapping[str, str], environment: Mapping[str, str]
) -> dict[str, str]:
    """The variables of a node's ranks, without those that would tie them to mpiexec; what a job says itself stays."""
    free = {name: value for name, value in environment.items() if not name.startswith(_OF_MPI)}
    return rank_environment(plan, node, secrets=secrets, environment=free)


class _Process:
    """One process of the job."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.mpi = MPI
        self.world = MPI.COMM_WORLD
        self.local = self.world.Split_type(MPI.COMM_TYPE_SHARED)
        self.orders: SimpleQueue[str] = SimpleQueue()
        first = self._read() if self.world.rank == 0 else None
        self.message: Mapping[str, Any] = spread(first, self.world)
        self.plan: Mapping[str, Any] = self.message["plan"]
        self.attempt = len(self.plan["limits"]["past"])
        self.seat = _seat(self)
        self.store: Any = None
        self.deaths: list[Death] = []
        self.broom: subprocess.Popen[bytes] | None = None

    def _read(self) -> Mapping[str, Any]:
        """The launcher's first message; further ones are orders, and the end of input is one too."""
        message: Mapping[str, Any] = json.loads(sys.stdin.readline())

        def listen() -> None:
            for line in sys.stdin:
                self.orders.put(json.loads(line)["command"])
            self.orders.put("kill")

        Thread(target=listen, daemon=True).start()
        return message

    @property
    def node(self) -> Mapping[str, Any]:
        """This node's part of the plan."""
        found: Mapping[str, Any] = self.plan["nodes"][self.seat.node]
        return found

    def tell(self, event: str, **fields: object) -> None:
        """One event, in one write: lines of several processes do not mix."""
        os.write(1, (json.dumps({"event": event, "node": self.node["name"], **fields}) + "\n").encode())

    def misplaced(self) -> str | None:
        """Why the processes do not lie as planned; None where they do."""
        planned = tuple(len(node["ranks"]) for node in self.plan["nodes"])
        if self.seat.sizes == planned:
            return None
        found = f"planned were {list(planned)} ranks on nodes, mpiexec started {list(self.seat.sizes)}"
        return f"{found}; see cluster.hostfile and cluster.extra"

    def meet(self) -> tuple[str, int]:
        """Where the ranks' store listens: on one address of the first node, held by its first process.

        Raises:
            RendezvousError: when it cannot listen there; on all processes.
        """
        told: Any = None
        if self.seat.rank == 0:
            try:
                told = self._listen()
            except RendezvousError as error:
                told = str(error)
        _wait_for(self.world)
        found = next(each for each in gathered(told, self.world) if each is not None)
        if isinstance(found, str):
            raise RendezvousError(found)
        address, port = found
        return address, port

    def _listen(self) -> tuple[str, int]:
        import_all(["meshwright.clusters.rendezvous"])
        from meshwright.clusters.rendezvous import Place

        meeting, alone = self.plan["meeting"], len(self.seat.sizes) == 1
        own = own_address(meeting["interface"], [socket.gethostname()]) if not alone else "127.0.0.1"
        place = Place(own, tuple(meeting["ports"]), everywhere=meeting["everywhere"])
        self.store = place.listen(meeting["port"])
        return own, self.store.port

    def environment(self, address: str, port: int) -> dict[str, str]:
        """All variables of the rank, after the setup script.

        Raises:
            SetupFailedError: when that fails.
        """
        own = own_environment(self.plan, self.node, secrets=self.message["secrets"], environment=os.environ)
        if self.plan["setup"] is not None:
            own = self._set_up(own)
        most = self.plan["limits"]["max_restarts"]
        told = self.seat.as_torchrun(address, port, run_id=self.plan["run_id"], attempt=self.attempt, most=most)
        told[BOARD_KEY] = derived(bytes.fromhex(self.message["key"]), "board").hex()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return {"OMP_NUM_THREADS": str(max(1, cores // self.seat.local_size)), **own, **told}

    def _set_up(self, own: dict[str, str]) -> dict[str, str]:
        """The environment after the setup script, which the first process of each node runs."""
        left: dict[str, str] | str = ""
        if self.local.rank == 0:
            log = Path(self.plan["run_dir"], "logs", f"setup-{self.node['name']}.log")
            try:
                left = run_setup(self.plan["setup"], cwd=self.node["cwd"], env=own, log=log)
            except SetupError as error:
                left = str(error)
        _wait_for(self.local)
        left = spread(left, self.local)
        if isinstance(left, str):
            raise SetupFailedError(left)
        return left

    def start(self) -> Deaths:
        """Starts the rank, tied to this process."""
        if self.attempt and self.local.rank == 0:  # before anybody starts a rank, see `meet`
            sweeping.sweep(self.plan["run_id"])
        environment = self.environment(*self.meet())
        if self.local.rank == 0:
            self.broom = _sweep_after(self.plan["run_id"], self.seat.node, self.attempt)
            counters_of(self.plan, self.seat.node).start()
        words = (str(os.getpid()), self.plan["run_dir"], self.node["cwd"], *self.node["argv"])
        argv = (sys.executable, "-I", "-S", str(bootstrap.__file__), *words)
        child = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
        self.tell("started", attempt=self.attempt, pids={self.seat.rank: child.pid}, time_unix_s=time.time())
        return Deaths({self.seat.rank: child.pid}, self._died)

    def _died(self, death: Death) -> None:
        self.tell("exit", **death.as_event(self.attempt))
        self.deaths.append(death)

    def follow(self, deaths: Deaths) -> None:
        """Waits until the ranks of all processes have ended; one that fails, or an order, ends them."""
        barrier: Any = None
        asked_s: float | None = None
        while barrier is None or not barrier.Test():
            if asked_s is None and self._over():
                asked_s = time.monotonic()
                deaths.send(SIGTERM)
            if asked_s is not None and time.monotonic() - asked_s > self.plan["limits"]["shutdown_grace_s"]:
                deaths.kill_groups()
            if barrier is None and deaths.all_dead:
                deaths.kill_groups()
                barrier = self.world.Ibarrier()
            time.sleep(_TICK_S)

    def _over(self) -> bool:
        """Whether ranks are to end: this one failed and the others are told so, they say so, or the launcher does."""
        ordered = "" if self.orders.empty() else self.orders.get()
        if ordered == "kill":
            self.world.Abort(143)
        if ordered == "stop" or any(death.code and not death.ended_by_us for death in self.deaths):
            return _tell_all(self.world)
        return bool(self.world.Iprobe(tag=_STOP_TAG))

    def leave(self, why: str) -> NoReturn:
        """Ends with all others, who know it too: in peace, since what was said may be lost where MPI aborts."""
        if self.seat.rank == 0:
            self.tell("result", state="rendezvous_failed", message=why)
        self.world.Barrier()
        self.mpi.Finalize()
        os._exit(_NOT_MET)

    def end(self) -> None:
        """Says how this node's ranks ended; ends the job with the code of the first that failed by itself."""
        own = [
            (death.time_unix_s, exit_code_of(death.code))
            for death in self.deaths
            if death.code and not death.ended_by_us
        ]
        failures = sorted(each for part in gathered(own, self.world) for each in part)
        stopped = any(gathered(any(death.ended_by_us for death in self.deaths), self.world))
        if self.local.rank == 0:
            sweeping.sweep(self.plan["run_id"], self.seat.node)
            self.tell("result", state="failed" if failures else "stopped" if stopped else "succeeded", message="")
        self.world.Barrier()
        if failures:
            self.world.Abort(failures[0][1])


def _seat(process: _Process) -> Seat:
    """Where a process sits, as MPI tells of shared memory and its leader of its host."""
    world, local = process.world, process.local
    leader = spread(world.rank, local)
    place = place_of([node["name"] for node in process.plan["nodes"]]) if local.rank == 0 else None
    return seat_of(leader, local.rank, gathered(leader, world), places=gathered(place, world))


def _sweep_after(run_id: str, node: int, attempt: int) -> "subprocess.Popen[bytes]":
    """Sweeps a node when this process is gone: MPI kills it with its rank, and knows nothing of the rank's children.

    Only of this attempt: ranks of the next one may be there already.
    """
    return subprocess.Popen(
        (sys.executable, "-I", "-S", str(sweeping.__file__), run_id, str(node), str(attempt)),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # mpiexec waits for the end of what its processes write
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _tell_all(world: Any) -> bool:
    for other in range(world.size):
        if other != world.rank:
            world.Isend(b"", dest=other, tag=_STOP_TAG)
    return True


def _wait_for(others: Any) -> None:
    """Sleeps until all of a communicator have come here: MPI itself would wait with every core at full load."""
    barrier = others.Ibarrier()
    while not barrier.Test():
        time.sleep(_TICK_S)


class SetupFailedError(Exception):
    """A setup script that failed on this node."""


def main() -> None:
    """Runs one rank of the job."""
    process = _Process()
    why = process.misplaced()
    if why is not None:
        process.leave(why)
    try:
        deaths = process.start()
        process.follow(deaths)
        process.end()
    except RendezvousError as error:
        process.leave(str(error))
    except SetupFailedError as error:
        process.tell("result", state="setup_failed", message=str(error))
        process.world.Abort(_SETUP_FAILED)


if __name__ == "__main__":
    main()
