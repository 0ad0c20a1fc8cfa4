"""Counters of a logged step: since the step logged before, with units in their names, absent where nothing answers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from meshwright.clusters.usage import GpuUse, Traffic
from meshwright.launch.worker import counters
from meshwright.launch.worker.counters import Counters
from meshwright.launch.worker.metrics import restart_record

CPU = torch.device("cpu")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A host whose counters a test sets."""
    host = SimpleNamespace(network=Traffic(100, 200), rdma=None, loopback=5)
    monkeypatch.setattr(counters, "network_traffic", lambda: host.network)
    monkeypatch.setattr(counters, "rdma_traffic", lambda: host.rdma)
    monkeypatch.setattr(counters, "loopback_bytes", lambda: host.loopback)
    return host


def test_bytes_are_those_since_the_reading_before(host: SimpleNamespace) -> None:
    meter = Counters(CPU, active=True)
    host.network, host.loopback = Traffic(150, 201), 12
    first = meter.read()
    assert (first["network_sent_bytes"], first["network_received_bytes"], first["loopback_bytes"]) == (50, 1, 7)
    second = meter.read()
    assert (second["network_sent_bytes"], second["network_received_bytes"], second["loopback_bytes"]) == (0, 0, 0)
    assert not [key for key in first if key.startswith(("rdma", "gpu"))]


def test_rdma_has_keys_where_there_are_ports(host: SimpleNamespace) -> None:
    host.rdma = Traffic(8, 4)
    meter = Counters(CPU, active=True)
    host.rdma = Traffic(12, 8)
    found = meter.read()
    assert (found["rdma_sent_bytes"], found["rdma_received_bytes"]) == (4, 4)


def test_a_host_that_tells_nothing_has_no_keys(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    host.network, host.loopback = None, None
    monkeypatch.setattr(counters, "_resident_bytes", lambda: None)
    assert sorted(Counters(CPU, active=True).read()) == ["counted_s", "cpu_s"]


def test_time_and_memory_are_of_this_process() -> None:
    meter = Counters(CPU, active=True)
    while meter.read()["cpu_s"] > 0.05:
        pass
    kept = bytearray(64 << 20)
    found = meter.read()
    assert 0 <= found["cpu_s"] <= found["counted_s"] * 64
    assert len(kept) < found["resident_bytes"] < 1 << 36


def test_what_the_gpu_tells_is_logged_and_the_rest_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Meter:
        def __init__(self, uuid: str) -> None:
            asked.append(uuid)

        def read(self) -> GpuUse:
            return GpuUse(utilisation=0.5, power_w=300.0)

    monkeypatch.setattr(counters, "GpuMeter", Meter)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="6a-2f"))
    found = Counters(torch.device("cuda", 0), active=True).read()
    assert asked == ["GPU-6a-2f"]
    assert {key: found[key] for key in found if key.startswith("gpu")} == {"gpu_utilisation": 0.5, "gpu_power_w": 300.0}


def test_other_ranks_read_nothing() -> None:
    assert Counters(torch.device("cuda", 0), active=False).read() == {}


def test_a_beginning_in_the_middle_or_again_is_written_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MESHWRIGHT_ATTEMPT", raising=False)
    assert restart_record(0) == []
    assert restart_record(7)[0]["step"] == 7
    monkeypatch.setenv("MESHWRIGHT_ATTEMPT", "2")
    monkeypatch.setenv("MESHWRIGHT_RUN_ID", "r")
    (found,) = restart_record(0)
    assert (found["event"], found["attempt"], found["run_id"]) == ("restart", 2, "r")
