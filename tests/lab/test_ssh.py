"""Two hosts reached by ssh: the same job, the same numbers; nothing stays, whatever ends; errors name the host."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.clusters.sweep import carriers
from tests.lab.hosts import Hosts
from tests.lab.launches import QUICKSTART, Launch, finish, losses, write_job
from tests.launch.aside import SLEEP, check_left_alone
from tests.launch.waiting import eventually


def cluster(lab: Hosts, source: dict[str, str], **keys: Any) -> dict[str, Any]:
    return {
        "type": "ssh",
        "hosts": [{"name": host.name, "addr": host.address} for host in lab.hosts],
        "user": "root",
        "identity_file": str(lab.key),
        "known_hosts": str(lab.known_hosts),
        "config": str(lab.folder / "ssh_config"),
        "lost_after": "6s",
        "connect_timeout": "5s",
        "env": source,
        **keys,
    }


@pytest.fixture
def launch(
    hosts: Hosts, source: dict[str, str], lab_folder: Path, request: pytest.FixtureRequest
) -> Callable[..., Launch]:
    """Makes a launch with the cluster `far`; its keys and variables are the test's."""
    name = re.sub(r"[^a-z]+", "-", request.node.name.lower())[5:60]

    def make(env: dict[str, str] | None = None, **keys: Any) -> Launch:
        run_id = f"{name.strip('-')}-{os.getpid()}-{len(list(lab_folder.iterdir()))}"
        return Launch(lab_folder / run_id, {"far": cluster(hosts, source, **keys)}, run_id, env)

    return make


