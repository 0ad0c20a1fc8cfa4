"""Memory of a rank, forecast and run: spans, masks, dropped and capped scores, halves of backwards, receives, hosts."""

from pathlib import Path

import pytest
import yaml

import meshwright as mw
from benchmarks import fake_ranks
from benchmarks.predicted import VOCABULARY
from benchmarks.predicted_jobs import Small
from meshwright.launch.load import load_job
from tests.clusters.test_calibration import known_machine

GPT2 = {"n_embd": 192, "n_layer": 3, "n_head": 6, "n_positions": 256}
HOSTED = {"schedule": "layered", "num_microbatches": 4, "recompute": "blocks", "offload_inputs": True}
REMADE = {"schedule": "layered", "num_microbatches": 2, "recompute": "blocks"}
GEMMA3 = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "sliding_window": 128, "max_position_embeddings": 384,
}  # fmt: skip
NEOX = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
    "max_position_embeddings": 384,
}  # fmt: skip
LLAMA = {**Small(parallel={}).config, "num_hidden_layers": 3}  # a first, one in between and a last
JOBS = {
    "spans": Small(parallel={"dp": 2, "blockwise": {"layer_block": 64}}, config=LLAMA),
    "spans that drop": Small(parallel={"dp": 2, "blockwise": {"layer_block": 64}}, architecture="gpt2", config=GPT2),
    "inputs": Small(parallel={"dp": 2, **HOSTED}, config=LLAMA),
    "inputs of a pipeline": Small(parallel={"pp": 2, **HOSTED, "schedule": "1f1b"}),
    "states": Small(parallel={"fsdp": 2, "offload": "cpu", "num_microbatches": 2}, config=LLAMA),
    "feed-forward and loss by blocks": Small(
        parallel={"dp": 2, "blockwise": {"ffn_block": 64, "loss_block": 64}}, config=LLAMA
    ),
    "shards and spans": Small(
        parallel={"fsdp": 2, **HOSTED, "num_microbatches": 2, "blockwise": {"layer_block": 64, "loss_block": 64}},
        config=LLAMA,
    ),
    "attention that drops, by blocks": Small(
        parallel={"dp": 2, **REMADE, "blockwise": {"ffn_block": 32}}, architecture="gpt2", config=GPT2
    ),
    "attention under masks": Small(
        parallel={"fsdp": 2, **REMADE}, architecture="gemma3_text", config=GEMMA3, length=320
    ),
    "halves of backwards": Small(parallel={"pp": 2, "schedule": "zb-h1", "num_microbatches": 4}),
    "halves of stages that turn": Small(parallel={"pp": 2, "schedule": "zbv", "num_microbatches": 4}),
    "receives ahead of time": Small(
        parallel={"pp": 2, "schedule": "1f1b", "num_microbatches": 4}, architecture="gpt_neox", config=NEOX
    ),
    "capped attention, dealt": Small(
        parallel={"cp": 2, "num_microbatches": 2}, architecture="gemma2", config=GEMMA3, length=320
    ),
    "capped attention, by blocks": Small(
        parallel={"dp": 2, "blockwise": {"query_block": 64, "kv_block": 64}}, architecture="gemma2", config=GEMMA3
    ),
    "inputs of spans": Small(parallel={"dp": 2, **HOSTED, "blockwise": {"layer_block": 64}}),
}


def _drawn_up(small: Small, folder: Path) -> tuple[Path, fake_ranks.Job]:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(small.file(steps=1)))
    job = load_job(path).job
    return path, fake_ranks.Job(
        job.mesh.degrees(), job.options, small.build, samples=small.batch_size // job.mesh.data_degree,
        length=small.length, vocabulary=VOCABULARY,
    )  # fmt: skip


def _tensor_bytes(path: Path, kind: Path | str) -> float:
    found = mw.simulate(path, gpu=kind).forecast
    assert found is not None
    return found.memory.tensor_bytes - found.memory.optimizer


_WIDE = ("inputs of spans",)  # as in "shards and spans"


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.wide] * (each in _WIDE)) for each in JOBS])
def test_memory_on_paper_is_that_of_a_run_here(name: str, tmp_path: Path) -> None:
    path, job = _drawn_up(JOBS[name], tmp_path)
    entry = tmp_path / "machine.yaml"
    entry.write_text(known_machine(), encoding="utf-8")
    most = max(peak_bytes for _, peak_bytes in fake_ranks.real_ranks(job))
    assert _tensor_bytes(path, entry) == pytest.approx(most, rel=0.05)
