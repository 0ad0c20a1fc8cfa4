"""Nodes of MPI by the words of both implementations; names from the host file, or from mpiexec itself."""

import os
import sys
from pathlib import Path

import pytest

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.mpi import MpiOptions
from meshwright.clusters.mpi_nodes import names_of, probe_words

OPEN = MpiOptions("openmpi", hostfile="hosts", python="/opt/py", extra=("--mca", "plm_rsh_agent", "myssh"))
MPICH = MpiOptions("mpich", hostfile="hosts", python="/opt/py", extra=("-launcher-exec", "myssh"))


def test_one_mpiexec_starts_the_probe_of_one_node() -> None:
    assert " ".join(probe_words(OPEN, "h2")) == (
        "mpiexec -n 1 --hostfile hosts --mca plm_rsh_agent myssh --host h2 --bind-to none "
        "/opt/py -u -m meshwright.clusters.probe"
    )
    assert " ".join(probe_words(MPICH, "h2")) == (
        "mpiexec -n 1 -launcher-exec myssh -hosts h2 -bind-to none /opt/py -u -m meshwright.clusters.probe"
    )


def test_the_first_hosts_of_the_file_are_the_nodes(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("h1 slots=8\nh2:8\n\n# h3\nh4\n")
    options = MpiOptions("openmpi", hostfile=str(path))
    assert names_of(options, 2, os.environ) == ["h1", "h2"]
    with pytest.raises(UnavailableError, match=r"cluster.hostfile: .* has 3 hosts, the job wants 4"):
        names_of(options, 4, os.environ)
    path.unlink()
    with pytest.raises(UnavailableError, match=r"cluster.hostfile: .* cannot be read: No such file"):
        names_of(options, 1, os.environ)


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_without_a_file_mpiexec_says_where_its_processes_are(tmp_path: Path, kind: str) -> None:
    words = tmp_path / "words"
    pretended = tmp_path / "mpiexec"
    pretended.write_text(
        f"#!/bin/sh\nprintf '%s ' \"$@\" > {words}\necho a banner\nfor n in g1 g2; do echo meshwright-node $n; done\n"
    )
    pretended.chmod(0o755)
    options = MpiOptions(kind, mpiexec=str(pretended), python=sys.executable)
    assert names_of(options, 2, os.environ) == ["g1", "g2"]
    assert words.read_text().startswith({"openmpi": "-n 2 --map-by ppr:1:node ", "mpich": "-n 2 -ppn 1 "}[kind])
    with pytest.raises(UnavailableError, match=r"gives 2 nodes, the job wants 3; write cluster\.hostfile"):
        names_of(options, 3, os.environ)