def test_the_quickstart_trains_over_ssh_as_it_does_here(launch: Callable[..., Launch], here: list[Any]) -> None:
    far = launch()
    done = far.run(*QUICKSTART, "--set", "cluster=far", timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(far.folder / "runs/quickstart" / far.run_id) == here


def everywhere(hosts: Hosts) -> set[str]:
    """Ports that are listened at on every interface of a host."""
    return {each for host in hosts.hosts for each in host.listening() if each.startswith(("0.0.0.0", "[::]"))}


def test_ranks_go_where_slots_are_and_listen_on_one_interface(launch: Callable[..., Launch], hosts: Hosts) -> None:
    far = launch(hosts=[{"name": "h1", "slots": 2}, {"name": "h2", "slots": 1}])
    script = (
        "import os, socket, time\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        "print(os.environ['RANK'], socket.gethostname(), os.environ['LOCAL_WORLD_SIZE'], os.environ['MASTER_ADDR'])\n"
        "open(f\"seen-{os.environ['RANK']}\", 'w').close()\n"
        "while not os.path.exists('looked'): time.sleep(0.1)\n"
        "dist.destroy_process_group()\n"
    )
    before = everywhere(hosts)
    launcher = far.start(write_job(far.folder, script, cluster="far", parallel={"dp": 3}))
    try:
        assert eventually(lambda: len(list(far.folder.glob("seen-*"))) == 3, 150), launcher.stdout
        wild = everywhere(hosts) - before
        (far.folder / "looked").touch()
        output, _ = launcher.communicate(timeout=240)
    finally:
        finish(launcher)
    assert launcher.returncode == 0, output
    first = hosts.hosts[0].address
    assert {line for line in output.splitlines() if " | " in line and "[c10d]" not in line} == {
        f"h1:0 | 0 h1 2 {first}",
        f"h1:1 | 1 h1 2 {first}",
        f"h2:2 | 2 h2 1 {first}",
    }
    assert wild == set(), "only what was there before listens on every interface"


def test_words_and_secrets_arrive_as_they_are_and_secrets_stay_out_of_sight(launch: Callable[..., Launch]) -> None:
    secret = "s3cr3t-$(touch x)-'\"-value"
    far = launch(env={"MY_TOKEN": secret, "NCCL_NOTE": "a b,c"})
    odd = ["$HOME", "a b", "'\"", "`id`", ";", "\\", "ü", "", "-x", "*", "a\nb"]
    script = (
        "import os, sys, time\n"
        "print(ascii(sys.argv[1:]), os.environ['TOKEN'], os.environ['NCCL_NOTE'], flush=True)\n"
        "open('told', 'w').close()\n"
        "while not os.path.exists('looked'): time.sleep(0.1)\n"
    )
    job = write_job(
        far.folder,
        script,
        cluster="far",
        env_pass=["NCCL_*", "PYTHONPATH"],
        secrets={"TOKEN": {"from_env": "MY_TOKEN"}},
    )
    made = yaml.safe_load(job.read_text())
    made["command"] += odd
    job.write_text(yaml.safe_dump(made, allow_unicode=True))
    launcher = far.start(job)
    try:
        assert eventually((far.folder / "told").exists, 150)
        seen = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        (far.folder / "looked").touch()
        output, _ = launcher.communicate(timeout=240)
    finally:
        finish(launcher)
    assert launcher.returncode == 0, output
    assert output.count(f"{odd!a} *** a b,c") == 2
    assert not [each for each in seen if secret.encode() in each]
    written = [path for path in far.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert written == []


@pytest.mark.parametrize("known", ["another", "none"])
def test_a_host_key_that_is_not_known_is_refused_with_advice(
    launch: Callable[..., Launch], hosts: Hosts, known: str
) -> None:
    own = hosts.folder / f"known-{known}"
    lines = hosts.known_hosts.read_text().splitlines()
    if known == "another":
        swapped = [lines[0], " ".join([lines[1].split()[0], *lines[0].split()[1:]])]
        own.write_text("\n".join(swapped) + "\n")
    else:
        own.write_text(lines[0] + "\n")
    far = launch(known_hosts=str(own))
    done = far.run(write_job(far.folder, SLEEP, cluster="far"))
    assert done.returncode == 77, done.stderr
    assert "host h2: its host key is not the one that is known, or none is known: compare" in done.stderr
    assert far.record()["state"] == "failed"
    assert not list(carriers(far.run_id))


def test_a_host_that_refuses_is_named_and_the_others_are_ended(launch: Callable[..., Launch], hosts: Hosts) -> None:
    far = launch(hosts=[{"name": "h1"}, {"name": "h9", "addr": f"{hosts.net}.9"}])
    done = far.run(write_job(far.folder, SLEEP, cluster="far"))
    assert done.returncode == 69, done.stderr
    assert "host h9: it cannot be reached" in done.stderr
    assert not list(carriers(far.run_id))


def test_a_run_over_ssh_is_left_alone_and_found_again(launch: Callable[..., Launch]) -> None:
    far = launch()
    job = write_job(far.folder, SLEEP, cluster="far", failure={"shutdown_grace": "2s"})
    check_left_alone(far.run_dir, far.env, str(job), ranks=2)


def test_a_connection_that_is_cut_ends_the_ranks_on_both_sides(launch: Callable[..., Launch], hosts: Hosts) -> None:
    far, last = launch(), hosts.hosts[1]
    launcher = far.start(write_job(far.folder, SLEEP, cluster="far", failure={"shutdown_grace": "1s"}))
    merged = far.run_dir / "merged.log"
    try:
        assert eventually(lambda: merged.exists() and merged.read_text().count("up") == 2, 150)
        last.link("down")
        began_s = time.monotonic()
        assert eventually(lambda: not list(carriers(far.run_id)), 20)
        gone_s = time.monotonic() - began_s
        output, _ = launcher.communicate(timeout=240)
    finally:
        last.link("up")
        finish(launcher)
    assert launcher.returncode == 69, output
    assert "host h2: " in output
    assert gone_s < 18, f"ranks lived {gone_s:.1f} s on after the cut; lost_after is 6 s"


def test_a_killed_launcher_leaves_nothing_on_any_host(launch: Callable[..., Launch]) -> None:
    far = launch()
    escape = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print('up', flush=True); time.sleep(600)\n"
    )
    launcher = far.start(write_job(far.folder, escape, cluster="far"))
    try:
        assert eventually(lambda: len(list(carriers(far.run_id))) == 4, 150), list(carriers(far.run_id))
        os.kill(launcher.pid, signal.SIGKILL)
        assert eventually(lambda: not list(carriers(far.run_id)), 15)
    finally:
        finish(launcher)


def test_a_failing_rank_keeps_its_code_and_host_and_tells_its_cause_where_no_directory_is_shared(
    launch: Callable[..., Launch], apart: Path
) -> None:
    far = launch()
    script = (
        "import os, sys, time, traceback\n"
        "rank = os.environ['RANK']\n"
        "print('line of', rank, flush=True)\n"
        "open(f'up-{rank}', 'w').close()\n"
        "while rank == '0' or not os.path.exists('up-0'): time.sleep(0.1)\n"
        "try: raise KeyError('the cause')\n"
        "except KeyError: traceback.print_exc()\n"
        "sys.exit(7)\n"
    )
    job = write_job(far.folder, script, cluster="far", logs={"dir": f"{apart}/{{run_id}}"})
    done = far.run(job)
    run_dir = apart / far.run_id
    assert done.returncode == 7, done.stderr
    assert "KeyError: 'the cause'" in done.stderr
    assert "rank 1 on h2 failed first" in done.stderr
    assert json.loads((run_dir / "exit.json").read_text())["victims"][0]["host"] == "h1"
    assert {"h1:0 | line of 0", "h2:1 | line of 1"} <= set((run_dir / "merged.log").read_text().splitlines())
    assert "h1, h2 do not share the run directory" in done.stderr
