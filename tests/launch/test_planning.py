"""Every layout that a plan offers is a job that can be loaded, and means that layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from meshwright.clusters.simulated import Layout, Transformer
from meshwright.clusters.simulated.candidates import groups
from meshwright.launch.errors import JobError
from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.planning import Wishes, job_keys, question_of
from meshwright.launch.rehearse import model_on_meta
from meshwright.parallel.options import Options

JOB = """
name: tiny
model:
  architecture: {architecture}
  config: {{hidden_size: 64, intermediate_size: 96, num_hidden_layers: 4, num_attention_heads: 4,
           num_key_value_heads: 2}}
data: {{files: python-stdlib, sequence_length: 64}}
train: {{steps: 1, batch_size: 16}}
"""


def _job(folder: Path, architecture: str = "llama", keys: dict[str, object] | None = None) -> LoadedJob:
    told = yaml.safe_load(JOB.format(architecture=architecture))
    for name, value in (keys or {}).items():
        told[name] = {**told.get(name, {}), **value} if isinstance(value, dict) else value
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(told))
    return load_job(path)


def _meant(loaded: LoadedJob, model: Transformer) -> Layout:
    """The layout that a job states."""
    job, parallel = loaded.job, loaded.job.parallel
    assert job.train is not None
    assert parallel.group_size in (None, 1)
    one_by_one = parallel.schedule == "layered" and parallel.group_size == 1
    orders = {"gpipe": "gpipe", "zb-h1": "zero-bubble", "layered": "breadth-first", "modular": "breadth-first"}
    replicas = parallel.dp * parallel.fsdp
    whole = job.train.batch_size // (replicas * parallel.num_microbatches)
    return Layout(
        tp=parallel.tp,
        cp=parallel.cp,
        ep=parallel.ep,
        pp=parallel.pp,
        dp=replicas,
        vpp=parallel.num_loops or 1,
        micro_batch=whole,
        global_batch=job.train.batch_size,
        schedule="1f1b" if one_by_one else orders.get(parallel.schedule, "1f1b"),
        recompute="full" if parallel.recompute == "blocks" else "none",
        sequence_parallel=parallel.sequence_parallel,
        zero_stage=parallel.zero_stage if parallel.fsdp > 1 else 0,
    )


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_every_layout_that_is_offered_loads_as_a_job_that_means_it(tmp_path: Path, architecture: str) -> None:
    asked, _ = question_of(_job(tmp_path, architecture), Wishes(gpu="A100", gpus=16))
    assert (asked.global_batch, asked.model.layers, asked.model.experts) == (16, 4, 8 * (architecture == "mixtral"))
    seen: dict[str, Layout] = {}
    for group in groups(asked):
        for dp, number, schedule, vpp, stage in group.choices():
            layout = group.layout(dp=dp, microbatches=number, schedule=schedule, vpp=vpp, zero_stage=stage)
            kind = replace(layout, micro_batch=1, global_batch=layout.dp * (2 if number > 1 else 1))
            seen.setdefault(str(kind), layout)
    for layout in list(seen.values())[:: 9 if architecture == "mixtral" else 3]:
        loaded = _job(tmp_path, architecture, job_keys(layout))
        assert _meant(loaded, asked.model) == layout
        options = Options.of(**loaded.job.options)
        options.check(loaded.job.mesh)
        options.chosen(loaded.job.mesh, asked.model.layers)
        assert loaded.job.mesh.world_size == 16


def test_nodes_are_said_where_the_job_is_to_say_them() -> None:
    layout = Layout(tp=8, dp=4, global_batch=4)
    assert "nodes" not in job_keys(layout)
    assert job_keys(layout, per_node=8) | {"parallel": 0, "train": 0} == {
        "parallel": 0,
        "train": 0,
        "nodes": 4,
        "nproc_per_node": 8,
    }
    assert "nodes" not in job_keys(Layout(dp=12, global_batch=12), per_node=8)


def test_the_cluster_is_what_was_asked_for(tmp_path: Path) -> None:
    loaded = _job(tmp_path)
    words = ["network=100", "per_node=4", "memory=60", "batch=64", "at_most=1", "layers=8"]
    asked, notes = question_of(loaded, Wishes.of("H100", 32, words))
    assert asked.cluster.network == 12.5e9
    assert (asked.cluster.gpus_per_node, asked.cluster.num_gpus, asked.cluster.gpu.memory_bytes) == (4, 32, 60e9)
    assert (asked.global_batch, asked.at_most, asked.model.layers) == (64, True, 8)
    assert any("bfloat16" in note for note in notes)


def test_what_the_command_line_leaves_out_the_job_says(tmp_path: Path) -> None:
    keys = {"resources": {"gpu_type": "A100"}, "parallel": {"dp": 4}, "train": {"precision": "bfloat16"}}
    asked, notes = question_of(_job(tmp_path, keys=keys), Wishes())
    assert (asked.cluster.gpu.name, asked.cluster.num_gpus, asked.global_batch) == ("A100", 4, 16)
    assert not any("bfloat16" in note for note in notes)


@pytest.mark.parametrize(
    ("gpu", "gpus", "words", "said"),
    [
        (None, 8, [], "give --gpu H100"),
        ("H10O", 8, [], "nearest: 'H100'"),
        ("H100", 0, [], "a cluster has GPUs: 0"),
        ("H100", 8, ["batches=4"], "did you mean 'batch'"),
        ("H100", 8, ["batch=many"], "'many' is no number above 0; write batch=8"),
        ("H100", 8, ["batch=0"], "is no number above 0"),
        ("H100", 8, ["heads=7"], "do not share"),
    ],
)
def test_bad_wishes_are_refused(tmp_path: Path, gpu: str | None, gpus: int, words: list[str], said: str) -> None:
    with pytest.raises(JobError, match=said.replace("(", r"\(")):
        question_of(_job(tmp_path), Wishes.of(gpu, gpus, words))


def test_layouts_are_not_planned_for_gpus_without_bfloat16(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="layouts are planned in bfloat16, for which V100 has no matrix units"):
        question_of(_job(tmp_path), Wishes.of("V100", 8))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_parameters_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    loaded = _job(tmp_path, architecture)
    asked, _ = question_of(loaded, Wishes.of("H100", 8))
    assert asked.model.parameters == sum(each.numel() for each in model_on_meta(loaded, values=False).parameters())
