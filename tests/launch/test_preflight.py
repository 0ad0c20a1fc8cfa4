"""Nodes that are not fit: nothing starts, or others take their places, or the run is warned; as the job says."""

from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.clusters.verdicts import Diagnosis, Verdict
from meshwright.launch.cli import main
from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.preflight import PreflightError, on_fit_nodes
from tests.lab.nvml import with_gpus

HOSTS = """
nodes: 2
nproc_per_node: 1
cluster: {type: ssh, hosts: [{name: a}, {name: b}, {name: c}, {name: d}]}
"""
Examine = Callable[[LoadedJob, Path], Diagnosis]


def job(folder: Path, health: str, more: str = HOSTS) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(f"name: j\ncommand: [python, -c, pass]\nhealth: {health}\n{more}")
    return load_job(path)


def verdict(check: str, node: str | None, *, bad: bool) -> Verdict:
    return Verdict(check, node, "bad", "none left", "make room") if bad else Verdict(check, node, "ok", "80 GB")


def sick_are(*names: str, whole: bool = False) -> tuple[list[list[str]], Examine]:
    """Examines the hosts that a job would take; the whole may be sick though no host is."""
    seen: list[list[str]] = []

    def examine(loaded: LoadedJob, base: Path) -> Diagnosis:
        del base
        hosts = [host.name for host in loaded.job.cluster.hosts[: loaded.job.num_nodes]]  # type: ignore[union-attr]
        seen.append(hosts)
        verdicts = [verdict("disk", name, bad=name in names) for name in hosts]
        return Diagnosis(tuple(hosts), (*verdicts, *([verdict("allreduce", None, bad=True)] if whole else [])))

    return seen, examine


def names_of(loaded: LoadedJob) -> list[str]:
    return [host.name for host in loaded.job.cluster.hosts]  # type: ignore[union-attr]


def test_a_job_without_checks_is_not_examined(tmp_path: Path) -> None:
    seen, examine = sick_are("a")
    loaded = job(tmp_path, "{}")
    assert on_fit_nodes(loaded, tmp_path, examine=examine) is loaded
    assert seen == []


def test_fit_nodes_are_named_and_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, examine = sick_are("c")
    loaded = job(tmp_path, "{preflight: [disk, clock]}")
    assert on_fit_nodes(loaded, tmp_path, examine=examine) is loaded
    assert capsys.readouterr().err == "meshwright: disk, clock checked; fit: 2 nodes\n"


def test_a_sick_node_stops_the_job_unless_it_is_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, examine = sick_are("b")
    with pytest.raises(PreflightError, match=r"b not fit.*Nothing was started") as raised:
        on_fit_nodes(job(tmp_path, "{preflight: [disk]}"), tmp_path, examine=examine)
    assert raised.value.exit_code == 78
    assert "disk   b     bad      none left" in capsys.readouterr().err
    warned = job(tmp_path, "{preflight: [disk], on_fail: warn}")
    assert on_fit_nodes(warned, tmp_path, examine=examine) is warned
    assert "starts all the same" in capsys.readouterr().err


def test_other_hosts_take_the_places_of_sick_ones_and_are_examined_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, examine = sick_are("a", "c")
    found = on_fit_nodes(job(tmp_path, "{preflight: [disk], on_fail: exclude_node}"), tmp_path, examine=examine)
    assert seen == [["a", "b"], ["b", "c"], ["b", "d"]]
    assert names_of(found) == ["b", "d"]
    assert capsys.readouterr().err.endswith("meshwright: disk checked; fit: 2 nodes; left out: a, c\n")


def test_a_node_that_is_examined_again_though_it_was_left_out_ends_the_job(tmp_path: Path) -> None:
    seen = []

    def examine(loaded: LoadedJob, base: Path) -> Diagnosis:
        seen.append(base)
        assert len(seen) < 9, "for ever"
        return Diagnosis(("a", "b"), (verdict("disk", "a", bad=True),))

    hosts = tmp_path / "hosts"
    hosts.write_text("a\nb\nc\n" + "".join(f"d{each}\n" for each in range(20)))
    loaded = job(
        tmp_path,
        "{preflight: [disk], on_fail: exclude_node}",
        f"nodes: 2\nnproc_per_node: 1\ncluster: {{type: mpi, hostfile: {hosts}}}\n",
    )
    with pytest.raises(PreflightError, match="a not fit, and still among the nodes though left out"):
        on_fit_nodes(loaded, tmp_path, examine=examine)
    assert len(seen) == 2


def test_what_cannot_be_left_out_stops_the_job(tmp_path: Path) -> None:
    exclude = "{preflight: [disk], on_fail: exclude_node}"
    with pytest.raises(PreflightError, match="c cannot be left out: the job wants 2 nodes, and 1 of the 2 hosts"):
        on_fit_nodes(job(tmp_path, exclude), tmp_path, examine=sick_are("a", "b", "c")[1])
    with pytest.raises(PreflightError, match="Nothing was started"):
        on_fit_nodes(job(tmp_path, exclude), tmp_path, examine=sick_are(whole=True)[1])
    slots = HOSTS.replace("}", ", slots: 2}", 2).replace("{name: c}, {name: d}", "{name: c, slots: 1}")
    uneven = job(tmp_path, exclude, slots.replace("nproc_per_node: 1", "parallel: {dp: 4}"))
    with pytest.raises(PreflightError, match=r"b cannot be left out: .*3 slots"):
        on_fit_nodes(uneven, tmp_path, examine=sick_are("b")[1])


def test_a_launch_on_a_machine_that_lacks_gpus_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in with_gpus("gpus=2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    job(tmp_path, "{preflight: [gpu]}", "cluster: {gpus_per_node: 4}\n")
    assert main(["launch", "job.yaml"]) == 78
    assert "2 GPUs, the job wants 4" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    capsys.readouterr()
    main(["launch", "job.yaml", "--dry-run"])
    assert "the job wants" not in capsys.readouterr().err


def test_on_kubernetes_a_run_is_kept_from_sick_nodes_and_drawn_to_fit_ones(tmp_path: Path) -> None:
    seen: list[tuple[str, ...]] = []
    rounds = [("gpu1/aaaaa", "gpu1/bbbbb", "gpu2", "gpu3"), ("gpu2", "gpu3", "gpu4", "gpu5/ccccc")]

    def examine(loaded: LoadedJob, base: Path) -> Diagnosis:
        del base
        names = rounds[len(seen)]
        seen.append(loaded.job.cluster.exclude)  # type: ignore[union-attr]
        sick = ("gpu1/bbbbb", "gpu3") if len(seen) == 1 else ("gpu4",) if health.endswith("warn}") else ()
        return Diagnosis(names, tuple(verdict("disk", name, bad=name in sick) for name in names))

    health = "{preflight: [disk], on_fail: exclude_node}"
    pods = "nodes: 4\ncluster: {type: kubernetes, image: i, prefer: [mine]}\n"
    cluster = on_fit_nodes(job(tmp_path, health, pods), tmp_path, examine=examine).job.cluster
    assert seen == [(), ("gpu1", "gpu3")]
    assert (cluster.exclude, cluster.prefer) == (  # type: ignore[union-attr]
        ("gpu1", "gpu3"),
        ("mine", "gpu2", "gpu3", "gpu4", "gpu5"),
    )
    seen.clear()
    health = "{preflight: [disk], on_fail: warn}"
    cluster = on_fit_nodes(job(tmp_path, health, pods), tmp_path, examine=examine).job.cluster
    assert (cluster.exclude, cluster.prefer) == ((), ("mine", "gpu2"))  # type: ignore[union-attr]
