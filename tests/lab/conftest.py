"""The lab: real ssh and Slurm between pretended hosts. `make lab` runs it; the ordinary run leaves it out."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.hosts import Hosts, missing_for_hosts, pretended
from tests.lab.launches import QUICKSTART, SHRINKING, SHRINKING_STEPS, Launch, losses, write_training
from tests.lab.slurm import Slurm, missing_for_slurm
from tests.launch.worker.runs import run_dir, train_here

ROOT = Path(__file__).resolve().parents[2]
_LONGEST_FIRST = (
    "test_ray.py",
    "test_ray_lost.py",
    "test_lost_nodes.py",
    "test_mpi_lost.py",
    "test_slurm.py",
    "test_doctor.py",
)
"""Files, so that what ends last is short, and those who run tests end together."""


def _is_asked(config: pytest.Config) -> bool:
    """Whether the lab is asked for by its marker."""
    return "lab" in (config.option.markexpr or "").replace("not lab", "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks everything in this folder, and skips it unless the lab is asked for by its marker."""
    asked = _is_asked(config)
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.lab)
            item.add_marker(pytest.mark.slow)
            if not asked:
                item.add_marker(pytest.mark.skip(reason="`make lab` runs it"))
    if asked:
        place = {name: index for index, name in enumerate(_LONGEST_FIRST)}
        items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out tests of the lab one by one: hosts and Slurm are up in seconds, and one long file would decide.

    Tests that share a Ray cluster stay together, since that takes as long to start as one of them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if path.endswith(("test_ray.py", "test_ray_lost.py")) else nodeid

    return OneByOne(config, log) if _is_asked(config) else None


def _or_say(lacking: str) -> None:
    """Skips where something is lacking, and says what."""
    if lacking:
        pytest.skip(f"THE LAB IS NOT RUN: {lacking}")


@pytest.fixture(scope="session")
def lab_folder() -> Iterator[Path]:
    """A folder that every pretended host, and the user of munge, sees at the same place."""
    folder = Path(tempfile.mkdtemp(prefix="meshwright-lab-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def apart(lab_folder: Path) -> Path:
    """A directory of which each host has its own."""
    folder = lab_folder / "apart"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def hosts(lab_folder: Path, apart: Path) -> Iterator[Hosts]:
    """Two hosts with sshd."""
    _or_say(missing_for_hosts())
    with pretended(lab_folder, private=apart) as found:
        yield found


@pytest.fixture(scope="session")
def source() -> dict[str, str]:
    """Variables by which any Python of a host finds the code under test."""
    return {"PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    """A Slurm cluster of those hosts."""
    _or_say(missing_for_slurm())
    found = Slurm(hosts)
    try:
        found.up()
        yield found
    finally:
        found.down()


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Losses of the quickstart on this machine."""
    _or_say(missing_for_hosts())
    return _once(tmp_path_factory, "here", _quickstart)


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Losses of `SHRINKING` on one rank of this machine, which nothing befalls."""
    return _once(tmp_path_factory, "calm", _undisturbed)


def _once(factory: pytest.TempPathFactory, name: str, train: Callable[[Path], list[Any]]) -> list[Any]:
    """Losses of a training; of all processes that run tests, the first that asks trains it."""
    own = factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    kept = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_text(json.dumps(train(folder / name)))
    return [tuple(each) for each in json.loads(kept.read_text())]


def _undisturbed(folder: Path) -> list[Any]:
    job = write_training(folder, steps=SHRINKING_STEPS, every=SHRINKING_STEPS)
    train_here(job, "r1", *SHRINKING, "parallel.dp=1")
    return losses(run_dir(job, "r1"))


def _quickstart(folder: Path) -> list[Any]:
    near = Launch(folder, {}, f"here-{os.getpid()}")
    done = near.run(*QUICKSTART, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(near.folder / "runs/quickstart" / near.run_id)
    assert [(step, name) for step, name, _ in found] == [
        (0, "validation_loss"),
        *((step, "loss") for step in (1, 2, 3)),
        (3, "validation_loss"),
    ]
    return found
