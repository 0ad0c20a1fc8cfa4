"""From a file to a job that knows where its keys were written."""

import pickle
from pathlib import Path

import pytest

from meshwright.launch.errors import JobError
from meshwright.launch.load import LoadedJob, load_job

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
PROGRAM = "name: a\ncommand:\n  - b\n  - c\nfailure:\n  max_restarts: 1\n"


def load(folder: Path, text: str, clusters: str = "", clusters_file: Path | None = None) -> LoadedJob:
    (folder / "job.yaml").write_text(text)
    if clusters:
        (clusters_file or folder / "clusters.yaml").write_text(clusters)
    return load_job(folder / "job.yaml", clusters_file=clusters_file)


def refused(folder: Path, text: str, clusters: str = "", clusters_file: Path | None = None) -> str:
    with pytest.raises(JobError) as caught:
        load(folder, text, clusters, clusters_file)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    assert load_job(path).job.name


def test_the_quickstart_trains_on_two_ranks_of_this_machine() -> None:
    job = load_job(ROOT / "examples" / "quickstart.yaml").job
    assert job.model is not None
    assert job.mesh.dp == job.num_ranks == 2
    assert job.cluster.type == "local"


def test_a_loaded_job_says_where_its_keys_were_written(tmp_path: Path) -> None:
    loaded = load(tmp_path, PROGRAM)
    places = {key: loaded.where(key).rpartition("/")[2] for key in ("name", "command.1", "failure.max_restarts")}
    assert places == {"name": "job.yaml:1:1", "command.1": "job.yaml:4:5", "failure.max_restarts": "job.yaml:6:3"}


def test_a_key_that_was_not_written_lies_where_its_block_does(tmp_path: Path) -> None:
    loaded = load(tmp_path, PROGRAM)
    assert loaded.where("failure.hang.action").endswith("job.yaml:5:1")
    assert loaded.where("logs.merge").endswith("job.yaml:1:1")


def test_a_loaded_job_knows_what_the_user_wrote(tmp_path: Path) -> None:
    loaded = load(tmp_path, PROGRAM)
    assert loaded.keys == {"name", "command", "failure", "failure.max_restarts"}
    assert loaded.text == PROGRAM


def test_a_named_cluster_is_looked_up_beside_the_job(tmp_path: Path) -> None:
    clusters = "clusters:\n  box: {type: local, simulate_nodes: 2}\n  far: {type: ray}\n"
    loaded = load(tmp_path, PROGRAM + "cluster: box\n", clusters)
    assert loaded.job.cluster.simulate_nodes == 2
    assert loaded.where("cluster.simulate_nodes") == f"{tmp_path}/clusters.yaml:2:22"
    assert "cluster.simulate_nodes" not in loaded.keys, "the user wrote it in another file"


def test_clusters_can_lie_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    loaded = load(tmp_path, PROGRAM + "cluster: box\n", "clusters: {box: {simulate_nodes: 3}}\n", file)
    assert loaded.job.cluster.simulate_nodes == 3


def test_a_cluster_of_the_user_is_found_from_everywhere_and_one_beside_the_job_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    (tmp_path / "settings/meshwright").mkdir(parents=True)
    mine = tmp_path / "settings/meshwright/clusters.yaml"
    mine.write_text("clusters: {box: {simulate_nodes: 3}, other: {simulate_nodes: 4}}\n")
    assert load(tmp_path, PROGRAM + "cluster: box\n").job.num_nodes == 3
    (tmp_path / "clusters.yaml").write_text("clusters: {box: {simulate_nodes: 2}}\n")
    assert load(tmp_path, PROGRAM + "cluster: box\n").job.num_nodes == 2
    assert load(tmp_path, PROGRAM + "cluster: other\n").job.num_nodes == 4
    assert "in clusters.yaml or settings/meshwright/clusters.yaml; did you mean" in refused(
        tmp_path, PROGRAM + "cluster: bux\n"
    )


def test_local_needs_no_file_of_clusters(tmp_path: Path) -> None:
    assert load(tmp_path, PROGRAM + "cluster: local\n").job.cluster.type == "local"


@pytest.mark.parametrize(
    ("name", "clusters", "message"),
    [
        (
            "bux",
            "clusters: {box: {}}\n",
            "job.yaml:7:10: cluster: no cluster 'bux' in clusters.yaml; did you mean 'box'",
        ),
        (
            "box",
            "",
            "job.yaml:7:10: cluster: no cluster 'box': there is no clusters.yaml; choose from: local",
        ),
        (
            "box",
            "clusters: {box: {type: rya}}\n",
            "clusters.yaml:1:24: cluster.type: no cluster type 'rya'; did you mean",
        ),
        ("box", "clusters: {box: {type: slrum}}\n", "cluster.type: no cluster type 'slrum'; did you mean 'slurm'"),
        ("box", "clusters: {box: {type: slurm, hosts: [a]}}\n", "cluster.hosts: unknown key 'hosts'; choose from"),
        ("box", "clusters: {box: {type: ssh}}\n", "job.yaml:7:1: cluster.hosts: required key is missing; add `hosts:`"),
        (
            "box",
            "clusters: {box: {type: ssh, hosts: [{name: -oX}]}}\n",
            "cluster.hosts.0.name: expected a host's name of letters",
        ),
        ("box", "clusters: {box: {type: slurm, srun: {export: A}}}\n", "export follows from the job or has a key"),
        ("box", "clusters: {box: {simulate_node: 2}}\n", "clusters.yaml:1:18: cluster.simulate_node: unknown key"),
        ("box", "clusters: [box]\n", "clusters.yaml:1:11: clusters: expected a mapping of names, got a list"),
        ("box", "clusters: {box: {type: ssh, hosts: []}}\n", "cluster.hosts: expected at least one host, got a list"),
        ("box", "cluster: {box: {}}\n", "clusters.yaml:1:1: expected one key `clusters:`"),
        ("box", "clusters: {box: {}, box: {}}\n", "clusters.yaml:1:21: clusters.box: duplicate key"),
        ("box", "clusters: {box: 3}\n", "clusters.yaml:1:17: cluster: expected a mapping, got 3"),
    ],
)
def test_a_wrong_cluster_is_named_where_it_was_written(name: str, clusters: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, PROGRAM + f"cluster: {name}\n", clusters)


def test_a_missing_file_of_clusters_is_named(tmp_path: Path) -> None:
    text = refused(tmp_path, PROGRAM + "cluster: box\n", clusters_file=tmp_path / "no.yaml")
    assert text.startswith("no.yaml:1:1: this file of clusters does not exist")


def test_a_missing_job_names_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(PROGRAM)
    with pytest.raises(JobError, match=r"jop\.yaml:1:1: this job file does not exist; did you mean .*job\.yaml"):
        load_job(tmp_path / "jop.yaml")


def test_a_folder_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read: Is a directory"):
        load_job(tmp_path)


def test_job_errors_survive_a_process_border(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        load(tmp_path, "name: [")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.problems, str(again)) == (caught.value.problems, str(caught.value))
