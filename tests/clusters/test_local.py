"""The local cluster's plan is a pure, printable value."""

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.base import Limits, Meeting, Program, Secret, StartRequest
from meshwright.clusters.errors import RendezvousError, UnavailableError
from meshwright.clusters.local import LocalCluster, Machine, check_port, plan_local, this_machine

REQUEST = StartRequest(
    name="tiny",
    run_id="r1",
    run_dir=Path("/runs/tiny/r1"),
    program=Program(
        argv=("python", "-c", "print('a b')\n"),
        workdir=Path("/work dir"),
        setup="source venv/bin/activate\nmake data",
        env=(("NCCL_DEBUG", "WARN"), ("NOTE", "two words")),
        inherit=("HOME", "PATH"),
        secrets=(Secret("TOKEN", "from_env MY_TOKEN", "hunter22"),),
    ),
    num_nodes=2,
    ranks_per_node=2,
    gpus_per_node=1,
    meeting=Meeting("first", port=29500),
    limits=Limits(max_restarts=3, shutdown_grace_s=120.0),
)
MACHINE = Machine(host="box", cores=8, gpus=("0", "1"))

GOLDEN = f"""\
run tiny/r1 on local: 4 ranks on 2 nodes
directory  /runs/tiny/r1
writes     job.yaml job.json plan.json merged.log exit.json
restarts   at most 3; TERM, then KILL after 120 s
           on node, signal, hang, preempt, exit; never on config, import_error; wait 1 s x 2 each, at most 300 s
store      port 29500 on the loopback interface
inherits   HOME PATH
secret     TOKEN=*** (from_env MY_TOKEN)
setup      once per node:
           | source venv/bin/activate
           | make data
node node0: ranks 0, 1
  cwd      /work dir
  env      CUDA_VISIBLE_DEVICES=0
  env      GLOO_SOCKET_IFNAME=lo
  env      NCCL_DEBUG=WARN
  env      'NOTE=two words'
  env      OMP_NUM_THREADS=2
  env      MESHWRIGHT_HOST=node0
  env      MESHWRIGHT_NODE=0
  env      MESHWRIGHT_RUN_DIR=/runs/tiny/r1
  env      MESHWRIGHT_RUN_ID=r1
  agent    {sys.executable} -u -m meshwright.clusters.agent
  argv     python -c 'print('"'"'a b'"'"')
'
  log      logs/rank-0.log
  log      logs/rank-1.log
node node1: ranks 2, 3
  cwd      /work dir
  env      CUDA_VISIBLE_DEVICES=1
  env      GLOO_SOCKET_IFNAME=lo
  env      NCCL_DEBUG=WARN
  env      'NOTE=two words'
  env      OMP_NUM_THREADS=2
  env      MESHWRIGHT_HOST=node1
  env      MESHWRIGHT_NODE=1
  env      MESHWRIGHT_RUN_DIR=/runs/tiny/r1
  env      MESHWRIGHT_RUN_ID=r1
  agent    {sys.executable} -u -m meshwright.clusters.agent
  argv     python -c 'print('"'"'a b'"'"')
'
  log      logs/rank-2.log
  log      logs/rank-3.log
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface has another name")
def test_a_limit_of_hanging_is_told_to_people_and_to_ranks() -> None:
    limits = Limits(hang_s=90.0, hang_action="dump_and_stop")
    text = str(plan_local(replace(REQUEST, limits=limits), MACHINE))
    assert "\nhang       after 90 s in which no rank moves: dump and stop\n" in text
    assert text.count("MESHWRIGHT_HANG_S=90.0") == text.count("MESHWRIGHT_HANG_ACTION=dump_and_stop") == 2


def test_the_plan_prints_all_that_is_started() -> None:
    assert str(plan_local(REQUEST, MACHINE)) == GOLDEN


def test_a_plan_has_no_room_for_a_secrets_value() -> None:
    plan = plan_local(REQUEST, MACHINE)
    assert "hunter22" not in f"{plan} {plan!r} {plan.as_dict()} {REQUEST!r}"
    other = replace(REQUEST.program, secrets=(Secret("TOKEN", "from_env MY_TOKEN", ""),))
    assert plan_local(replace(REQUEST, program=other), MACHINE) == plan


def test_one_node_has_the_machines_name_and_all_its_gpus() -> None:
    plan = plan_local(replace(REQUEST, num_nodes=1, gpus_per_node=None), MACHINE)
    assert plan.nodes[0].name == plan.host_of(1) == "box"
    assert "CUDA_VISIBLE_DEVICES" not in dict(plan.nodes[0].env)


def test_pretended_nodes_share_the_gpus_of_the_machine() -> None:
    machine = replace(MACHINE, gpus=("3", "5", "6", "7"))
    plan = plan_local(replace(REQUEST, gpus_per_node=None), machine)
    assert [dict(node.env)["CUDA_VISIBLE_DEVICES"] for node in plan.nodes] == ["3,5", "6,7"]


def test_more_gpus_than_there_are_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="asked for 2 x 2 GPUs, box has 2") as caught:
        plan_local(replace(REQUEST, gpus_per_node=2), MACHINE)
    assert caught.value.exit_code == 69


@pytest.mark.parametrize(("asked", "ranks"), [("gpu", 2), ("auto", 2), ("cpu", 8), (5, 5)])
def test_ranks_per_node_come_from_the_machine(asked: int | str, ranks: int) -> None:
    plan = plan_local(replace(REQUEST, num_nodes=1, gpus_per_node=None, ranks_per_node=asked), MACHINE)
    assert plan.world_size == ranks


def test_auto_without_gpus_is_the_cores_and_gpu_is_refused() -> None:
    bare = replace(MACHINE, gpus=())
    request = replace(REQUEST, num_nodes=1, gpus_per_node=None, ranks_per_node="auto")
    assert plan_local(request, bare).world_size == 8
    with pytest.raises(UnavailableError, match="box has no GPU"):
        plan_local(replace(request, ranks_per_node="gpu"), bare)


def test_the_jobs_own_threads_and_the_users_win() -> None:
    program = replace(REQUEST.program, env=(("OMP_NUM_THREADS", "5"),))
    assert dict(plan_local(replace(REQUEST, program=program), MACHINE).nodes[0].env)["OMP_NUM_THREADS"] == "5"
    inheriting = replace(REQUEST, program=replace(REQUEST.program, inherit=("*",)))
    plan = plan_local(inheriting, replace(MACHINE, omp_num_threads="3"))
    assert "OMP_NUM_THREADS" not in dict(plan.nodes[0].env)


def test_the_machine_has_the_gpus_that_are_visible() -> None:
    assert this_machine({"CUDA_VISIBLE_DEVICES": "2, 4"}).gpus == ("2", "4")
    assert this_machine({"CUDA_VISIBLE_DEVICES": ""}).gpus == ()


def test_a_port_that_is_taken_is_found_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RendezvousError, match=f"port {port}") as caught:
            check_port(port)
        with pytest.raises(RendezvousError):
            LocalCluster().check(plan_local(replace(REQUEST, meeting=Meeting(port=port)), MACHINE))
    assert caught.value.exit_code == 76
    check_port(port)


def test_pretended_nodes_keep_their_gpus_when_others_are_left_out() -> None:
    request, shown = replace(REQUEST, num_nodes=2, gpus_per_node=1), "CUDA_VISIBLE_DEVICES"
    for gpus, kept in ((("4", "5", "6"), ["4", "6"]), (("4", "5"), ["4", "5"])):  # too few: by their places
        plan = plan_local(request, Machine("box", 2, gpus), ["node0", "node2"])
        assert [dict(node.env)[shown] for node in plan.nodes] == kept
