"""Manifests against what others publish: Kubernetes' own schemas, strictly, and the models of JobSet and TrainJob.

`clusters/catalog` holds what we write of these objects; here it is held against the whole.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from meshwright.clusters.kubernetes_schema import faults, schema_of
from tests.clusters.test_kubernetes import OPTIONS, REQUEST, _objects

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")

AGAIN = replace(REQUEST, limits=replace(REQUEST.limits, max_restarts=5))
SELECTING = replace(OPTIONS, node_selector={"gpu": "h100"}, resources={"memory": "8Gi"}, context="prod")
SELECTING = replace(SELECTING, exclude=("gpu1", "gpu-2.local"), prefer=("gpu3", "gpu4"))
BARE = replace(OPTIONS, claim=None, kind="TrainJob")


def refused(told: Mapping[str, Any]) -> bool:
    """Whether Kubernetes of this version would refuse an object of its own."""
    try:
        kubernetes_validate.validate(dict(told), "1.37", strict=True)
    except kubernetes_validate.ValidationError:
        return True
    return False


def job_of(jobset: Mapping[str, Any]) -> dict[str, Any]:
    """The Job that the operator of JobSet makes of the template."""
    name = {"name": jobset["metadata"]["name"] + "-node-0", "namespace": jobset["metadata"]["namespace"]}
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": name, "spec": spec}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in an object, from the root on."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from places(each, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def lost(ours: Any, theirs: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of ours that a model dropped or changed; defaults that it adds are no fault."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [each for key in ours for each in lost(ours[key], theirs.get(key, lost), (*path, key))]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [each for index, pair in pairs for each in lost(*pair, (*path, index))]
    return [] if ours == theirs else [path]


@pytest.mark.parametrize("options", [OPTIONS, SELECTING, BARE])
def test_the_config_map_passes_the_schema_of_kubernetes_strictly(options: Any) -> None:
    config, _ = _objects(options)
    assert not refused(config)
    assert refused({**config, "dta": {}})
    assert refused({**config, "data": {"plan": 1}})


@pytest.mark.parametrize("options", [OPTIONS, SELECTING, replace(OPTIONS, secret="tokens", claim=None)])
def test_a_jobset_passes_its_published_model_and_its_job_the_schema_of_kubernetes(options: Any) -> None:
    elastic = replace(AGAIN, limits=replace(AGAIN.limits, fewest_nodes=1))
    for request in (REQUEST, AGAIN, elastic):
        _, jobset = _objects(options, request)
        assert lost(jobset, models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict()) == []
        assert not refused(job_of(jobset))


def test_each_node_is_meant_by_a_requirement_of_its_own() -> None:
    """A requirement of a field takes one value; more would be refused, which schemas do not say."""
    _, jobset = _objects(SELECTING)
    spec = job_of(jobset)["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = spec["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [(each["key"], each["operator"], each["values"]) for each in term["matchFields"]] == [
        ("metadata.name", "NotIn", ["gpu1"]),
        ("metadata.name", "NotIn", ["gpu-2.local"]),
    ]
    drawn = spec["preferredDuringSchedulingIgnoredDuringExecution"]
    assert [(each["weight"], each["preference"]["matchFields"][0]["values"]) for each in drawn] == [
        (100, ["gpu3"]),
        (100, ["gpu4"]),
    ]


def test_a_trainjob_passes_its_published_model() -> None:
    _, trainjob = _objects(BARE)
    assert lost(trainjob, models.TrainerV1alpha1TrainJob.from_dict(trainjob).to_dict()) == []


def test_a_key_that_a_published_model_does_not_know_would_be_seen() -> None:
    _, jobset = _objects()
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicyy"] = {}  # type: ignore[index]
    found = lost(jobset, models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict())
    assert found == [("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicyy")]


@pytest.mark.slow
def test_whatever_the_schema_of_kubernetes_refuses_of_a_pod_ours_refuses_too() -> None:
    _, jobset = _objects(SELECTING, AGAIN)
    root = ("spec", "replicatedJobs", 0, "template", "spec")
    wrong = 0
    for path in places(at(jobset, root)):
        for broken in ("a word", {"an-unknown": "key"}):
            damaged = copy.deepcopy(jobset)
            if not path:
                at(damaged, root)["unknown"] = broken
            elif isinstance(at(damaged, (*root, *path)), dict) and isinstance(broken, str):
                at(damaged, (*root, *path))["unknown-key"] = broken
            else:
                at(damaged, (*root, *path[:-1]))[path[-1]] = broken
            if refused(job_of(damaged)):
                wrong += 1
                assert list(faults(damaged, schema_of("JobSet"))), (path, broken)
    assert wrong > 50, "or next to nothing was tried"
