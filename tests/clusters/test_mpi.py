"""MPI: the plan, and where processes sit."""

from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.base import Program, StartRequest
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.mpi import MpiCluster, MpiOptions, implementation_of, plan_mpi
from meshwright.clusters.mpi_rank import own_environment
from meshwright.clusters.mpi_seat import Seat, seat_of

REQUEST = StartRequest(
    name="j",
    run_id="r",
    run_dir=Path("/runs/j/r"),
    program=Program(("./train", "a b", "$HOME"), Path("/work dir")),
    num_nodes=2,
    num_ranks=8,
    ranks_per_node=None,
)
PROGRAM = ("/opt/py", "-u", "-m", "mpi4py", "-m", "meshwright.clusters.mpi_rank")


def test_open_mpi_and_mpich_are_called_exactly_so() -> None:
    openmpi = plan_mpi(
        REQUEST, MpiOptions("openmpi", hostfile="/etc/hosts.mpi", python="/opt/py", extra=("--tag-output",))
    )
    assert openmpi.nodes[0].agent == (
        *(
            "mpiexec",
            "-n",
            "8",
            "--hostfile",
            "/etc/hosts.mpi",
            "--map-by",
            "ppr:4:node:OVERSUBSCRIBE",
            "--bind-to",
            "none",
        ),
        *("-x", "MPI4PY_MPIABI=openmpi", "--tag-output", *PROGRAM),
    )
    mpich = plan_mpi(REQUEST, MpiOptions("mpich", "/opt/mpiexec", hostfile="hosts", python="/opt/py"))
    assert mpich.nodes[0].agent == (
        *("/opt/mpiexec", "-n", "8", "-f", "hosts", "-ppn", "4", "-bind-to", "none"),
        *("-genv", "MPI4PY_MPIABI", "mpich", *PROGRAM),
    )
    assert [node.ranks for node in mpich.nodes] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert mpich.nodes[1].argv == ("./train", "a b", "$HOME")


def test_what_mpi_cannot_do_is_refused() -> None:
    with pytest.raises(UnavailableError, match="nproc_per_node: gpu, but mpiexec is told how many"):
        plan_mpi(replace(REQUEST, ranks_per_node="gpu"), MpiOptions("mpich"))
    with pytest.raises(UnavailableError, match="no 'mpiexec-of-nobody' here"):
        implementation_of("mpiexec-of-nobody")


def test_nodes_are_called_by_their_hosts_and_only_those_that_are_used_are_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("a slots=4\nb slots=4\nc slots=4\n")
    (tmp_path / "private").mkdir()
    (tmp_path / "logs").mkdir()
    options = MpiOptions("openmpi", "true", str(file), ("a", "c"))
    plan = plan_mpi(replace(REQUEST, run_dir=tmp_path), options)
    assert [(node.name, node.ranks) for node in plan.nodes] == [("a", (0, 1, 2, 3)), ("c", (4, 5, 6, 7))]
    assert dict(plan.nodes[1].env)["MESHWRIGHT_HOST"] == "c"
    assert plan.nodes[0].agent[3:5] == ("--hostfile", str(tmp_path / "private/hosts"))
    handle = MpiCluster(options).start(plan, {})
    handle.kill()
    assert (tmp_path / "private/hosts").read_text() == "a slots=4\nc slots=4\n"
    with pytest.raises(UnavailableError, match=r"cluster.exclude: 2 nodes are wanted, and without b .* has a;"):
        plan_mpi(REQUEST, MpiOptions("mpich", "true", str(file), ("a",), exclude=("b",)))
    few = plan_mpi(REQUEST, MpiOptions("mpich", "true", str(file), ("a",)))
    assert few.nodes[0].agent[3:5] == ("-f", str(file)), "mpiexec itself says that they are too few"
    assert few.nodes[1].name == "node1"


def test_nodes_follow_the_order_of_the_plan_where_each_knows_its_host() -> None:
    leaders = [0, 0, 2, 2]
    assert seat_of(2, 1, leaders, places=[1, None, 0, None]) == Seat(0, 1, 2, 1, (2, 2))
    assert seat_of(2, 1, leaders, places=[1, None, None, None]) == Seat(1, 1, 2, 3, (2, 2))
    assert seat_of(2, 1, leaders, places=[1, None, 1, None]) == Seat(1, 1, 2, 3, (2, 2)), "two nodes are not one host"


def test_a_new_attempt_is_told_to_its_ranks() -> None:
    told = Seat(0, 0, 1, 0, (1,)).as_torchrun("a", 1, run_id="r", attempt=2, most=5)
    assert (told["TORCHELASTIC_RESTART_COUNT"], told["TORCHELASTIC_MAX_RESTARTS"]) == ("2", "5")


def test_ranks_are_counted_node_by_node_however_mpi_dealt_them() -> None:
    leaders = [0, 1, 0, 1, 1]
    seats = [seat_of(leader, leaders[:index].count(leader), leaders) for index, leader in enumerate(leaders)]
    assert [seat.rank for seat in seats] == [0, 2, 1, 3, 4]
    assert seats[4] == Seat(node=1, local_rank=2, local_size=3, rank=4, sizes=(2, 3))


def test_ranks_are_not_tied_to_mpiexec_but_keep_what_the_job_says_itself() -> None:
    plan, node = {"inherit": ["*"]}, {"env": [("OMPI_MCA_btl", "self")]}
    around = {"PATH": "/bin", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0", "OMPI_MCA_btl": "tcp"}
    found = own_environment(plan, node, secrets={"PMI_KEY": "s"}, environment=around)
    assert found == {"PATH": "/bin", "OMPI_MCA_btl": "self", "PMI_KEY": "s"}
