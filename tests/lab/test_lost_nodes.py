"""Hosts are lost, and a run goes on with others, or with fewer, as if nothing had been; what comes back is used."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from meshwright.clusters.sweep import carriers
from tests.lab.hosts import Host, Hosts, missing_for_hosts, pretended
from tests.lab.launches import Launch, finish, write_job, write_training
from tests.lab.test_ssh import SLEEP, cluster
from tests.launch.waiting import eventually, kill_all

STEPS, EVERY, PAUSE_S = 50, 5, 0.1
LOST_AFTER_S = 6


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    lacking = missing_for_hosts()
    if lacking:
        pytest.skip(f"THE LAB IS NOT RUN: {lacking}")
    with pretended(tmp_path_factory.mktemp("lost") / "lab", 5, token=os.getpid() + 5000) as found:
        yield found


@pytest.fixture
def lab(five: Hosts) -> Hosts:
    """The hosts, all of them up, whatever befell them before."""
    for host in five.hosts:
        host.link("up")
        if not host.children:
            host.boot()
    five.wait()
    return five


class Training:
    """A training on some of the hosts that something befalls.

    Args:
        lab: the hosts.
        source: variables by which their Python finds the code.
        folder: that all of them see.
        hosts: how many of them the job names.
    """

    def __init__(self, lab: Hosts, source: dict[str, str], folder: Path, hosts: int) -> None:
        keys = cluster(lab, source, lost_after=f"{LOST_AFTER_S}s")
        keys["hosts"] = keys["hosts"][:hosts]
        self.far = Launch(folder, {"far": keys}, f"{folder.name}-{os.getpid()}")
        self.job = write_training(folder, steps=STEPS, every=EVERY, pause_s=PAUSE_S)
        self.run_dir, self.hosts = folder / "runs" / self.far.run_id, {host.name: host for host in lab.hosts}

    @contextmanager
    def running(self, *more: str) -> "Iterator[Future[CompletedProcess[str]]]":
        """Launched from a machine that sees no process of any host, and sweeps none."""
        words = ("cluster=far", "failure.backoff.initial=100ms", *more)
        with ThreadPoolExecutor(1) as pool:
            yield pool.submit(self.far.run, self.job, *(word for each in words for word in ("--set", each)))

    @property
    def saved(self) -> int:
        """Step of the newest whole checkpoint; 0 before there is one."""
        found = (self.far.folder / "checkpoints").glob("step-*")
        return max((int(path.name.removeprefix("step-")) for path in found), default=0)

    def saves(self) -> int:
        """Waits for one more checkpoint; its step."""
        before = self.saved
        assert eventually(lambda: self.saved > before, 150), f"no checkpoint after step {before}"
        return self.saved

    def nodes(self) -> list[str]:
        """Names of those that the newest plan has."""
        return [node["name"] for node in self.told("plan.json")["nodes"]]

    def told(self, name: str) -> Any:
        """A file of the run directory."""
        return json.loads((self.run_dir / name).read_text())

    def excluded(self) -> list[str]:
        """Hosts that it went on without so far."""
        return (
            [each["node"] for each in self.told("excluded.json")] if (self.run_dir / "excluded.json").exists() else []
        )

    def losses(self) -> list[tuple[int, float]]:
        records = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        return [(each["step"], each["loss"]) for each in records if "loss" in each]


def resumed(output: str) -> list[int]:
    return [int(step) for step in re.findall(r"resumed from .* at step (\d+)", output)]


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


def test_lost_hosts_are_replaced_and_the_numbers_are_those_of_a_run_that_lost_none(
    lab: Hosts, source: dict[str, str], tmp_path: Path
) -> None:
    calm = Launch(tmp_path / "calm", {}, f"calm-{os.getpid()}")
    done = calm.run(write_training(calm.folder, steps=STEPS, every=EVERY))
    assert done.returncode == 0, done.stdout + done.stderr
    lost = Training(lab, source, tmp_path / "lost", hosts=5)
    blows: list[tuple[Callable[[Host], None], str]] = [(silence, "h2"), (Host.end, "h3"), (cut, "h1")]
    newest = []
    with lost.running("nodes=2", "failure.max_restarts=3") as launching:
        for count, (lose, victim) in enumerate(blows, start=1):
            newest.append(lost.saves())
            lose(lost.hosts[victim])
            began_s = time.monotonic()
            assert eventually(lambda: len(lost.excluded()) == count, 60), (victim, lost.excluded())  # noqa: B023
            left, taken_s = list(carriers(lost.far.run_id)), time.monotonic() - began_s
            assert left == [], "ranks that are only cut off have ended before others take their places"
            assert taken_s < 3.5 * LOST_AFTER_S, f"{taken_s:.1f} s from the loss of {victim} to the start without it"
        done = launching.result(timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lost.losses() == [tuple(each) for each in _losses_of(calm)]
    assert not list(carriers(lost.far.run_id))
    told = lost.told("exit.json")
    assert [(each["node"], each["attempt"]) for each in told["excluded"]] == [("h2", 0), ("h3", 1), ("h1", 2)]
    for (_, victim), restart, other in zip(blows, told["restarts"], ("h3", "h4", "h5"), strict=True):
        assert restart["cause"].startswith(f"host {victim}: ")
        assert f"{other} in place of {victim}" in done.stderr
    assert sorted(lost.nodes()) == ["h4", "h5"]
    steps = resumed(done.stdout)
    assert len(steps) == len(newest)
    assert all(step >= saved for step, saved in zip(steps, newest, strict=True)), (
        "nothing is lost but what was not saved"
    )


def _losses_of(launch: Launch) -> list[tuple[int, float]]:
    lines = (launch.folder / "runs" / launch.run_id / "metrics.jsonl").read_text().splitlines()
    found = [(each["step"], each["loss"]) for each in map(json.loads, lines) if "loss" in each]
    assert len(found) == STEPS
    return found


def test_an_elastic_run_goes_on_with_fewer_hosts_and_takes_one_back_that_is_there_again(
    lab: Hosts, source: dict[str, str], tmp_path: Path
) -> None:
    fewer = Training(lab, source, tmp_path / "fewer", hosts=2)
    sets = ("nodes={min: 1, max: 2}", "parallel.dp=2", "nproc_per_node=1", "failure.max_restarts=2")
    with fewer.running(*sets) as launching:
        fewer.saves()
        assert fewer.nodes() == ["h1", "h2"]
        lab.hosts[1].link("down")
        assert eventually(lambda: fewer.excluded() == ["h2"], 60)
        lab.hosts[1].link("up")
        fewer.saves()
        assert fewer.nodes() == ["h1"]
        kill_all(_ranks(fewer.far.run_id))
        done = launching.result(timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step for step, _ in fewer.losses()] == list(range(1, STEPS + 1))
    assert fewer.nodes() == ["h1", "h2"]
    told = fewer.told("exit.json")
    assert [(each["nodes"], each["excludes"]) for each in told["restarts"]] == [([2, 1], ["h2"]), ([1, 2], [])]
    assert "it shrinks from 2 nodes to 1, without h2 (one rank, num_microbatches=2)" in done.stderr
    assert "it grows from 1 node to 2, with h2 (dp=2, num_microbatches=1)" in done.stderr
    assert told["excluded"][0]["back_unix_s"] > told["excluded"][0]["time_unix_s"]
    assert not list(carriers(fewer.far.run_id))


def _ranks(run_id: str) -> list[int]:
    """Process ids of the first rank of a run."""
    found = [pid for pid in carriers(run_id) if b"\0RANK=0\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    assert found, run_id
    return found


def test_without_a_spare_host_the_run_ends_and_says_which_and_what_to_do(
    lab: Hosts, source: dict[str, str], tmp_path: Path
) -> None:
    keys = cluster(lab, source, lost_after=f"{LOST_AFTER_S}s")
    keys["hosts"] = keys["hosts"][:2]
    far = Launch(tmp_path, {"far": keys}, f"bare-{os.getpid()}")
    job = write_job(far.folder, SLEEP, cluster="far", nodes=2, failure={"max_restarts": 2})
    launcher, merged = far.start(job), far.run_dir / "merged.log"
    try:
        assert eventually(lambda: merged.exists() and merged.read_text().count("up") == 2, 150)
        lab.hosts[1].end()
        output, _ = launcher.communicate(timeout=240)
    finally:
        finish(launcher)
    assert launcher.returncode == 69, output
    reason = far.record()["reason"]
    assert reason.startswith("host h2: ")
    assert "not started again: h2 cannot be left out: the job wants 2 nodes, and 1 of the 2 hosts it names" in reason
    assert "put more into cluster.hosts" in reason
    assert not list(carriers(far.run_id))
