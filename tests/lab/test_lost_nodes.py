"""Three hosts, a job on two of them: one is lost, and the run goes on with the third as if nothing had been."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.sweep import carriers
from tests.lab.hosts import Host, Hosts, missing_for_hosts, run
from tests.lab.launches import Launch, finish
from tests.lab.test_ssh import cluster
from tests.launch.waiting import eventually, kill_all
from tests.launch.worker.runs import finish as train
from tests.launch.worker.runs import run_dir as run_dir_of
from tests.launch.worker.runs import write_job

STEPS = 60
LOST_AFTER_S = 6


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Hosts]:
    lacking = missing_for_hosts()
    if lacking:
        pytest.skip(f"THE LAB IS NOT RUN: {lacking}")
    found = Hosts(tmp_path / "lab", 3, token=os.getpid() + 5000)
    try:
        found.up()
        found.wait()
        yield found
    finally:
        found.down()


def launched(three: Hosts, source: dict[str, str], folder: Path, name: str) -> tuple[Launch, Path]:
    """A training on two of the hosts, in a folder that all of them see."""
    far = Launch(folder / name, {"far": cluster(three, source, lost_after=f"{LOST_AFTER_S}s")}, f"{name}-{os.getpid()}")
    return far, write_job(far.folder, steps=STEPS, every=5)


def sets(*more: str) -> list[str]:
    words = ("cluster=far", "nodes=2", "failure.max_restarts=2", "failure.backoff.initial=100ms", *more)
    return [word for each in words for word in ("--set", each)]


def found_losses(run_dir: Path) -> list[tuple[int, float]]:
    told = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(each["step"], each["loss"]) for each in told if "loss" in each]


def cut(host: Host) -> None:
    host.link("down")


def silence(host: Host) -> None:
    """The launcher sees the end of its connection at once, and the host nothing at all."""
    host.link("down")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words: list[bytes] = []
        with suppress(OSError):  # of what has ended meanwhile
            words = path.read_bytes().split(b"\0")
        if words[:1] == [b"ssh"] and host.name.encode() in words and any(b"agent" in word for word in words):
            kill_all([int(path.parent.name)])


def kill(host: Host) -> None:
    kill_all(map(int, run("ip", "netns", "pids", host.namespace).split()))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """Losses of the same training on this machine, of which nothing is lost."""
    job = write_job(tmp_path_factory.mktemp("calm"), steps=STEPS, every=5)
    code, output = train(job, "calm", "nodes=2", "cluster.simulate_nodes=2")
    assert code == 0, output
    found = found_losses(run_dir_of(job, "calm"))
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize(
    ("lose", "victim"), [(silence, 1), (kill, 1), (cut, 0)], ids=["silent", "killed", "first node cut"]
)
def test_a_lost_host_is_replaced_and_the_numbers_are_those_of_a_run_that_lost_none(
    three: Hosts,
    source: dict[str, str],
    tmp_path: Path,
    calm: list[tuple[int, float]],
    lose: Callable[[Host], None],
    victim: int,
) -> None:
    far, job = launched(three, source, tmp_path, "lost")
    run_dir, saved = far.folder / "runs" / far.run_id, far.folder / "checkpoints"
    with ThreadPoolExecutor(1) as pool:  # its launcher sees no process of any host, and sweeps none
        launching = pool.submit(far.run, job, *sets())
        assert eventually(lambda: any(saved.glob("step-*")), 150)
        lose(three.hosts[victim])
        began_s, newest = time.monotonic(), max(saved.glob("step-*")).name
        assert eventually((run_dir / "excluded.json").exists, 60)
        left, taken_s = list(carriers(far.run_id)), time.monotonic() - began_s
        done = launching.result(timeout=240)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert left == [], "ranks that are only cut off have ended before others take their places"
    assert found_losses(run_dir) == calm
    assert not list(carriers(far.run_id))
    told: dict[str, Any] = json.loads((run_dir / "exit.json").read_text())
    name = three.hosts[victim].name
    assert [(each["node"], each["attempt"]) for each in told["excluded"]] == [(name, 0)]
    assert told["restarts"][0]["cause"].startswith(f"host {name}: ")
    assert f"h3 in place of {name}" in output
    assert {node["name"] for node in json.loads((run_dir / "plan.json").read_text())["nodes"]} == {"h1", "h2", "h3"} - {
        name
    }
    resumed = next(line for line in output.splitlines() if "resumed from" in line)
    assert int(resumed.split()[-1]) >= int(newest.removeprefix("step-")), "nothing is lost but what was not saved"
    assert taken_s < 3.5 * LOST_AFTER_S, f"{taken_s:.1f} s from the loss to the start on the other host"


def test_without_a_spare_host_the_run_ends_and_says_which_and_what_to_do(
    three: Hosts, source: dict[str, str], tmp_path: Path
) -> None:
    far, job = launched(three, source, tmp_path, "bare")
    launcher, saved = far.start(job, *sets("nodes=3", "parallel.dp=3")), far.folder / "checkpoints"
    try:
        assert eventually(lambda: any(saved.glob("step-*")), 150), launcher.stdout
        kill(three.hosts[2])
        output, _ = launcher.communicate(timeout=240)
    finally:
        finish(launcher)
    assert launcher.returncode == 69, output
    reason = json.loads((far.folder / "runs" / far.run_id / "exit.json").read_text())["reason"]
    assert reason.startswith("host h3: ")
    assert "not started again: h3 cannot be left out: the job wants 3 nodes, and 2 of the 3 hosts it names" in reason
    assert "put more into cluster.hosts" in reason
    assert not list(carriers(far.run_id))


def test_an_elastic_run_goes_on_with_fewer_hosts(three: Hosts, source: dict[str, str], tmp_path: Path) -> None:
    far, job = launched(three, source, tmp_path, "fewer")
    words = sets("parallel.dp=3", "nproc_per_node=1")
    words[words.index("nodes=2")] = "nodes={min: 2, max: 3}"
    launcher, saved = far.start(job, *words), far.folder / "checkpoints"
    try:
        assert eventually(lambda: any(saved.glob("step-*")), 150), launcher.stdout
        kill(three.hosts[1])
        output, _ = launcher.communicate(timeout=240)
    finally:
        finish(launcher)
    assert launcher.returncode == 0, output
    run_dir = far.folder / "runs" / far.run_id
    assert [step for step, _ in found_losses(run_dir)] == list(range(1, STEPS + 1))
    told, plan = (json.loads((run_dir / name).read_text()) for name in ("exit.json", "plan.json"))
    assert [node["name"] for node in plan["nodes"]] == ["h1", "h3"]
    assert plan["limits"]["regroup"] is True
    assert [(each["nodes"], each["excludes"]) for each in told["restarts"]] == [([3, 2], ["h2"])]
    assert "it shrinks from 3 nodes to 2, without h2 (dp=2, num_microbatches=2)" in output
    assert not list(carriers(far.run_id))
