"""The built-in program, launched for real: learning, resuming, other meshes, and what can go wrong."""

import json
from pathlib import Path

import pytest

from tests.launch.worker.runs import finish, losses, metrics, run_dir, train_here, write_job

pytestmark = pytest.mark.slow


def test_a_run_learns_measures_and_leaves_its_records(tmp_path: Path) -> None:
    job = write_job(tmp_path, steps=40)
    faster = "train.optimizer.lr=0.05"
    code, output = finish(job, "one", faster)
    assert code == 0, output
    records = metrics(job, "one")
    validations = [each["validation_loss"] for each in records if "validation_loss" in each]
    assert 5.0 < validations[0] < 6.5
    assert validations[-1] < validations[0] - 1.0
    first = next(each for each in records if each["step"] == 1)
    # the gather is the first step's check of buffers
    assert {row["kind"] for row in first["collectives"]} <= {"all_reduce", "all_gather"}
    for key in ("tokens_per_s", "step_s", "peak_memory_bytes", "mfu_full", "mfu_causal", "gradient_norm"):
        assert first[key] > 0, key
    assert first["loopback_bytes"] > 0, "two ranks of one machine"
    assert {"network_sent_bytes", "network_received_bytes", "counted_s", "cpu_s", "resident_bytes"} <= set(first)
    assert records[-1]["event"] == "end"
    assert (run_dir(job, "one") / "loss.png").stat().st_size > 10_000
    assert json.loads((run_dir(job, "one") / "exit.json").read_text())["state"] == "succeeded"
    again = finish(job, "two", faster)
    assert again[0] == 0
    assert "resumed from" in again[1]
    assert losses(job, "two") == losses(job, "one")


def test_a_run_that_is_ended_before_its_first_step_leaves_nothing_that_the_next_could_not_go_on_from(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, steps=3)
    assert "stopped at step 0" in train_here(job, "one", "train.stop_after=1ms")
    said = train_here(job, "two")
    assert "resumed from" not in said
    assert [step for step, _ in losses(job, "two")] == [1, 2, 3]


def test_the_same_seed_gives_the_same_curve_on_any_number_of_ranks(tmp_path: Path) -> None:
    curves = []
    for parallel in ("{}", "{dp: 2}", "{fsdp: 2}"):
        job = write_job(tmp_path / str(len(curves)), parallel=parallel, steps=5, every=100)
        train_here(job, "run", "train.precision=float64", "model.arguments={width: 8, dropout: 0.0}")
        curves.append([loss for _, loss in losses(job, "run")])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-12)


def test_a_job_with_a_schedule_says_what_its_steps_wait_for(tmp_path: Path) -> None:
    job = write_job(tmp_path, parallel="{pp: 2, schedule: modular, num_microbatches: 2}", steps=3, every=100)
    code, output = finish(job, "one")
    assert code == 0, output
    first, *others = [each for each in metrics(job, "one") if "loss" in each]
    assert "bubble" not in first
    for each in others:
        assert each["bubble"] > 0
        assert 0 <= each["exposed_communication_s"] < each["step_s"]
        assert (each["gathers"], each["reductions"]) == (0, 0)  # no axis to gather or reduce along
    events = json.loads((run_dir(job, "one") / "trace.json").read_text())["traceEvents"]
    assert {"0F0", "0F1", "1B1", "0SEND_F1"} < {event["name"] for event in events}
    assert (run_dir(job, "one") / "timeline.png").stat().st_size > 10_000


def test_a_checkpoint_is_resumed_on_another_mesh(tmp_path: Path) -> None:
    job = write_job(tmp_path, parallel="{fsdp: 2}", steps=6)
    train_here(job, "one")
    assert "at step 6" in train_here(job, "two", "parallel.fsdp=1", "parallel.dp=2", "train.steps=9")
    assert [step for step, _ in losses(job, "two")] == list(range(1, 10))


def test_documents_padded_or_packed_give_one_curve_and_say_what_padding_cost(tmp_path: Path) -> None:
    overrides = ["train.precision=float64", "model.arguments={width: 8, dropout: 0.0}", "train.schedule.decay=constant"]
    overrides += ["data.files=[lines/*.txt]", "data.sort_window=2", "data.sequence_length=64"]
    padded = write_job(tmp_path / "padded", parallel="{dp: 2}", steps=8, every=100)
    packed = write_job(tmp_path / "packed", parallel="{num_microbatches: 2}", steps=5, every=3)
    for job in (padded, packed):
        (job.parent / "lines").mkdir()
        for number in range(60):
            (job.parent / "lines" / f"{number}.txt").write_text("abcdefghij" * (1 + number % 7) + "x" * (number % 5))
    assert "  padding " in train_here(padded, "one", *overrides, "data.batching=padded")
    assert "  padding " not in train_here(packed, "one", *overrides, "data.batching=packed", "train.log_every_steps=4")
    # a checkpoint does not mind the form; tokens of step 2 and 3 stand in no record of it
    overrides += [f"checkpoint.resume={packed.parent / 'checkpoints' / 'step-00000003'}", "train.steps=8"]
    assert "at step 3" in train_here(packed, "two", *overrides, "data.batching=padded", "train.log_every_steps=4")
    whole = {each["step"]: each for each in metrics(padded, "one") if "loss" in each}
    parts = [each for each in metrics(packed, "two") if "loss" in each]
    assert [each["step"] for each in parts] == [1, 4, 8]
    for each in parts:
        assert each["loss"] == pytest.approx(whole[each["step"]]["loss"], rel=1e-12)
        assert each["tokens"] == whole[each["step"]]["tokens"]
        assert (each["padding_ratio"] == 0) == (each["step"] == 1)
    assert whole[8]["tokens"] == sum(each["tokens_per_step"] for each in whole.values())


@pytest.mark.parametrize(
    ("override", "code", "text"),
    [
        ("data.files=[nothing.txt]", 74, "'nothing.txt' matches no file"),
        ("model.python=tinny:build", 65, "'tinny' cannot be imported"),
        ("checkpoint.resume=nowhere", 74, "nowhere is not a whole checkpoint"),
    ],
)
def test_what_cannot_be_trained_ends_with_a_message_and_its_own_code(
    tmp_path: Path, override: str, code: int, text: str
) -> None:
    job = write_job(tmp_path, parallel="{}", steps=2)
    found, output = finish(job, "one", override)
    assert (found, text in output) == (code, True), output


def test_other_text_under_an_old_checkpoint_is_refused(tmp_path: Path) -> None:
    job = write_job(tmp_path, parallel="{}", steps=3)
    train_here(job, "one")
    code, output = finish(job, "two", "train.seed=5", "train.steps=6")
    assert code == 74
    assert "other text, another seed or another batch size" in output
