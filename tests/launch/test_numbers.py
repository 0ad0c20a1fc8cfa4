"""A model's numbers are those of its config, by whatever names, and as many parameters as the model has."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from meshwright.clusters.simulated import Transformer
from meshwright.launch.errors import JobError
from meshwright.launch.load import load_job
from meshwright.launch.numbers import numbers_of, read_numbers

JOB = """
name: tiny
model: {{architecture: {architecture}, config: {config}}}
data: {{files: python-stdlib, sequence_length: 64}}
train: {{steps: 1, batch_size: 8}}
"""
CONFIGS = {
    "llama": "{hidden_size: 64, intermediate_size: 96, num_hidden_layers: 3, num_attention_heads: 4, "
    "num_key_value_heads: 2}",
    "gpt2": "{n_embd: 64, n_layer: 3, n_head: 4}",
    "gpt_neox": "{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 3, num_attention_heads: 4}",
    "opt": "{hidden_size: 64, ffn_dim: 128, num_hidden_layers: 3, num_attention_heads: 4, word_embed_proj_dim: 64}",
    "bloom": "{hidden_size: 64, n_layer: 3, n_head: 4}",
    "mixtral": "{hidden_size: 64, intermediate_size: 96, num_hidden_layers: 3, num_attention_heads: 4, "
    "num_key_value_heads: 2, num_local_experts: 4}",
    "qwen3_moe": "{hidden_size: 64, moe_intermediate_size: 32, num_hidden_layers: 3, num_attention_heads: 4, "
    "num_key_value_heads: 2, num_experts: 4, num_experts_per_tok: 2, head_dim: 16}",
}
FFN = {"llama": 96, "gpt2": 256, "gpt_neox": 128, "opt": 128, "bloom": 256, "mixtral": 96, "qwen3_moe": 32}


def _numbers(folder: Path, architecture: str, **given: int) -> tuple[Transformer, tuple[str, ...]]:
    path = folder / "job.yaml"
    path.write_text(JOB.format(architecture=architecture, config=CONFIGS[architecture]))
    return numbers_of(load_job(path), given)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_numbers_of_any_family_are_read(tmp_path: Path, architecture: str) -> None:
    found, notes = _numbers(tmp_path, architecture)
    assert (found.layers, found.hidden, found.heads, found.sequence) == (3, 64, 4, 64)
    assert (found.kv_heads, found.ffn) == (2 if "kv_heads" not in " ".join(notes) else 4, FFN[architecture])
    assert found.gated == (architecture in ("llama", "mixtral", "qwen3_moe"))
    assert (found.experts, found.top_k) == ((4, 2) if architecture in ("mixtral", "qwen3_moe") else (0, 0))
    assert found.vocab >= 257


def test_what_the_config_does_not_say_is_noted(tmp_path: Path) -> None:
    _, notes = _numbers(tmp_path, "gpt2")
    assert any(note.startswith("ffn 256: four times hidden") for note in notes)
    assert any(note.startswith("kv_heads 4: as many as heads") for note in notes)


def test_numbers_that_are_given_stand_over_the_config(tmp_path: Path) -> None:
    found, notes = _numbers(tmp_path, "llama", layers=30)
    assert found.layers == 30
    assert "what else they have" in notes[-1], "the model itself has three"


def test_what_cannot_be_read_is_named_with_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"does not say layers, heads .*--with layers=NUMBER and --with heads=NUMBER"):
        read_numbers(SimpleNamespace(d_model=8, vocab_size=9), sequence=4)
    found, _ = read_numbers(SimpleNamespace(d_model=8, vocab_size=9), sequence=4, given={"layers": 1, "heads": 2})
    assert (found.hidden, found.heads) == (8, 2)


def test_a_job_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: own\ncommand: [train]\n")
    with pytest.raises(JobError, match="give it model"):
        numbers_of(load_job(tmp_path / "job.yaml"), {})
