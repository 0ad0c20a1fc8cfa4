"""verify, show and simulate as they are typed: texts for people, one JSON object for machines, codes for scripts."""

import json
import re
from pathlib import Path

import pytest

from meshwright.launch.cli import main
from meshwright.parallel.pipeline.actions import Kind, Schedule
from tests.launch.test_rehearse import written

_SCHEDULES = {
    "mine.csv": "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n",
    "four.csv": "0F0,2F0,0F1,2F1,2B0,0B0,2B1,0B1\n1F0,3F0,1F1,3F1,3B0,1B0,3B1,1B1\n",
    "worse.csv": "0F0,0F1,0B0,0B1\n1X0,1B0,1F1,1B1\n",
    "stuck.csv": "0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n",
}


@pytest.mark.slow
def test_verify_prints_one_json_object_and_ends_with_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(written(tmp_path)), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["max_relative_gradient_error"] <= 1e-10


def test_show_prints_mesh_report_and_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(written(tmp_path, parallel="{fsdp: 2, num_microbatches: 2}"))
    assert main(["show", job]) == 0
    text = capsys.readouterr().out
    assert "fsdp=2, 2 ranks" in text
    assert "reduce_scatter" in text
    assert "rank 0  " + "0" * 12 + "A" * 24 + "1" * 12 + "B" * 24 in text
    assert main(["show", job, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 2


def test_show_says_which_modules_attend_by_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(written(tmp_path, parallel="{dp: 2, blockwise: {kv_block: 512}}"))
    assert main(["show", job]) == 0
    assert "attention in blocks of 1,024 queries x 512 keys: " in capsys.readouterr().out
    assert main(["show", job, "--set", "parallel.blockwise.kv_block=0"]) != 0
    assert "kv_block" in capsys.readouterr().err


def test_show_draws_the_order_that_a_step_will_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(written(tmp_path, parallel="{dp: 2, num_microbatches: 2, schedule: layered}"))
    assert main(["show", job]) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rank 0"))
    assert first.count("01") > 1
    assert first.index("B") < first.rindex("A")


def test_show_writes_the_order_as_text_picture_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(written(tmp_path, parallel="{pp: 2, fsdp: 2, num_microbatches: 3, schedule: modular}"))
    files = [tmp_path / "order.png", tmp_path / "order.json"]
    costs = ["--cost", "latency=1", "--cost", "backward=3"]
    assert main(["show", job, "--json", "--plot", str(files[0]), "--trace", str(files[1]), *costs]) == 0
    shown = json.loads(capsys.readouterr().out)["schedule"]
    assert (shown["makespan"], shown["bubble"], shown["gathers"], shown["reductions"]) == (18.0, 0.5, 2, 2)
    schedule = Schedule.read(shown["text"])
    assert schedule.homes == (0, 1)
    assert files[0].read_bytes().startswith(b"\x89PNG")
    names = {event["name"] for event in json.loads(files[1].read_text())["traceEvents"]}
    assert {str(action) for row in schedule.ranks for action in row if action.kind is not Kind.FREE} < names
    assert main(["show", job, "--cost", "latancy=1"]) == 65
    assert "did you mean 'latency'?" in capsys.readouterr().err
    assert main(["show", job, "--cost", "forward=0"]) == 65
    assert "'0' is no time; write forward=0.5" in capsys.readouterr().err
    assert main(["show", job, "--trace", str(tmp_path / "no/order.json")]) == 65
    assert "no/order.json cannot be written: No such file or directory" in capsys.readouterr().err
    (tmp_path / "command.yaml").write_text("name: c\ncommand: [echo, yes]\n")
    assert main(["show", str(tmp_path / "command.yaml"), "--plot", str(tmp_path / "none.png")]) == 65
    assert "the job runs a command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parallel", "why"),
    [
        ("{dp: 2, ep: 2, data_engine: deepspeed}", "ep=2 does not go with data_engine='deepspeed'; nearest legal"),
        ("{pp: 2}", "schedule='modular'"),
        ("{dp: 2, sequence_parallel: true}", "give the mesh tp=2 or more"),
        ("{fsdp: 2, schedule: layered, offload: cpu}", "schedule='layered' does not go with offload='cpu'"),
        ("{tp: 2, data_engine: deepspeed}", "does not take the axis tp=2"),
    ],
)
def test_a_layout_that_cannot_be_had_is_refused_before_any_rank_starts(
    parallel: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", str(written(tmp_path, parallel=parallel)), "--dry-run"]) != 0
    assert why in capsys.readouterr().err


_STAGED = "pp: 2, num_microbatches: 2, "
_PLACED = "placement: {cuts: [0, 3, 8], homes: [0, 1]}"


@pytest.mark.parametrize(
    ("parallel", "why"),
    [
        (
            _STAGED + "schedule: mein.csv",
            "parallel.schedule: schedule file {folder}/mein.csv does not exist; did you mean",
        ),
        (
            _STAGED + "schedule: worse.csv",
            "parallel.schedule: schedule file {folder}/worse.csv: line 2, cell 1: '1X0' is no",
        ),
        (
            _STAGED + "schedule: stuck.csv",
            "{folder}/stuck.csv is stuck with posted sends: rank 0 at 0B0; rank 1 at 1F1",
        ),
        (_STAGED + "schedule: 1fb1", "parallel.schedule: there is no schedule '1fb1'; did you mean '1f1b'?"),
        ("pp: 2, num_microbatches: 4, schedule: mine.csv", "of 2 micro-batches, but num_microbatches=4; nearest legal"),
        (
            "pp: 4, num_microbatches: 2, schedule: mine.csv",
            "parallel.schedule: schedule {folder}/mine.csv is one of 2 ranks",
        ),
        (_STAGED + "schedule: gpipe, group_size: 2", "parallel.group_size: schedule 'gpipe' takes no group_size=2"),
        (_STAGED + "schedule: gpipe, placement: {cuts: [0, 3, 3], homes: [0, 1]}", "placement: stage 1 has no blocks"),
        (
            "pp: 4, num_microbatches: 2, schedule: gpipe, " + _PLACED,
            "parallel.placement: placement deals stages to 2 ranks",
        ),
        (
            _STAGED + "schedule: modular, stage_costs: flops",
            "parallel.stage_costs: schedule 'modular' makes each block a",
        ),
        (_STAGED + "schedule: gpipe, stage_costs: flop", "parallel.stage_costs: expected 'parameters' or 'flops'"),
    ],
)
def test_stages_that_cannot_be_had_are_refused_at_their_place_in_the_file(
    parallel: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in _SCHEDULES.items():
        (tmp_path / name).write_text(text)
    job = written(tmp_path, parallel="{" + parallel + "}")
    assert main(["launch", str(job), "--dry-run"]) == 65
    said = capsys.readouterr().err
    assert f"{job}:5:" in said
    assert why.format(folder=tmp_path) in said


@pytest.mark.parametrize(
    ("parallel", "why"),
    [
        ("schedule: four.csv", "four.csv has 4 stages, but the model has 2 blocks"),
        ("schedule: gpipe, " + _PLACED, "placement has 8 blocks (cuts [0, 3, 8]), but the model has 2; nearest legal"),
        ("schedule: gpipe, stage_costs: [1, 2, 3]", "stage_costs has 3 numbers, but the model has 2 blocks"),
        (
            "schedule: gpipe, blocks: [model.layerz.*]",
            "no module has a path like 'model.layerz.*'; nearest: model.layers.*",
        ),
    ],
)
@pytest.mark.parametrize("command", ["show", "simulate", "verify"])
def test_stages_that_do_not_fit_the_model_are_refused_at_their_place_in_the_file(
    command: str, parallel: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in _SCHEDULES.items():
        (tmp_path / name).write_text(text)
    job = written(tmp_path, parallel="{" + _STAGED + parallel + "}")
    assert main([command, str(job)]) == 65
    said = capsys.readouterr().err
    assert f"{job}:5:1: parallel: " in said
    assert why in said


def test_show_draws_the_schedule_of_a_file_beside_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.csv").write_text(_SCHEDULES["mine.csv"])
    job = written(tmp_path, parallel="{" + _STAGED + "schedule: mine.csv, stage_costs: flops, blocks: ['*.layers.*']}")
    assert main(["show", str(job)]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path}/mine.csv: 2 blocks in 2 stages on 2 ranks" in text
    assert re.search("rank 1  [.]+0+A+1+B+", text)


def test_simulate_predicts_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(written(tmp_path, parallel="{fsdp: 512}"))
    assert main(["simulate", job, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"] == "fsdp=512"
    assert main(["simulate", job]) == 0
    assert "bytes kept by one rank" in capsys.readouterr().out


def test_show_and_simulate_know_how_a_model_is_dealt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(written(tmp_path, parallel="{tp: 2, sequence_parallel: true}"))
    assert main(["show", job]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in shown
    assert "reduce_scatter" in shown
    assert main(["simulate", job, "--json"]) == 0
    assert {row["axis"] for row in json.loads(capsys.readouterr().out)["collectives"]} == {"tp"}


def test_show_and_simulate_know_what_a_dealt_sequence_sends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(written(tmp_path, parallel="{cp: 2, cp_kind: ring, blockwise: {loss_block: 8, loss_in_advance: true}}"))
    assert main(["show", job]) == 0
    assert "all_to_all" in capsys.readouterr().out
    assert main(["simulate", job, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["collectives"]
    assert {(row["axis"], row["kind"]) for row in found} == {
        ("cp", kind) for kind in ("all_gather", "all_reduce", "all_to_all")
    }


@pytest.mark.parametrize("command", ["verify", "show", "simulate"])
def test_a_mesh_that_cannot_be_had_is_one_line_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, str(written(tmp_path, parallel="{dp: 2, ep: 2}"))]) == 65
    error = capsys.readouterr().err
    assert "no module of LlamaForCausalLM is recognised as experts" in error
    assert "Traceback" not in error
