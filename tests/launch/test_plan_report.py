"""`meshwright plan` as it is typed: a table for people, one JSON object for machines, a picture, keys of a job."""

import json
from pathlib import Path

import pytest
import yaml

from meshwright.launch.cli import main
from meshwright.launch.load import load_job

JOB = """
name: billion
model:
  architecture: llama
  config: {hidden_size: 2048, intermediate_size: 5632, num_hidden_layers: 22, num_attention_heads: 32,
           num_key_value_heads: 4, vocab_size: 32000}
data: {files: python-stdlib, sequence_length: 2048}
train: {steps: 1, batch_size: 256}
"""


@pytest.fixture
def job(tmp_path: Path) -> str:
    (tmp_path / "job.yaml").write_text(JOB)
    return str(tmp_path / "job.yaml")


def test_the_text_has_a_table_reasons_and_keys_that_load(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--gpu", "A100", "--gpus", "64", "--with", "tokens=1e12", "--with", "show=3"]) == 0
    text = capsys.readouterr().out
    assert "billion: 1,100,048,384 parameters, 22 layers of 2048, 2048 tokens; 64 x A100" in text
    assert "against the first" in text
    assert "1e+12 tokens take" in text
    assert "the first with one thing changed:" in text
    keys = yaml.safe_load(text.partition("in the job:\n")[2])
    assert keys["train"]["batch_size"] == 256
    told = yaml.safe_load(JOB)
    told["parallel"], told["train"] = keys["parallel"], {**told["train"], **keys["train"]}
    Path(job).write_text(yaml.safe_dump(told))
    assert load_job(job).job.mesh.world_size == 64


def test_json_holds_all_of_it(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--gpu", "A100", "--gpus", "32", "--with", "networks=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layouts"]["seen"] == sum(found["layouts"][name] for name in ("pruned", "too_large", "priced"))
    first, *others = found["best"]
    assert first["slower_by"] == 0
    assert all(each["slower_by"] >= 0 for each in others)
    assert sum(first["causes_s"].values()) == pytest.approx(first["step_s"])
    assert first["job"]["train"]["batch_size"] == 256
    assert 0 < found["sufficient_network_bytes_per_s"] <= found["network_bytes_per_s"] == 25e9
    assert found["nearest"] is None


def test_what_does_not_fit_says_by_how_much_and_what_would(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--gpu", "A100", "--gpus", "1", "--with", "memory=20"]) == 0
    text = capsys.readouterr().out
    assert "nothing fits: the nearest, one GPU with " in text
    assert " of 20.0 GB, " in text
    assert "fits with 2 GPUs instead of 1" in text
    assert main(["plan", job, "--gpu", "A100", "--gpus", "37", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] == []
    assert main(["plan", job, "--gpu", "A100", "--gpus", "37"]) == 0
    assert "no layout is legal: 37 GPUs" in capsys.readouterr().out


def test_a_plan_that_is_tight_says_so(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--gpu", "A100", "--gpus", "8", "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["best"][0]["memory_bytes"]
    assert main(["plan", job, "--gpu", "A100", "--gpus", "8", "--with", f"memory={needed / 1e9 + 0.01:.3f}"]) == 0
    assert "is tight" in capsys.readouterr().out


def test_limits_may_leave_gpus_and_batch_unused(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--gpu", "A100", "--gpus", "37", "--with", "at_most=1"]) == 0
    text = capsys.readouterr().out
    assert "at most 37 x A100, steps of at most 256 sequences" in text
    assert "in the job:" in text


def test_mistakes_end_with_the_code_of_a_wrong_job(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--gpu", "H10O"]) == 65
    assert "nearest: 'H100'" in capsys.readouterr().err
