"""The program that `meshwright doctor` runs on every node: answers questions, a JSON object a line.

    doctor --{"ask": "facts" | "clock" | "listen" | "dial" | "allreduce" | "stop", ...}--> node
           <-{"event": the question, ...answer} or {"event": "error", "message": ...}--

It is started like any program, `python -u -m meshwright.clusters.probe`, here or behind ssh, srun or kubectl exec.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Queue
from threading import Thread
from typing import Any

from meshwright.clusters.channel import Channel
from meshwright.clusters.interfaces import candidates, read_interfaces
from meshwright.clusters.inventory import read_node

__all__ = ["PROBE_ARGV", "main"]

PROBE_ARGV = (sys.executable, "-u", "-m", "meshwright.clusters.probe")

_TRIES = 50
_GREETING_BYTES = 256


class _Probe:
    """One node's answers."""

    def __init__(self) -> None:
        self._listeners: list[socket.socket] = []
        self._ranks: list[subprocess.Popen[str]] = []
        self._stopped = False

    def facts(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What this node is and has."""
        return {"facts": read_node(asked["directories"], asked["write_bytes"]).as_dict()}

    def clock(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The time here."""
        return {"time_unix_s": time.time()}

    def listen(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Listens on every interface that other nodes might reach, greeting who dials with the run's token."""
        found, errors = [], []
        for each in candidates(read_interfaces(), asked["interface"]):
            assert each.address is not None, each
            try:
                listener = _bind(each.address, asked["ports"])
            except OSError as error:
                errors.append(f"{each.name} {each.address}: {error.strerror or error}")
                continue
            self._listeners.append(listener)
            Thread(target=_greet, args=(listener, f"{asked['token']}\n".encode()), daemon=True).start()
            found.append({"interface": each.name, "address": each.address, "port": listener.getsockname()[1]})
        return {"listening": found, "errors": errors}

    def dial(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Dials what other nodes listen on; one that answers with another token is another machine."""
        threads, answers = [], [dict(each) for each in asked["targets"]]
        for answer in answers:
            thread = Thread(target=_dial, args=(answer, asked["timeout_s"]), daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()
        return {"dialled": answers}

    def allreduce(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Runs this node's ranks of a timed all-reduce; the answer of rank 0's node has the result."""
        self._let_go()
        self._stopped = False
        self._ranks = [_rank(asked, local) for local in range(len(asked["ranks"]))]
        deadline_s, told, errors = time.monotonic() + asked["timeout_s"], "", []
        for rank in self._ranks:
            try:
                said, complained = rank.communicate(timeout=max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                errors.append(f"did not end within {asked['timeout_s']:g} s")
                self._kill()
                rank.communicate()
                continue
            told = told or said.strip()
            if rank.returncode:
                errors.append(_last_line(complained) or f"exit code {rank.returncode}")
        return {"result": json.loads(told) if told and not errors else None, "errors": [] if self._stopped else errors}

    def _let_go(self) -> None:
        """Stops listening, so that the ranks can."""
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._listeners = []

    def stop(self) -> None:
        """Ends the ranks of an all-reduce whose other ranks have failed; from any thread."""
        self._stopped = True
        self._kill()

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)


def _bind(address: str, ports: tuple[int, int] | None) -> socket.socket:
    """A listener of one address only, on a random port of a range so that two jobs rarely try the same."""
    if ports is None:
        return socket.create_server((address, 0))
    span = range(ports[0], ports[1] + 1)
    last = OSError(f"no port from {ports[0]} to {ports[1]} is free")
    for port in random.sample(span, min(_TRIES, len(span))):
        try:
            return socket.create_server((address, port))
        except OSError as error:
            last = OSError(error.errno, f"port {port}: {os.strerror(error.errno or 0)}")
    raise last


def _greet(listener: socket.socket, greeting: bytes) -> None:
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:  # closed
            return
        with caller, suppress(OSError):
            caller.sendall(greeting)


def _dial(target: dict[str, Any], timeout_s: float) -> None:
    """Adds to a target what came of dialling it: seconds, or an error."""
    start_s = time.perf_counter()
    try:
        with socket.create_connection((target["address"], target["port"]), timeout_s) as line:
            greeting = line.recv(_GREETING_BYTES).decode(errors="replace").strip()
    except OSError as error:
        target["error"] = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return
    if greeting != target["token"]:
        target["error"] = "another machine answers there"
        return
    target["seconds"] = time.perf_counter() - start_s


def _rank(asked: Mapping[str, Any], local: int) -> "subprocess.Popen[str]":
    words = (sys.executable, "-m", "meshwright.clusters.bandwidth", asked["backend"], str(asked["bytes"]))
    names = {"GLOO_SOCKET_IFNAME": asked["interface"], "NCCL_SOCKET_IFNAME": f"={asked['interface']}"}
    identity = {
        "RANK": str(asked["ranks"][local]),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(asked["world"]),
        "MASTER_ADDR": asked["address"],
        "MASTER_PORT": str(asked["port"]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        (*words, str(asked["timeout_s"])),
        env={**os.environ, **names, **identity},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def main() -> None:
    """Answers until there are no more questions, and then goes at once, with what it started."""
    channel, probe = Channel(), _Probe()
    questions: Queue[Mapping[str, Any]] = Queue()
    answers = {
        "facts": probe.facts,
        "clock": probe.clock,
        "listen": probe.listen,
        "dial": probe.dial,
        "allreduce": probe.allreduce,
    }

    def answer() -> None:
        while True:
            asked = questions.get()
            try:
                channel.tell(asked["ask"], **answers[asked["ask"]](asked))
            except Exception as error:
                channel.tell("error", ask=asked["ask"], message=f"{type(error).__name__}: {error}")

    Thread(target=answer, daemon=True).start()
    for message in channel.messages():
        if message["ask"] == "stop":
            probe.stop()
        else:
            questions.put(message)
    probe.stop()
    os._exit(0)


if __name__ == "__main__":
    main()
