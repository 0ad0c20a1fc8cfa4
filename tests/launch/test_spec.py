"""The job as a value: frozen, round trip, rules between keys, what follows from it."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from meshwright.launch.spec import Job
from meshwright.launch.spec.block import Block
from meshwright.parallel.mesh import Mesh

TRAINING: dict[str, Any] = {
    "name": "a",
    "model": {"architecture": "llama"},
    "data": {"files": "python-stdlib"},
    "train": {"steps": 3, "batch_size": 8},
}
PROGRAM: dict[str, Any] = {"name": "a", "command": ["b"]}


def broken(job: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Job.model_validate(job)
    return [key for each in caught.value.errors() for key, _ in each["ctx"]["problems"]]


def blocks(block: type[BaseModel] = Block) -> list[type[BaseModel]]:
    return [each for inner in block.__subclasses__() for each in (inner, *blocks(inner))]


def test_a_job_is_frozen() -> None:
    job = Job.model_validate(PROGRAM)
    with pytest.raises(ValidationError, match="frozen"):
        job.name = "b"


@pytest.mark.parametrize("job", [TRAINING, PROGRAM, {**PROGRAM, "failure": {"shutdown_grace": "1h30m"}}])
def test_a_job_survives_json(job: dict[str, Any]) -> None:
    made = Job.model_validate(job)
    assert Job.model_validate(json.loads(json.dumps(made.as_dict()))) == made


def test_secrets_leave_a_job_as_references_only() -> None:
    job = Job.model_validate({**PROGRAM, "secrets": {"TOKEN": {"from_env": "HOME"}}})
    assert job.as_dict()["secrets"] == {"TOKEN": {"from_env": "HOME", "from_file": None}}


def test_units_become_seconds_and_bytes() -> None:
    job = Job.model_validate({**TRAINING, "train": {**TRAINING["train"], "stop_after": "10m"}})
    assert job.train is not None
    assert job.train.stop_after == 600.0
    assert (
        Job.model_validate({**PROGRAM, "resources": {"memory_per_node": "2GiB"}}).resources.memory_per_node == 2 << 30
    )


def test_the_mesh_and_the_ranks_follow_from_the_axes() -> None:
    job = Job.model_validate({**TRAINING, "parallel": {"dp": 2, "fsdp": 2}, "cluster": {"simulate_nodes": 2}})
    assert job.mesh == Mesh(dp=2, fsdp=2)
    assert (job.num_nodes, job.num_ranks) == (2, 4)


def test_a_program_of_the_user_gets_nodes_times_ranks_per_node() -> None:
    job = Job.model_validate({**PROGRAM, "nodes": 2, "nproc_per_node": 3, "cluster": {"simulate_nodes": 2}})
    assert job.num_ranks == 6
    assert Job.model_validate(PROGRAM).num_ranks == 1
    assert Job.model_validate({**PROGRAM, "nproc_per_node": "gpu"}).num_ranks is None


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"command": ["b"]}, "model"),
        ({"data": None}, "model"),
        ({"train": None}, "model"),
        ({"model": {}}, "model"),
        ({"model": {"architecture": "llama", "path": "x"}}, "model"),
        ({"model": {"python": "a:b", "config": {"x": 1}}}, "model.config"),
        ({"model": {"path": "x", "arguments": {"x": 1}}}, "model.arguments"),
        ({"data": {"files": "x", "tokenizer": {}}}, "data.tokenizer"),
        ({"data": {"files": "x", "tokenizer": {"bpe": {"vocab_size": 300}, "file": "x"}}}, "data.tokenizer"),
        ({"data": {"files": "x", "sort_window": 2}}, "data.sort_window"),
        ({"data": {"files": "x", "sort_window": "all"}}, "data.sort_window"),
        ({"data": {"files": "x", "length_multiple": 8}}, "data.length_multiple"),
        ({"data": {"files": "x", "batches_of": "tokens"}}, "data.batches_of"),
        ({"data": {"files": "x", "batches_of": "tokens", "batching": "packed"}}, "data.batches_of"),
        ({"data": {"files": "x", "batching": "packed"}, "parallel": {"loss": "sample_mean"}}, "parallel.loss"),
        ({"parallel": {"zero_stage": 0}}, "parallel.zero_stage"),
        ({"parallel": {"dp": 3, "num_microbatches": 3}}, "train.batch_size"),
        ({"parallel": {"ep": 2}}, "parallel.ep"),
        ({"parallel": {"dp": 3}, "cluster": {"simulate_nodes": 2}}, "parallel"),
        ({"parallel": {"dp": 2}, "nproc_per_node": 1}, "nproc_per_node"),
        ({"nproc_per_node": 2}, "nproc_per_node"),
    ],
)
def test_rules_of_training_name_their_key(changes: dict[str, Any], key: str) -> None:
    assert key in broken({**TRAINING, **changes})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"command": "echo"}, "command"),
        ({"shell": True}, "shell"),
        ({"data": TRAINING["data"]}, "data"),
        ({"train": TRAINING["train"]}, "train"),
        ({"nodes": {"min": 3, "max": 2}, "cluster": {"simulate_nodes": 2}}, "nodes.min"),
        ({"nodes": {"min": 2, "max": 2}}, "nodes.min"),
        ({"env": {"RANK": "0"}}, "env.RANK"),
        ({"env": {"MESHWRIGHT_RUN_ID": "0"}}, "env.MESHWRIGHT_RUN_ID"),
        ({"env": {"A": "0"}, "secrets": {"A": {"from_env": "B"}}}, "secrets.A"),
        ({"secrets": {"A": {}}}, "secrets.A"),
        ({"secrets": {"A": {"from_env": "B", "from_file": "c"}}}, "secrets.A"),
        ({"env_pass": ["A*B"]}, "env_pass.0"),
        ({"rendezvous": {"port_range": [5, 4]}}, "rendezvous.port_range"),
        ({"failure": {"backoff": {"initial": "2m", "max": "1m"}}}, "failure.backoff.initial"),
        ({"failure": {"retry_on": ["node"], "no_retry_on": ["hang", "node"]}}, "failure.no_retry_on.1"),
    ],
)
def test_rules_of_running_name_their_key(changes: dict[str, Any], key: str) -> None:
    assert key in broken({**PROGRAM, **changes})


@pytest.mark.parametrize(
    ("written", "retry_on", "no_retry_on"),
    [
        ({"no_retry_on": ["signal", "exit:3"]}, ("node", "hang", "preempt", "exit"), ("signal", "exit:3")),
        ({"retry_on": ["config"]}, ("config",), ("import_error",)),
        ({}, ("node", "signal", "hang", "preempt", "exit"), ("config", "import_error")),
    ],
)
def test_what_one_list_of_failures_names_is_not_in_the_other_s_default(
    written: dict[str, list[str]], retry_on: tuple[str, ...], no_retry_on: tuple[str, ...]
) -> None:
    job = Job.model_validate({**PROGRAM, "failure": written})
    assert (job.failure.retry_on, job.failure.no_retry_on) == (retry_on, no_retry_on)
    assert Job.model_validate(job.as_dict()) == job


def test_deepspeed_may_shard_nothing() -> None:
    Job.model_validate({**TRAINING, "parallel": {"zero_stage": 0, "data_engine": "deepspeed"}})


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.__name__)
def test_every_key_is_described_and_every_block_too(block: type[BaseModel]) -> None:
    assert (block.__doc__ or "").strip().endswith(".")
    bare = [name for name, field in block.model_fields.items() if not (field.description or "").endswith((".", "`."))]
    assert bare == []


def test_all_blocks_are_looked_at() -> None:
    assert len(blocks()) >= 25


def test_numbers_are_served_by_the_built_in_program_only() -> None:
    monitor = {"monitor": {"prometheus_port": 0}}
    assert broken({**PROGRAM, **monitor}) == ["monitor.prometheus_port"]
    assert Job.model_validate({**TRAINING, **monitor}).monitor.prometheus_port == 0
