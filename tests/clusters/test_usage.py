"""Bytes of a host and the use of a GPU: what is there is counted once, what is not is an ordinary answer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.clusters.usage import (
    GpuMeter,
    Traffic,
    cpu_ticks,
    gpus_now,
    loopback_bytes,
    memory_used_bytes,
    network_traffic,
    rdma_traffic,
)
from tests.lab.nvml import with_gpus

HEAD = "Inter-|   Receive    |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes ...\n"
ASK = "import json, sys; from meshwright.clusters.usage import GpuMeter\nuse = GpuMeter(sys.argv[1]).read()\n"


def counts(tmp_path: Path, **rows: tuple[int, int]) -> Path:
    file = tmp_path / "dev"
    lines = [f"{name:>6}: {received} 1 0 0 0 0 0 0 {sent} 1 0 0 0 0 0 0\n" for name, (sent, received) in rows.items()]
    file.write_text(HEAD + "".join(lines))
    return file


def test_each_byte_that_leaves_the_host_is_counted_once(tmp_path: Path) -> None:
    rows = {"lo": (1, 1), "eth0": (20, 300), "ib0": (4000, 0), "docker0": (9, 9), "veth1a": (9, 9)}
    file = counts(tmp_path, **rows, bond0=(70, 7), eth1=(70, 7), eth2=(0, 0))
    for part in ("eth1", "eth2"):
        (tmp_path / "net" / part / "bonding_slave").mkdir(parents=True)
    assert network_traffic(file, tmp_path / "net") == Traffic(4090, 307)
    assert loopback_bytes(file) == 1


def test_a_system_without_these_files_counts_nothing(tmp_path: Path) -> None:
    assert network_traffic(tmp_path / "no") is None
    assert loopback_bytes(tmp_path / "no") is None
    assert rdma_traffic(tmp_path / "no") is None


def test_counters_never_run_backwards() -> None:
    assert Traffic(5, 1).since(Traffic(7, 0)) == Traffic(0, 1)


def test_ports_of_rdma_count_words_of_four_bytes(tmp_path: Path) -> None:
    for number in (0, 1):
        port = tmp_path / f"mlx5_{number}/ports/1/counters"
        port.mkdir(parents=True)
        (port / "port_xmit_data").write_text(f"{10 + number}\n")
        (port / "port_rcv_data").write_text("3\n")
    assert rdma_traffic(tmp_path) == Traffic(84, 24)
    (tmp_path / "mlx5_0/ports/1/counters/port_rcv_data").write_text("N/A (no PMA)\n")
    assert rdma_traffic(tmp_path) is None


def test_what_is_sent_over_loopback_here_is_counted() -> None:
    before = loopback_bytes()
    if before is None:
        pytest.skip("this system has no /proc/net/dev")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(bytes(100_000))
        taken, _ = server.accept()
        while taken.recv(1 << 16, socket.MSG_DONTWAIT):
            if (loopback_bytes() or 0) - before >= 100_000:
                break
        taken.close()
    assert (loopback_bytes() or 0) - before >= 100_000


def ask(uuid: str, environment: dict[str, str]) -> object:
    code = f"{ASK}print(json.dumps(None if use is None else use.__dict__))"
    command = [sys.executable, "-c", code, uuid]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_a_gpu_is_asked_by_its_own_name() -> None:
    story = with_gpus("gpus=4 2.busy=83 2.used=4096 2.milliwatts=612500 2.temperature=71 *.busy=1")
    busy = {"utilisation": 0.83, "memory_used_bytes": 4096, "power_w": 612.5, "temperature_c": 71}
    assert ask("GPU-fake-2", story) == busy


def test_what_a_driver_does_not_tell_is_left_out_and_no_gpu_is_an_answer() -> None:
    story = with_gpus("gpus=4 1.used=4096")
    assert ask("GPU-fake-1", story) == {
        "utilisation": None,
        "memory_used_bytes": 4096,
        "power_w": None,
        "temperature_c": 37,
    }
    assert ask("GPU-other", story) is None
    assert ask("GPU-fake-1", with_gpus("init=9")) is None


def test_a_machine_without_the_library_has_no_gpu_to_read(tmp_path: Path) -> None:
    assert ask("GPU-fake-0", {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}) is None
    assert GpuMeter("").read() is None


def test_processors_and_memory_of_a_host_are_what_the_kernel_tells(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  10 1 5 70 4 2 3 5 900 0\ncpu0 1 1 1 1\n")
    assert cpu_ticks(tmp_path / "stat") == (26, 100), "guests are in the first number already"
    (tmp_path / "memory").write_text("MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:  40 kB\n")
    assert memory_used_bytes(tmp_path / "memory") == 60 * 1024
    for strange in ("", "x", "cpu x", "MemTotal: kB\nMemAvailable: 1 kB\n"):
        (tmp_path / "strange").write_text(strange)
        assert (cpu_ticks(tmp_path / "strange"), memory_used_bytes(tmp_path / "strange")) == (None, None)
    assert (cpu_ticks(tmp_path / "no"), memory_used_bytes(tmp_path / "no")) == (None, None)


def test_no_library_and_no_driver_are_no_gpus() -> None:
    assert gpus_now() == []
