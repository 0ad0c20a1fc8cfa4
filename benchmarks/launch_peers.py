"""The same loop started by each launcher on two nodes of this machine, one rank each: torchrun, deepspeed, accelerate.

Each node's own command is typed at the same time, as ssh would; no name is looked up and no host is logged in to.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

__all__ = ["PEERS", "first_step_s", "free_port", "missing"]

NODES = 2
_LOOP = "benchmarks.peer_loop"
Words = Callable[[Path, int, int], list[str]]


def _torchrun(folder: Path, node: int, port: int) -> list[str]:
    where = ["--nnodes", str(NODES), "--node-rank", str(node), "--nproc-per-node", "1"]
    meet = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *where, *meet, "-m", _LOOP]


def _deepspeed(folder: Path, node: int, port: int) -> list[str]:
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    where = ["--hostfile", str(hosts), "--no_ssh", "--no_local_rank", "--node_rank", str(node)]
    meet = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *where, *meet, "--module", _LOOP]


def _accelerate(folder: Path, node: int, port: int) -> list[str]:
    where = ["--multi_gpu", "--num_machines", str(NODES), "--machine_rank", str(node), "--num_processes", str(NODES)]
    meet = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--rdzv_backend", "static"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *where, *meet, *plain, "-m", _LOOP]


PEERS: dict[str, Words] = {"torchrun": _torchrun, "deepspeed": _deepspeed, "accelerate": _accelerate}
"""Launcher -> the words typed on a node, given a folder, the node's index and a port."""

_MODULES = {"torchrun": "torch", "deepspeed": "deepspeed", "accelerate": "accelerate"}


def missing() -> list[str]:
    """Launchers that are not installed here."""
    return [name for name, module in _MODULES.items() if find_spec(module) is None]


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_step_s(name: str, folder: Path, *, job: Path, steps: int) -> float:
    """Seconds from the commands to the end of the first step.

    Args:
        name: of the launcher.
        folder: an empty one.
        job: whose model and batch the loop takes.
        steps: that it trains.

    Raises:
        SystemExit: with what a launcher said that failed.
    """
    out, port = folder / "peer.json", free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_BUILD_OPS": "0"}
    start_s = time.time()
    nodes = []
    for node in range(NODES):
        words = [*PEERS[name](folder, node, port), str(job), str(steps), "ddp", str(out)]
        with (folder / f"node-{node}.log").open("w") as log:
            nodes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
    if any([node.wait() for node in nodes]):
        said = "\n".join((folder / f"node-{node}.log").read_text()[-2000:] for node in range(NODES))
        raise SystemExit(f"{name} failed\n{said}")
    return float(json.loads(out.read_text())["first_step_unix_s"]) - start_s
