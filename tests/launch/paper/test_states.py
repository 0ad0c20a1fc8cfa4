"""Memory that a job is forecast to need is what the runtime's own rank holds at most, run without values."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import meshwright as mw
from meshwright.launch.load import load_job
from meshwright.launch.rehearse import model_on_meta, settled_on_meta
from meshwright.parallel.fake_rank import fake_rank
from tests.clusters.test_calibration import known_machine

LLAMA = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
LENGTH = 64


def _job(folder: Path, parallel: dict[str, Any], *, architecture: str, config: dict[str, Any], batch: int) -> Path:
    path = folder / "job.yaml"
    told = {
        "name": "peaks",
        "model": {"architecture": architecture, "config": config},
        "data": {"files": "python-stdlib", "tokenizer": "bytes", "sequence_length": LENGTH},
        "parallel": parallel,
        "train": {"steps": 1, "batch_size": batch, "clip_norm": None},
    }
    path.write_text(yaml.safe_dump(told))
    return path


def _forecast_over_held(folder: Path, parallel: dict[str, Any], **told: Any) -> float:
    """Of the fullest rank of the pipeline; optimizer states aside."""
    path, entry = _job(folder, parallel, **told), folder / "machine.yaml"
    entry.write_text(known_machine(), encoding="utf-8")
    found = mw.simulate(path, gpu=entry).forecast
    assert found is not None
    loaded = load_job(path)
    model = model_on_meta(loaded)
    mesh, options = loaded.job.mesh, settled_on_meta(loaded, model)
    assert options.example is not None
    batch = [options.example] * options.num_microbatches
    keywords: dict[str, Any] = {**loaded.job.options, "example": options.example}
    firsts = range(0, mesh.world_size, mesh.world_size // mesh.pp)
    held = max(fake_rank(model, mesh, rank, batch=batch, **keywords).memory.peak_bytes for rank in firsts)
    return (found.memory.tensor_bytes - found.memory.optimizer) / held


LAYERED = {"schedule": "layered", "num_microbatches": 4}
CELLS = [
    ("llama", LLAMA, {"dp": 2, "num_microbatches": 2}),
    ("llama", LLAMA, {"fsdp": 4, "num_microbatches": 2}),
    ("llama", LLAMA, {"fsdp": 4, "num_microbatches": 2, "zero_stage": 1}),
    ("llama", LLAMA, {"fsdp": 4, **LAYERED, "zero_stage": 1}),
    ("llama", LLAMA, {"pp": 2, "schedule": "1f1b", "num_microbatches": 4}),
    ("gpt2", GPT2, {"dp": 2, **LAYERED}),  # tied, and dropping in attention
    ("gpt2", GPT2, {"fsdp": 4, **LAYERED, "recompute": "blocks"}),
    ("gpt2", GPT2, {"pp": 2, "fsdp": 2, "schedule": "modular", "num_microbatches": 4}),
]


@pytest.mark.parametrize(
    ("architecture", "config", "parallel"),
    CELLS,
    ids=[f"{name}, {', '.join(map(str, parallel.items()))}" for name, _, parallel in CELLS],
)
def test_the_peak_is_forecast(
    tmp_path: Path, architecture: str, config: dict[str, Any], parallel: dict[str, Any]
) -> None:
    batch = 2 * parallel.get("dp", 1) * parallel.get("fsdp", 1) * parallel["num_microbatches"]
    found = _forecast_over_held(tmp_path, parallel, architecture=architecture, config=config, batch=batch)
    assert found == pytest.approx(1, abs=0.05)
