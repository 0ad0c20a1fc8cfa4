"""Hosts of a host file: their names, and which of them this machine is."""

import socket
from pathlib import Path

import pytest

from meshwright.clusters import mpi_hosts
from meshwright.clusters.mpi_hosts import hosts_of, place_of


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a slots=2\nb:4\n# c\n\na\n", ("a", "b")),
        ("10.0.0.1\n10.0.0.2 max-slots=3\n", ("10.0.0.1", "10.0.0.2")),
        ("+n0\n", ()),
        ("a\n^b\n", ()),
        ("", ()),
    ],
)
def test_names_are_those_of_both_forms(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    (tmp_path / "hosts").write_text(text)
    assert hosts_of(tmp_path / "hosts") == names


def test_a_file_that_cannot_be_read_names_nothing(tmp_path: Path) -> None:
    assert hosts_of(tmp_path / "none") == ()


def test_a_machine_finds_itself_by_its_name_else_by_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "gpu1": "10.0.0.7",
        "gpu2": "10.0.0.2",
        "gpu2.cluster": "10.0.0.2",
        "x": "10.0.0.9",
        "y": "10.0.0.2",
        "127.0.0.1": "127.0.0.1",
    }
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu2.cluster")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: known[name])
    monkeypatch.setattr(mpi_hosts, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.2"})
    assert place_of(["gpu1", "gpu2"]) == 1
    assert place_of(["x", "y"]) == 1
    assert place_of(["127.0.0.1", "x"]) is None
