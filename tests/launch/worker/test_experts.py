"""Jobs whose experts are dealt: one file from the mesh to the load of each expert."""

import json
from pathlib import Path
from shutil import copy

import pytest
from torch import nn

from meshwright.launch.load import load_job
from meshwright.launch.rehearse import shrunk_mesh
from meshwright.launch.worker.errors import ModelBuildError
from meshwright.launch.worker.experts import count_job
from meshwright.launch.worker.model import build_model
from meshwright.moe.expert_pass import Experts
from meshwright.moe.two_gates import TwoGates
from meshwright.parallel.mesh import Mesh
from tests.launch.worker.runs import finish, run_dir, train_here
from tests.moe.models import build

EXAMPLE = Path(__file__).parents[3] / "examples" / "experts.yaml"
SMALL = ("data.max_bytes=64KiB", "train.validate_batches=1", "train.schedule.warmup_steps=1", "train.log_every_steps=2")


def test_nodes_of_experts_are_those_of_the_cluster() -> None:
    job = load_job(EXAMPLE, []).job
    assert job.mesh == Mesh(dp=4, ep=4, ep_node=2)
    assert job.options["moe"] == Experts("auto")
    alone = load_job(EXAMPLE, ["nodes=1", "cluster.simulate_nodes=1", "parallel.moe.transport=one_hop"]).job
    assert alone.mesh == Mesh(dp=4, ep=4)
    assert alone.options["moe"] == Experts("one_hop")
    assert "moe" not in load_job(EXAMPLE, ["parallel.ep=1"]).job.options


def test_a_rehearsal_keeps_experts_dealt() -> None:
    small, notes = shrunk_mesh(Mesh(dp=64, ep=16, ep_node=2))
    assert small == Mesh(dp=2, ep=2, ep_node=2)
    assert notes == ("dp=64 rehearsed as dp=2", "ep=16 rehearsed as ep=2")


def test_routers_of_two_levels_must_divide_the_experts() -> None:
    spec = load_job(EXAMPLE, []).job.as_dict()["model"]
    gates = [each for each in build_model(spec, vocab_size=257, seed=0).modules() if isinstance(each, TwoGates)]
    assert [(len(each.inter), len(each.intra)) for each in gates] == [(2, 4), (2, 4)]
    with pytest.raises(ModelBuildError, match=r"model\.bilevel\.nodes=3 does not divide the 8 experts of a layer"):
        build_model({**spec, "bilevel": {**spec["bilevel"], "nodes": 3}}, vocab_size=257, seed=0)


def test_only_routers_with_biases_are_balanced_by_them() -> None:
    count_job(nn.Linear(2, 2), balanced=False)
    with pytest.raises(ModelBuildError, match=r"train\.balance_rate: no module of Linear is recognised as experts"):
        count_job(nn.Linear(2, 2), balanced=True)
    with pytest.raises(ModelBuildError, match=r"train\.balance_rate: no bias moves what experts .* by a loss"):
        count_job(build("mixtral"), balanced=True)
    count_job(build("deepseek_v3"), balanced=True)


@pytest.mark.slow
def test_a_run_tells_how_evenly_experts_are_loaded_and_trains_as_on_one_rank(tmp_path: Path) -> None:
    job, losses = tmp_path / "experts.yaml", []
    copy(EXAMPLE, job)
    one = ("parallel={}", "nodes=1", "cluster.simulate_nodes=1", "parallel.num_microbatches=4")
    for name, overrides in (("dealt", ()), ("one", one)):
        found = ("train.steps=4", f"logs.dir={tmp_path}/{name}", *SMALL, *overrides)
        if name == "one":
            train_here(job, name, *found)
        else:
            code, said = finish(job, name, *found, timeout_s=240.0)
            assert code == 0, said
        folder = run_dir(job, name) if name == "one" else tmp_path / name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        if name == "dealt":
            load = lines[-3]["experts"]
            assert 1.0 <= load["worst_node_ratio"] <= 2.0
            assert load["worst_node_ratio"] <= load["worst_expert_ratio"] <= 8.0
            assert load["unserved_token_share"] == 0.0
            (counted,) = [line["collectives"] for line in lines if "collectives" in line]
            axes = {each["axis"] for each in counted}
            assert axes == {"dp", "ep_node", "ep_local"}
            assert (tmp_path / name / "experts.png").stat().st_size > 5000
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
