"""MPI: the plan, and where processes sit."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.base import Limits, Program, StartRequest
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.mpi import MpiHandle, MpiOptions, implementation_of, plan_mpi
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
    with pytest.raises(UnavailableError, match="max_restarts"):
        plan_mpi(replace(REQUEST, limits=Limits(max_restarts=1)), MpiOptions("mpich"))
    with pytest.raises(UnavailableError, match="nproc_per_node: gpu, but mpiexec is told how many"):
        plan_mpi(replace(REQUEST, ranks_per_node="gpu"), MpiOptions("mpich"))
    with pytest.raises(UnavailableError, match="no 'mpiexec-of-nobody' here"):
        implementation_of("mpiexec-of-nobody")


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


def test_an_mpiexec_that_ends_is_told_once_and_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    plan = plan_mpi(replace(REQUEST, run_dir=tmp_path), MpiOptions("mpich"))
    plan = replace(plan, nodes=(replace(plan.nodes[0], agent=("/bin/sh", "-c", "echo no event; exit 7")),))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        handle = MpiHandle(plan, {})
        handle.kill()
        (gone,) = handle.poll(0.0)
        assert (gone["event"], gone["code"]) == ("gone", 7)
        assert handle.done
        assert handle.poll(0.0) == []
    assert len(os.listdir("/proc/self/fd")) == before
