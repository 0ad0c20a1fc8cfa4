"""Bytes on paper are the bytes on a rank."""

from pathlib import Path

import pytest
import torch

import meshwright as mw
from meshwright.launch.errors import JobError
from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.rehearse import rehearse
from meshwright.parallel.microbatch import share
from meshwright.testing import run_ranks
from tests.launch.test_rehearse import LARGE, written


def _kept_bytes(loaded: LoadedJob) -> tuple[int, int, int]:
    rehearsal = rehearse(loaded)
    model = mw.parallelize(rehearsal.build_model(), loaded.job.mesh, **loaded.job.options)
    optimizer = model.make_optimizer(torch.optim.AdamW)
    model.step(share(rehearsal.build_batch(), model.data_rank, loaded.job.mesh.data_degree))
    optimizer.step()
    owned = [each for group in optimizer.param_groups for each in group["params"]]
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return _size(owned), _size([each.grad for each in owned]), _size(moments)


def _size(tensors: list[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel", ["{dp: 2}", "{fsdp: 2, zero_stage: 3}", "{fsdp: 3, zero_stage: 1}", "{dp: 2, fsdp: 2}"]
)
def test_states_on_paper_are_those_of_the_first_rank(tmp_path: Path, parallel: str) -> None:
    loaded = load_job(written(tmp_path, parallel=parallel))
    found = mw.simulate(loaded)
    assert run_ranks(_kept_bytes, loaded.job.mesh, loaded)[0] == (
        found.parameter_bytes,
        found.gradient_bytes,
        found.optimizer_bytes,
    )


def test_a_job_of_any_size_is_predicted_here(tmp_path: Path) -> None:
    small = mw.simulate(written(tmp_path, config=LARGE, parallel="{fsdp: 8}"))
    large = mw.simulate(written(tmp_path, config=LARGE, parallel="{dp: 8, fsdp: 64}"))
    assert large.optimizer_bytes < small.optimizer_bytes / 7
    assert large.as_dict()["mesh"] == "dp=8 x fsdp=64"
    assert "step  " in str(large)


def test_a_rank_of_a_pipeline_keeps_its_own_blocks(tmp_path: Path) -> None:
    few = ("train.batch_size=8",)  # what would make it fit is tried down to micro-batches of one sequence
    whole = mw.simulate(load_job(written(tmp_path, config=LARGE), few))
    parallel = "{pp: 2, schedule: modular, num_microbatches: 2}"
    staged = mw.simulate(load_job(written(tmp_path, config=LARGE, parallel=parallel), few))
    assert whole.parameter_bytes / 2 < staged.parameter_bytes < 0.75 * whole.parameter_bytes
    assert staged.num_parameters == whole.num_parameters


def test_what_cannot_be_predicted_says_why(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"job\.yaml:\d+:1: parallel: no module of LlamaForCausalLM is recog"):
        mw.simulate(written(tmp_path, parallel="{dp: 2, ep: 2}"))
    path = tmp_path / "job.yaml"
    path.write_text("name: plain\ncommand: [echo, hi]\n")
    with pytest.raises(JobError, match=r"job\.yaml:1:1: model: the job runs a command"):
        mw.simulate(path)
