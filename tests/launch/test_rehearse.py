"""A job is rehearsed as it is where it fits, and cut down with a word about it where it does not."""

from pathlib import Path

import pytest

from meshwright.launch.errors import JobError
from meshwright.launch.load import load_job
from meshwright.launch.rehearse import rehearse, shrunk_mesh
from meshwright.parallel.mesh import Mesh

JOB = """
name: tiny
model: {{architecture: llama, config: {config}}}
data: {{files: python-stdlib, sequence_length: 32}}
parallel: {parallel}
train: {{steps: 1, batch_size: 4096}}
"""
SMALL = "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2}"
LARGE = "{hidden_size: 4096, intermediate_size: 8192, num_hidden_layers: 16, num_attention_heads: 32}"


def written(folder: Path, *, config: str = SMALL, parallel: str = "{dp: 2}") -> Path:
    path = folder / "job.yaml"
    path.write_text(JOB.format(config=config, parallel=parallel))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["{dp: 2, num_microbatches: 2}", "{fsdp: 2, zero_stage: 2}", "{dp: 64, fsdp: 8}"])
def test_a_job_equals_the_plain_run(tmp_path: Path, parallel: str) -> None:
    report = rehearse(load_job(written(tmp_path, parallel=parallel))).run()
    assert report.ok, str(report)
    assert ("dp=64 rehearsed as dp=2" in report.notes) == ("64" in parallel)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_a_job_is_rehearsed_on_batches_of_its_form(tmp_path: Path, form: str) -> None:
    job = load_job(written(tmp_path, parallel="{dp: 2, num_microbatches: 2}"), [f"data.batching={form}"])
    rehearsal = rehearse(job)
    batch = rehearsal.build_batch()
    if form == "packed":
        assert (batch["position_ids"] == 0).sum(1).min() > 1, "several documents in each row"
    else:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert rehearsal.run().ok


@pytest.mark.slow
def test_a_model_too_large_for_this_machine_is_cut_down_and_says_so(tmp_path: Path) -> None:
    rehearsal = rehearse(load_job(written(tmp_path, config=LARGE)))
    assert "too many to rehearse; cut down: num_hidden_layers 16 -> 2, hidden_size 4096 -> 256" in rehearsal.notes[0]
    assert sum(each.numel() for each in rehearsal.build_model().parameters()) < 10_000_000


def test_what_holds_for_all_ranks_or_blocks_is_left_out_where_they_are_cut_down_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("\n".join(f"{rank}F0,{rank}B0" for rank in range(16)))
    parallel = "{{pp: 16, schedule: {schedule}, {more}}}"
    cuts = f"placement: {{cuts: {list(range(17))}, homes: {list(range(16))}}}"
    placed = parallel.format(schedule="gpipe", more=cuts)
    for text, name in ((placed, "placement"), (parallel.format(schedule="mine.csv", more="zero_stage: 3"), "schedule")):
        rehearsal = rehearse(load_job(written(tmp_path, config=LARGE, parallel=text)))
        assert f"parallel.{name} is for all ranks and blocks; rehearsed without it" in rehearsal.notes
        assert rehearsal.options["placement"] is None
        assert rehearsal.options["schedule"] in ("gpipe", "1f1b")


def test_only_the_axes_that_were_there_are_rehearsed() -> None:
    assert shrunk_mesh(Mesh(dp=2, tp=2))[1] == ()
    assert shrunk_mesh(Mesh(pp=4, tp=8))[0] == Mesh(pp=2, tp=2)
    small, notes = shrunk_mesh(Mesh(pp=4, dp=4, fsdp=4, tp=4))
    assert small.world_size == 8
    assert "pp=4 rehearsed as pp=1" in notes


def test_a_job_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: plain\ncommand: [echo, hi]\n")
    with pytest.raises(JobError, match=r"job\.yaml:1:1: model: the job runs a command"):
        rehearse(load_job(path))
