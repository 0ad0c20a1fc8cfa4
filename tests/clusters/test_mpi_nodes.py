"""Nodes of MPI by the words of both implementations; names from the host file, or from mpiexec itself."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters import mpi_nodes as module
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.mpi import MpiOptions
from meshwright.clusters.mpi_nodes import back_of, names_of, probe_words

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


def test_the_first_hosts_of_the_file_that_may_be_used_are_the_nodes() -> None:
    options = MpiOptions("openmpi", hostfile="hosts", hosts=("h1", "h2", "h4"))
    assert names_of(options, 2, os.environ) == ["h1", "h2"]
    assert names_of(replace(options, hosts=("h2", "h4")), 2, os.environ) == ["h2", "h4"], "as a run that leaves h1 out"
    with pytest.raises(UnavailableError, match=r"cluster.hostfile: hosts has 3 hosts that may be used, .* wants 4"):
        names_of(options, 4, os.environ)


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_without_known_hosts_mpiexec_says_where_its_processes_are(tmp_path: Path, kind: str) -> None:
    words = tmp_path / "words"
    pretended = tmp_path / "mpiexec"
    pretended.write_text(
        f"#!/bin/sh\nprintf '%s ' \"$@\" > {words}\necho a banner\nfor n in g1 g2; do echo meshwright-node $n; done\n"
    )
    pretended.chmod(0o755)
    options = MpiOptions(kind, mpiexec=str(pretended), python=sys.executable)
    assert names_of(options, 2, os.environ) == ["g1", "g2"]
    assert words.read_text().startswith({"openmpi": "-n 2 --map-by ppr:1:node ", "mpich": "-n 2 -ppn 1 "}[kind])
    names_of(replace(options, hostfile="+n"), 2, os.environ)
    assert words.read_text().startswith({"openmpi": "-n 2 --hostfile +n ", "mpich": "-n 2 -f +n "}[kind])
    with pytest.raises(UnavailableError, match=r"gives 2 nodes, the job wants 3; write cluster\.hostfile"):
        names_of(options, 3, os.environ)


@pytest.mark.parametrize(("kind", "flag"), [("openmpi", "--host"), ("mpich", "-hosts")])
def test_a_host_is_back_where_an_mpiexec_of_its_own_runs_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, flag: str
) -> None:
    monkeypatch.setattr(module, "_ANSWER_S", 1.0)
    pretended = tmp_path / "mpiexec"
    answers = f"*'{flag} h2 '*) exit 1;; *'{flag} h3 '*) exec sleep 60;; *'{flag} h1 '*' -c pass') exit 0;; *) exit 2;;"
    pretended.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    pretended.chmod(0o755)
    options = MpiOptions(kind, mpiexec=str(pretended), python=sys.executable)
    assert back_of(options, ("h1", "h2", "h3", "h4")) == ("h1",)
    assert back_of(options, ()) == ()
