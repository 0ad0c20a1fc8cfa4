"""The lab: real ssh and Slurm between pretended hosts. `make lab` runs it; the ordinary run leaves it out."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hosts import Hosts, missing_for_hosts

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks everything in this folder, and skips it unless the lab is asked for by its marker."""
    asked = "lab" in (config.option.markexpr or "").replace("not lab", "")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.lab)
            item.add_marker(pytest.mark.slow)
            if not asked:
                item.add_marker(pytest.mark.skip(reason="`make lab` runs it"))


@pytest.fixture(scope="session")
def lab_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that every pretended host sees at the same place."""
    folder = tmp_path_factory.mktemp("lab")
    for each in (folder, *folder.parents):
        if each.stat().st_uid == os.getuid() and each != Path("/"):
            each.chmod(each.stat().st_mode | 0o755)
    return folder


@pytest.fixture(scope="session")
def apart(lab_folder: Path) -> Path:
    """A directory of which each host has its own."""
    folder = lab_folder / "apart"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def hosts(lab_folder: Path, apart: Path) -> Iterator[Hosts]:
    """Two hosts with sshd."""
    lacking = missing_for_hosts()
    if lacking:
        pytest.skip(f"THE LAB IS NOT RUN: {lacking}")
    found = Hosts(lab_folder)
    try:
        found.up(private=apart)
        found.wait()
        yield found
    finally:
        found.down()


@pytest.fixture(scope="session")
def source() -> dict[str, str]:
    """Variables by which any Python of a host finds the code under test."""
    return {"PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def python() -> str:
    """The interpreter of hosts."""
    return sys.executable
