"""Counters of every node go to a file of its own, which stays small however long a run is and on however many nodes."""

import json
import socket
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters import node_counters
from meshwright.clusters.node_counters import NodeCounters, NodeReader, counters_of, interval_of, most_of, thinned
from meshwright.clusters.turns import Turns
from meshwright.clusters.usage import GpuUse, Traffic, loopback_bytes
from tests.lab.nvml import with_gpus
from tests.launch.waiting import eventually


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def counted(path: Path, *, most: int, times: int) -> list[dict[str, Any]]:
    """What is in a file after so many writings, each of which counts one byte and a temperature that grows."""
    told = ({"counted_s": 1.0, "network_sent_bytes": 1, "gpu_temperature_c": each} for each in range(times))
    counters = NodeCounters(path, "n0", read=lambda: next(told), most=most)
    for _ in range(times):
        counters.write()
    return lines(path)


def test_a_file_stays_small_and_keeps_every_byte_and_the_newest_lines_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "nodes/n0.jsonl"
    found = counted(path, most=40, times=1000)
    assert len(found) <= 40
    assert sum(each["network_sent_bytes"] for each in found) == 1000
    assert sum(each["counted_s"] for each in found) == 1000.0
    assert found[-1]["gpu_temperature_c"] == 999
    assert [each["counted_s"] for each in found[-10:]] == [1.0] * 10, "what is new is as dense as ever"
    assert found[0]["counted_s"] > 10
    assert sorted(found, key=lambda each: each["time_unix_s"]) == found
    assert {each["node"] for each in found} == {"n0"}
    assert path.stat().st_mode & 0o077 == 0
    assert [each.name for each in path.parent.iterdir()] == ["n0.jsonl"]


def test_peaks_stay_and_shares_are_averaged_when_lines_become_one() -> None:
    found = [{"cpu_utilisation": each / 10, "gpu_memory_used_bytes": 10 * each} for each in (1, 9, 4, 4)]
    assert thinned([*found, {"x": 1}])[0] == {"cpu_utilisation": 0.5, "gpu_memory_used_bytes": 90}
    assert thinned([{"x": 1}]) == [{"x": 1}]


def test_a_run_that_starts_again_goes_on_with_its_file_and_only_torn_lines_are_lost(tmp_path: Path) -> None:
    path = tmp_path / "nodes/n0.jsonl"
    counted(path, most=40, times=39)
    assert len(counted(path, most=40, times=2)) < 40, "lines of before count"
    path.write_text('{"node": "n0"}\n7\n{"node": "n0", "cou')
    assert len(counted(path, most=40, times=2)) == 3


def test_a_name_with_odd_characters_is_that_of_a_file_that_is_sent(tmp_path: Path) -> None:
    counters_of({"nodes": [{"name": "fe80::1", "env": []}], "run_dir": str(tmp_path)}, 0).write()
    assert lines(tmp_path / "nodes/fe80--1.jsonl")[0]["node"] == "fe80::1"


def test_what_could_not_be_read_at_the_start_is_no_peak_later(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("network_traffic", "rdma_traffic", "loopback_bytes"):
        monkeypatch.setattr(node_counters, name, lambda: None)
    reader = NodeReader(None, Turns(), lambda gpus: [])
    for name in ("network_traffic", "rdma_traffic"):
        monkeypatch.setattr(node_counters, name, lambda: Traffic(10**12, 10**12))
    monkeypatch.setattr(node_counters, "loopback_bytes", lambda: 10**12)
    assert {value for key, value in reader.read().items() if key.endswith("_bytes") and "memory" not in key} == {0}


def test_a_disk_that_takes_nothing_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("not a folder")
    NodeCounters(tmp_path / "nodes/n0.jsonl", "n0", read=dict).write()


def test_all_files_of_a_thousand_nodes_are_bounded() -> None:
    for nodes in (1, 8, 100, 1000, 4000):
        assert most_of(nodes) * nodes <= max(50_000, 50 * nodes)
        assert nodes / interval_of(nodes) <= 50


def test_a_reading_counts_what_went_over_this_machine_since_the_one_before() -> None:
    if loopback_bytes() is None:
        pytest.skip("this system has no /proc/net/dev")
    reader = NodeReader(None, Turns(), lambda gpus: [])
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(bytes(100_000))
        taken, _ = server.accept()
        taken.recv(1)
        taken.close()
    found = reader.read()
    assert found["loopback_bytes"] >= 65_000
    assert found["memory_used_bytes"] > 0
    assert 0 <= found.get("cpu_utilisation", 0.0) <= 1
    assert not [key for key in found if key.startswith("gpu")], "no GPU, no key"
    assert reader.read()["counted_s"] < 60


def test_gpus_of_a_node_are_summed_up_and_asked_in_turns() -> None:
    turns = Turns()

    def ask(gpus: Collection[int] | None) -> list[GpuUse]:
        assert gpus == {1, 2}
        with turns.still(0.0) as free:
            assert not free, "nobody forks meanwhile"
        return [GpuUse(0.5, 100, 300.0, 40), GpuUse(1.0, 50, 600.0, 70), GpuUse()]

    found = NodeReader({1, 2}, turns, ask).read()
    assert {key: value for key, value in found.items() if key.startswith("gpu")} == {
        "gpu_utilisation": 0.75,
        "gpu_utilisation_least": 0.5,
        "gpu_memory_used_bytes": 100,
        "gpu_power_w": 900.0,
        "gpu_temperature_c": 70,
    }


def test_the_gpus_of_a_nodes_ranks_are_asked_by_the_driver(tmp_path: Path) -> None:
    code = (
        "import json, sys; from meshwright.clusters.node_counters import counters_of\n"
        "counters_of(json.loads(sys.argv[1]), 0).write()\n"
    )
    nodes = [{"name": "n0", "env": [["CUDA_VISIBLE_DEVICES", "1,3"]]}]
    plan = json.dumps({"nodes": nodes, "run_dir": str(tmp_path)})
    story = with_gpus("gpus=4 1.busy=80 3.busy=40 0.busy=1 1.milliwatts=100000 3.milliwatts=50000 3.temperature=71")
    subprocess.run([sys.executable, "-c", code, plan], env=story, check=True, timeout=60)
    (found,) = lines(tmp_path / "nodes/n0.jsonl")
    assert (found["gpu_utilisation"], found["gpu_utilisation_least"]) == (0.6, 0.4)
    assert (found["gpu_power_w"], found["gpu_temperature_c"]) == (150.0, 71)


def test_it_writes_by_itself_once_it_is_started(tmp_path: Path) -> None:
    plan = {"nodes": [{"name": "n0", "env": []}], "run_dir": str(tmp_path)}
    counters = counters_of(plan, 0)
    counters.start()
    counters.start()
    assert eventually((tmp_path / "nodes/n0.jsonl").exists)
    assert lines(tmp_path / "nodes/n0.jsonl")[0]["counted_s"] < 60
