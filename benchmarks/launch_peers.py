"""The same loop started by each launcher on two nodes, one rank each: torchrun, deepspeed, accelerate.

Each node's own command is typed at the same time, there or here (see `benchmarks.launch_nodes`).
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.launch_nodes import NODES, Nodes, here_environment

__all__ = ["PEERS", "first_step_s", "free_port", "missing"]

_LOOP = "benchmarks.peer_loop"


@dataclass(frozen=True)
class Start:
    """One launch: a folder that all nodes see, the address of the first node, and a port that is free there."""

    folder: Path
    address: str
    port: int


Words = Callable[[Start, int], list[str]]


def _torchrun(start: Start, node: int) -> list[str]:
    where = ["--nnodes", str(NODES), "--node-rank", str(node), "--nproc-per-node", "1"]
    meet = ["--master-addr", start.address, "--master-port", str(start.port)]
    return [sys.executable, "-m", "torch.distributed.run", *where, *meet, "-m", _LOOP]


def _deepspeed(start: Start, node: int) -> list[str]:
    hosts = start.folder / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")  # two names; by --no_ssh nobody looks them up
    where = ["--hostfile", str(hosts), "--no_ssh", "--no_local_rank", "--node_rank", str(node)]
    meet = ["--master_addr", start.address, "--master_port", str(start.port)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *where, *meet, "--module", _LOOP]


def _accelerate(start: Start, node: int) -> list[str]:
    where = ["--multi_gpu", "--num_machines", str(NODES), "--machine_rank", str(node), "--num_processes", str(NODES)]
    meet = ["--main_process_ip", start.address, "--main_process_port", str(start.port), "--rdzv_backend", "static"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *where, *meet, *plain, "-m", _LOOP]


PEERS: dict[str, Words] = {"torchrun": _torchrun, "deepspeed": _deepspeed, "accelerate": _accelerate}
"""Launcher -> the words typed on a node, given the launch and the node's index."""

_MODULES = {"torchrun": "torch", "deepspeed": "deepspeed", "accelerate": "accelerate"}


def missing() -> list[str]:
    """Launchers that are not installed here."""
    return [name for name, module in _MODULES.items() if find_spec(module) is None]


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_step_s(name: str, folder: Path, *, nodes: Nodes, job: Path, steps: int) -> float:
    """Seconds from the commands to the end of the first step.

    Args:
        name: of the launcher.
        folder: an empty one, that all nodes see.
        nodes: on which it starts ranks.
        job: whose model and batch the loop takes.
        steps: that it trains.

    Raises:
        SystemExit: with what a launcher said that failed.
    """
    out, start = folder / "peer.json", Start(folder, nodes.address, free_port())
    start_s = time.time()
    typed = []
    for node in range(NODES):
        words = [*PEERS[name](start, node), str(job), str(steps), "ddp", str(out)]
        with (folder / f"node-{node}.log").open("w") as log:
            environment = here_environment(nodes)
            typed.append(subprocess.Popen(nodes.words(node, words), env=environment, stdout=log, stderr=log))
    if any([each.wait() for each in typed]):
        said = "\n".join((folder / f"node-{node}.log").read_text()[-2000:] for node in range(NODES))
        raise SystemExit(f"{name} failed\n{said}")
    return float(json.loads(out.read_text())["first_step_unix_s"]) - start_s
