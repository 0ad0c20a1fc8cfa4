"""verify, show and simulate as they are typed: texts for people, one JSON object for machines, codes for scripts."""

import json
from pathlib import Path

import pytest

from meshwright.launch.cli import main
from meshwright.parallel.pipeline.actions import Kind, Schedule
from tests.launch.test_rehearse import written


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
        ("{cp: 2}", "cp=2 cannot be wrapped by this version; nearest legal layout: dp=2"),
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


@pytest.mark.parametrize("command", ["verify", "show", "simulate"])
def test_a_mesh_that_cannot_be_had_is_one_line_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, str(written(tmp_path, parallel="{cp: 2}"))]) == 65
    error = capsys.readouterr().err
    assert "mesh axis cp=2 cannot be wrapped by this version; nearest legal layout: dp=2" in error
    assert "Traceback" not in error
