"""A job on paper: what it runs on, whether it fits and what would make it, tables, pictures, errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import meshwright as mw
from meshwright.launch.cli import main
from meshwright.launch.errors import JobError
from meshwright.launch.load import load_job
from meshwright.launch.paper.advice import scaling_of
from meshwright.launch.paper.drawing import deal_on_paper, forecast, run_on_paper
from meshwright.launch.paper.hardware import hardware_of
from meshwright.launch.paper.picture import draw_forecast
from meshwright.launch.paper.states import states_of
from meshwright.launch.paper.text import forecast_lines
from meshwright.launch.predict import Prediction
from meshwright.launch.rehearse import model_on_meta
from meshwright.parallel.stages import stages_of
from meshwright.parallel.work import Work
from tests.clusters.test_calibration import known_machine

JOB = """
name: paper
model: {{architecture: {architecture}, config: {config}}}
data: {{files: python-stdlib, sequence_length: {length}}}
parallel: {parallel}
train: {{steps: 1, batch_size: {batch}, precision: bfloat16}}
cluster: {{type: slurm, nodes: {nodes}, gpus_per_node: 8}}
"""
SMALL = "{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 8, num_attention_heads: 4}"
LARGE = "{hidden_size: 8192, intermediate_size: 28672, num_hidden_layers: 8, num_attention_heads: 64}"


def _written(folder: Path, parallel: str, **more: Any) -> Path:
    told = {"architecture": "llama", "config": SMALL, "length": 64, "batch": 64, "nodes": 1} | more
    path = folder / "job.yaml"
    path.write_text(JOB.format(parallel=parallel, **told))
    return path


def _predicted(path: Path, **how: Any) -> Prediction:
    found = mw.simulate(path, **{"gpu": "H100", "network_gbps": 400, **how})
    assert found.forecast is not None, found.notes
    return found


@pytest.mark.parametrize(
    "parallel",
    [
        "{dp: 8}",
        "{fsdp: 8, num_microbatches: 2}",
        "{fsdp: 4, dp: 2, schedule: layered, num_microbatches: 2, recompute: blocks}",
        "{pp: 4, dp: 2, schedule: 1f1b, num_microbatches: 8}",
        "{pp: 2, fsdp: 4, schedule: modular, num_microbatches: 4, zero_stage: 3}",
        "{pp: 2, fsdp: 4, schedule: zb-h1, num_microbatches: 4, zero_stage: 1}",
        "{tp: 2, pp: 2, dp: 2, schedule: interleaved, num_microbatches: 4, sequence_parallel: true}",
        "{cp: 4, dp: 2}",
        "{dp: 8, blockwise: {loss_block: 16, ffn_block: 16}}",
        "{dp: 4, tp: 2, blockwise: {layer_block: 16}}",
        "{dp: 8, schedule: layered, num_microbatches: 4, recompute: blocks, offload_inputs: true}",
    ],
)
def test_every_axis_and_schedule_has_a_forecast(tmp_path: Path, parallel: str) -> None:
    found = _predicted(_written(tmp_path, parallel))
    assert found.forecast is not None
    step = found.forecast.step
    assert step.total_s == pytest.approx(sum(vars(step).values()))
    assert step.compute_s > 0
    assert min(vars(step).values()) >= 0
    assert found.forecast.memory.parameters == found.parameter_bytes or "pp" in found.mesh
    assert found.notes == ()


def test_states_in_the_host_s_memory_are_said_and_priced(tmp_path: Path) -> None:
    found = _predicted(_written(tmp_path, "{fsdp: 8, offload: cpu}"))
    said = "shards are updated on the host, at the rate of its link to the GPU as far as anybody knows"
    assert found.notes == (said,)
    forecast = found.forecast
    assert forecast is not None
    assert forecast.step.offload_s > 0
    assert forecast.memory.parameters == 0.0
    assert forecast.memory.host >= found.parameter_bytes + found.gradient_bytes + found.optimizer_bytes
    assert "in the host's memory" in str(found)
    assert forecast.as_dict()["host_memory_bytes"] == forecast.memory.host


def test_blocks_too_large_to_be_proved_run_by_spans_that_shapes_allow(tmp_path: Path) -> None:
    path = _written(tmp_path, "{fsdp: 8, blockwise: {layer_block: 512}}", config=LARGE, length=2048, batch=8)
    whole, spans = (_predicted(path, overrides=each) for each in (["parallel.blockwise=null"], []))
    assert "judged by shapes alone" in spans.notes[0]
    assert whole.forecast is not None
    assert spans.forecast is not None
    assert spans.forecast.memory.activations < 0.4 * whole.forecast.memory.activations
    assert spans.forecast.step.compute_s > whole.forecast.step.compute_s
    assert spans.forecast.flops == whole.forecast.flops
    assert spans.collectives == whole.collectives is not None


@pytest.mark.parametrize("parallel", ["{dp: 8}", "{dp: 8, ep: 4}", "{dp: 8, ep: 8}"])
def test_experts_are_on_paper(tmp_path: Path, parallel: str) -> None:
    config = (
        "{hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4, num_local_experts: 8, "
        "num_key_value_heads: 4}"
    )
    found = _predicted(_written(tmp_path, parallel, architecture="mixtral", config=config)).forecast
    assert found is not None
    assert (found.step.ep_s > 0) == ("ep" in parallel)


def test_each_rank_of_a_pipeline_keeps_its_own_states(tmp_path: Path) -> None:
    loaded = load_job(_written(tmp_path, "{pp: 4, dp: 2, schedule: 1f1b, num_microbatches: 4}"))
    dealt = deal_on_paper(loaded, model_on_meta(loaded))
    stages = stages_of(dealt.mine, loaded.job.mesh, 0, dealt.options)
    states = states_of(dealt.mine, loaded.job.mesh, dealt.options, stages=stages, experts=dealt.plans.experts)
    assert max(each.parameters for each in states) == mw.simulate(loaded).parameter_bytes
    assert [each.optimizer for each in states] == [2 * each.gradients for each in states]


def test_gpus_across_nodes_and_a_slower_network_are_slower(tmp_path: Path) -> None:
    parallel = "{dp: 16, bucket_bytes: 1MiB}".replace(", bucket_bytes: 1MiB", "")
    path = _written(tmp_path, parallel, config=LARGE, nodes=2, length=128)
    fast, slow = (_predicted(path, network_gbps=each).forecast for each in (400, 25))
    assert fast is not None
    assert slow is not None
    assert fast.step.dp_s < slow.step.dp_s / 4
    assert fast.paper.machine.cluster.nodes == 2


def test_what_nobody_said_is_assumed_and_said(tmp_path: Path) -> None:
    path = _written(tmp_path, "{dp: 16}", nodes=2)
    notes = hardware_of(load_job(path)).notes
    assert "the job names no GPU, so H100 is taken; say which by --gpu or resources.gpu_type" in notes
    assert "nobody says how fast the network is, so 400 Gb/s per GPU are taken, as usual with H100" in notes
    told = load_job(path, ["resources.gpu_type=A100"])
    assert hardware_of(told, network_gbps=100).notes == ()
    assert hardware_of(told).cluster.gpu.name == "A100"
    assert hardware_of(told, gpu_name="B200").cluster.gpu.name == "B200"


def test_an_unknown_gpu_is_named_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _written(tmp_path, "{dp: 8}")
    with pytest.raises(JobError, match="no GPU called 'H10O' in the catalog; nearest: 'H100'"):
        mw.simulate(path, gpu="H10O")
    assert main(["simulate", str(path), "--gpu", "H10O"]) == 65
    assert "nearest: 'H100'" in capsys.readouterr().err


def test_a_gpu_without_the_number_format_of_a_job_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = _written(tmp_path, "{dp: 8}")
    with pytest.raises(JobError, match=r"train.precision.*V100 has no matrix units for bfloat16; set train.precision="):
        mw.simulate(path, gpu="V100")
    found = mw.simulate(path, ["train.precision=float32"], gpu="V100").forecast
    assert found is not None
    assert found.paper.machine.cluster.gpu.name == "V100"


def test_a_machine_that_was_measured_holds_all_ranks_and_starts_operations_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, entry = _written(tmp_path, "{dp: 4}", nodes=1), tmp_path / "machine.yaml"
    entry.write_text(known_machine(), encoding="utf-8")
    found = mw.simulate(path, gpu=entry).forecast
    assert found is not None
    machine, reached = found.paper.machine, found.paper.machine.efficiency.compute
    assert (machine.cluster.gpu.name, machine.cluster.nodes) == ("host", 1)
    assert machine.priced(Work(operations=80)).compute_s == pytest.approx(2 * reached.waiting_s)
    with pytest.raises(JobError, match=r"job.yaml is no calibration; write one with `meshwright doctor --calibrate"):
        mw.simulate(path, gpu=path)
    assert main(["simulate", str(path), "--gpu", str(entry), "--network-gbps", "9"]) == 65
    assert "says how fast ranks of that machine talk; leave it out" in capsys.readouterr().err


def test_a_mesh_that_does_not_cover_the_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="nproc_per_node"):
        mw.simulate(_written(tmp_path, "{dp: 4}"), ["nproc_per_node=8"])


def test_a_job_that_cannot_fit_says_by_how_much_and_the_smallest_change_that_would(tmp_path: Path) -> None:
    path = _written(tmp_path, "{fsdp: 8, num_microbatches: 2}", config=LARGE, length=4096, batch=64)
    found = _predicted(path).forecast
    assert found is not None
    assert not found.fits
    lacks, needs = f"lacks {found.missing_bytes / 1e9:.1f} GB", re.search(r"\(([\d.]+) of 80 GB\)", found.advice)
    assert any(lacks in line for line in forecast_lines(found))
    assert needs is not None, found.advice
    changes = dict(re.findall(r"parallel\.(\w+): (\w+)", found.advice))
    again = _predicted(path, overrides=[f"parallel.{name}={value}" for name, value in changes.items()]).forecast
    assert again is not None
    assert again.fits
    assert again.memory.total_bytes / 1e9 == pytest.approx(float(needs[1]), rel=0.02)


def test_a_job_that_nothing_helps_says_so(tmp_path: Path) -> None:
    found = _predicted(_written(tmp_path, "{dp: 1}", config=LARGE, length=128, batch=1)).forecast
    assert found is not None
    assert "add GPUs" in found.advice or "needs less" in found.advice


def test_more_replicas_share_the_batch(tmp_path: Path) -> None:
    loaded = load_job(_written(tmp_path, "{dp: 4, num_microbatches: 4}"))
    drawing = run_on_paper(loaded, deal_on_paper(loaded, model_on_meta(loaded)), hardware_of(loaded))
    points = scaling_of(drawing, loaded.job, hardware_of(loaded))
    assert [gpus for gpus, _ in points] == [1, 2, 4, 8, 16]
    assert points[2][1] == pytest.approx(forecast(drawing, loaded.job, hardware_of(loaded)).tokens_per_s)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_forecast_is_drawn(tmp_path: Path, ending: str) -> None:
    found = _predicted(_written(tmp_path, "{pp: 2, dp: 4, schedule: 1f1b, num_microbatches: 4}"), scaling=True)
    path = tmp_path / f"paper.{ending}"
    draw_forecast(found, path)
    assert path.stat().st_size > 10_000
    if ending == "svg":
        assert path.read_text().startswith("<?xml")


def test_the_command_writes_json_a_picture_and_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _written(tmp_path, "{pp: 2, dp: 4, schedule: 1f1b, num_microbatches: 4}")
    files = [str(tmp_path / name) for name in ("paper.png", "trace.json")]
    words = ["simulate", str(path), "--json", "--gpu", "A100", "--plot", files[0], "--trace", files[1]]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["forecast"]["gpu"] == "A100"
    assert told["forecast"]["fits"] is True
    assert len(told["scaling"]) > 1
    events = json.loads(Path(files[1]).read_text())["traceEvents"]
    ends = [each["ts"] + each["dur"] for each in events if each.get("ph") == "X"]
    step = told["forecast"]["seconds"]
    assert max(ends) / 1e6 <= told["forecast"]["step_s"] - step["optimizer_s"] + 1e-9


def test_a_model_that_asks_for_values_keeps_its_exact_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "asking_model.py").write_text(
        "import torch\n\n\nclass Asks(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.table = torch.nn.Embedding(300, 4)\n\n"
        "    def forward(self, input_ids, labels):\n"
        "        return self.table(input_ids[input_ids > 0]).sum()\n"
    )
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: asks\nmodel: {python: 'asking_model:Asks'}\ndata: {files: python-stdlib, sequence_length: 8}\n"
        "train: {steps: 1, batch_size: 4}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        found = mw.simulate(path)
        assert main(["simulate", str(path), "--plot", str(tmp_path / "none.png")]) == 65
    assert found.forecast is None
    assert found.parameter_bytes == 4 * 1200
    assert "activations and time are not predicted: the model cannot be run on shapes" in found.notes[-1]
    assert "--plot" in capsys.readouterr().err
