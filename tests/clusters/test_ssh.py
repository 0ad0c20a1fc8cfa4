"""The plan over ssh is a pure, printable value; its words survive the way through ssh's shell."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.clusters.base import Meeting, Program, Secret, StartRequest
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.lost import explain_end
from meshwright.clusters.ssh import (
    SshCluster,
    SshHost,
    SshOptions,
    deal_ranks,
    plan_ssh,
    ssh_words,
)

REQUEST = StartRequest(
    name="tiny",
    run_id="r1",
    run_dir=Path("/runs/tiny/r1"),
    program=Program(
        argv=(sys.executable, "-c", "print('a b')"),
        workdir=Path("/work dir"),
        env=(("NOTE", "two words"),),
        inherit=("*",),
        secrets=(Secret("TOKEN", "from_env MY_TOKEN", "hunter22"),),
    ),
    num_nodes=2,
    ranks_per_node=None,
    num_ranks=3,
    meeting=Meeting("first", port=29500),
)
HOSTS = (
    SshHost("gpu01", "10.0.0.1", slots=2, gpus=2, python="/opt/py", env={"NCCL_IB_HCA": "mlx5 1"}),
    SshHost("gpu02", "gpu02", slots=1, gpus=0, python="/opt/py"),
)
OPTIONS = SshOptions(user="train", port=2222, identity_file="/keys/id", known_hosts="/keys/known", jump="login")
WORDS = (
    "ssh -T -x -l train -p 2222 -i /keys/id -J login -o BatchMode=yes -o StrictHostKeyChecking=yes "
    "-o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ControlPath=none "
    "-o ClearAllForwardings=yes -o ForwardAgent=no -o LogLevel=ERROR -o UserKnownHostsFile=/keys/known "
    "-o IdentitiesOnly=yes --"
)

GOLDEN = f"""\
run tiny/r1 on ssh: 3 ranks on 2 nodes
directory  /runs/tiny/r1
writes     job.yaml job.json plan.json merged.log exit.json
restarts   at most 0; TERM, then KILL after 30 s
store      port 29500 on 10.0.0.1, the interface with that address
inherits   *
secret     TOKEN=*** (from_env MY_TOKEN)
node gpu01: ranks 0, 1
  cwd      /work dir
  env      CUDA_VISIBLE_DEVICES=0,1
  env      'NCCL_IB_HCA=mlx5 1'
  env      'NOTE=two words'
  env      MESHWRIGHT_HOST=gpu01
  env      MESHWRIGHT_NODE=0
  env      MESHWRIGHT_RUN_DIR=/runs/tiny/r1
  env      MESHWRIGHT_RUN_ID=r1
  agent    {WORDS} gpu01 'exec env '"'"'NCCL_IB_HCA=mlx5 1'"'"' /opt/py -u -m meshwright.clusters.agent'
  argv     /opt/py -c 'print('"'"'a b'"'"')'
  log      logs/rank-0.log
  log      logs/rank-1.log
node gpu02: ranks 2
  cwd      /work dir
  env      CUDA_VISIBLE_DEVICES=
  env      'NOTE=two words'
  env      MESHWRIGHT_HOST=gpu02
  env      MESHWRIGHT_NODE=1
  env      MESHWRIGHT_RUN_DIR=/runs/tiny/r1
  env      MESHWRIGHT_RUN_ID=r1
  agent    {WORDS} gpu02 'exec /opt/py -u -m meshwright.clusters.agent'
  argv     /opt/py -c 'print('"'"'a b'"'"')'
  log      logs/rank-2.log
"""


def test_the_plan_prints_all_that_is_started() -> None:
    assert str(plan_ssh(REQUEST, HOSTS, OPTIONS)) == GOLDEN


def test_a_plan_has_no_room_for_a_secrets_value() -> None:
    plan = plan_ssh(REQUEST, HOSTS, OPTIONS)
    assert "hunter22" not in f"{plan} {plan!r} {plan.as_dict()}"


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30), max_size=4))
def test_any_words_survive_the_login_shell(argv: list[str]) -> None:
    show = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdout.write(ascii(sys.argv[1:]))"]
    *_, marker, host, command = ssh_words(SshOptions(), "h", [*show, *argv])
    assert (marker, host) == ("--", "h")
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == ascii(argv)


def test_new_host_keys_are_taken_only_when_asked() -> None:
    assert "StrictHostKeyChecking=yes" in ssh_words(SshOptions(), "h", ["x"])
    assert "StrictHostKeyChecking=accept-new" in ssh_words(SshOptions(host_keys="accept-new"), "h", ["x"])
    assert not [word for word in ssh_words(SshOptions(), "h", ["x"]) if word.endswith("=no") and "Strict" in word]


@pytest.mark.parametrize(
    ("slots", "ranks", "each", "dealt"),
    [
        ((2, 1), 3, None, [2, 1]),
        ((4, 4), 3, None, [3]),
        ((None, None), 4, None, [2, 2]),
        ((None, None), 4, 1, [1, 1]),
    ],
)
def test_ranks_are_dealt_by_slots(
    slots: tuple[int | None, ...], ranks: int, each: int | None, dealt: list[int]
) -> None:
    hosts = [SshHost(f"h{index}", "a", slots=number) for index, number in enumerate(slots)]
    found = deal_ranks(replace(REQUEST, num_ranks=ranks, ranks_per_node=each), hosts)
    assert [len(ranks) for _, ranks in found] == dealt
    assert [rank for _, ranks in found for rank in ranks] == list(range(sum(dealt)))


def test_ranks_that_no_host_takes_are_an_error() -> None:
    with pytest.raises(UnavailableError, match="2 ranks are left over when gpu01, gpu02 are full"):
        deal_ranks(replace(REQUEST, num_ranks=5), HOSTS)


def test_a_key_that_is_not_there_is_found_before_anything_connects() -> None:
    with pytest.raises(UnavailableError, match="identity_file: /keys/id does not exist"):
        SshCluster(HOSTS, OPTIONS, {}).check(plan_ssh(REQUEST, HOSTS, OPTIONS))


@pytest.mark.parametrize(
    ("code", "log", "exit_code", "words"),
    [
        (255, "Host key verification failed.\n", 77, "ssh-keyscan h1"),
        (255, "No ED25519 host key is known for h1 and you have requested strict checking.\n", 77, "known_hosts"),
        (255, "root@h1: Permission denied (publickey).\n", 77, "refuses this user and key"),
        (255, "ssh: Could not resolve hostname h1: Name or service not known\n", 69, "cannot be reached"),
        (1, "/opt/py: No module named meshwright\n", 69, "its Python has no meshwright"),
        (127, "bash: exec: /opt/py: not found\n", 69, "the agent could not be started (ssh says: bash: exec"),
        (255, "", 69, "the connection was lost, or the agent was killed; its ranks were ended"),
        (3, "", 69, "the agent ended with code 3"),
    ],
)
def test_the_end_of_a_connection_is_explained(code: int, log: str, exit_code: int, words: str) -> None:
    found = explain_end("h1", code, log)
    assert found["exit_code"] == exit_code
    assert found["message"].startswith("host h1: ")
    assert words in found["message"]


def test_words_are_quoted_once() -> None:
    assert shlex.split(ssh_words(SshOptions(), "h", ["a b", "c"])[-1]) == ["exec", "a b", "c"]
