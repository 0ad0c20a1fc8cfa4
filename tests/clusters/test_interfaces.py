"""Interfaces of this machine, and which of them are tried."""

import socket
from pathlib import Path

from meshwright.clusters.interfaces import (
    Interface,
    _ethernet_bytes_per_s,
    _infiniband_bytes_per_s,
    candidates,
    read_interfaces,
)


def _up(name: str, address: str | None = "10.0.0.1", **more: object) -> Interface:
    return Interface(name, address, up=True, **more)  # type: ignore[arg-type]


def test_the_interfaces_of_this_machine_are_those_the_kernel_lists() -> None:
    found = {each.name: each for each in read_interfaces()}
    assert set(found) == {name for _, name in socket.if_nameindex()}
    assert found["lo"] == Interface("lo", "127.0.0.1", up=True, loopback=True)


def test_real_and_fast_interfaces_come_first_and_bridges_of_containers_are_left_out() -> None:
    slow, fast = _up("eth0", wired=True, bytes_per_s=1e8), _up("ib0", wired=True, bytes_per_s=5e10)
    tunnel, lo = _up("tun0"), _up("lo", "127.0.0.1", loopback=True)
    others = [_up("docker0"), _up("br-12ab"), _up("veth1"), _up("eth1", None), Interface("eth2", "10.0.0.3", up=False)]
    assert candidates([lo, tunnel, slow, *others, fast]) == (fast, slow, tunnel, lo)


def test_an_interface_asked_for_by_name_is_the_only_one_whatever_it_is() -> None:
    docker = _up("docker0")
    assert candidates([_up("eth0"), docker], "docker0") == (docker,)
    assert candidates([_up("eth0"), docker], "eth9") == ()


def test_speeds_are_read_where_the_kernel_knows_them(tmp_path: Path) -> None:
    assert _ethernet_bytes_per_s(tmp_path) is None
    (tmp_path / "speed").write_text("100000\n")
    assert _ethernet_bytes_per_s(tmp_path) == 12.5e9
    (tmp_path / "speed").write_text("-1\n")
    assert _ethernet_bytes_per_s(tmp_path) is None
    assert _infiniband_bytes_per_s(tmp_path) is None
    (tmp_path / "device/infiniband/mlx5_0/ports/1").mkdir(parents=True)
    (tmp_path / "device/infiniband/mlx5_0/ports/1/rate").write_text("400 Gb/sec (4X NDR)\n")
    assert _infiniband_bytes_per_s(tmp_path) == 50e9
