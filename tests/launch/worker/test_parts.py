"""The small parts of the training program: rates, groups, figures, records, random states, errors."""

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from meshwright.launch.worker.__main__ import exit_code_of
from meshwright.launch.worker.errors import CheckpointError, CorpusError, ModelBuildError
from meshwright.launch.worker.flops import count_flops, measure_peak_flops_per_s
from meshwright.launch.worker.measure import Meter
from meshwright.launch.worker.metrics import MetricsFile, peak_memory_bytes, progress_line
from meshwright.launch.worker.model import build_model, import_function
from meshwright.launch.worker.optimizer import build_adamw, decay_of, set_rate
from meshwright.launch.worker.plot import plot_losses
from meshwright.launch.worker.rng import capture_random_states, restore_random_states
from meshwright.launch.worker.schedule import LearningRate
from meshwright.launch.worker.text import load_text
from meshwright.parallel.deferred import materialise


def test_the_rate_rises_then_falls_to_its_floor() -> None:
    rate = LearningRate(peak=2.0, steps=100, warmup_steps=10, min_ratio=0.1)
    values = [rate.at(step) for step in range(1, 101)]
    assert values[:10] == [pytest.approx(0.2 * step) for step in range(1, 11)]
    assert values[9:] == sorted(values[9:], reverse=True)
    assert values[-1] == pytest.approx(0.2)
    assert LearningRate(peak=2.0, steps=5, decay="constant").at(5) == 2.0


def test_matrices_decay_and_vectors_do_not() -> None:
    settings = decay_of(0.1)
    assert settings("w", torch.zeros(2, 2)) == {"weight_decay": 0.1}
    assert settings("b", torch.zeros(2)) == {"weight_decay": 0.0}
    optimizer = build_adamw(1.0, (0.9, 0.95), 1e-8)([nn.Parameter(torch.zeros(2))])
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]


def test_attention_is_counted_under_both_conventions() -> None:
    query = torch.zeros(1, 2, 4, 8)
    with count_flops() as counted:
        nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    full = 3 * 2 * 2 * 4 * 4 * (8 + 8)  # backward twice the forward, 2 per multiply-add, heads, queries, keys, dims
    assert (counted().full, counted().causal) == (full, full * 10 / 16)


def test_linear_layers_cost_six_flops_per_parameter_and_token() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    with count_flops() as counted:
        model(torch.zeros(5, 8))
    assert counted().per_token(5).full == 6 * sum(each.numel() for each in model.parameters())
    assert measure_peak_flops_per_s(torch.device("cpu"), torch.float32, budget_s=0.01) > 1e8


def test_metrics_of_a_resumed_run_start_with_those_of_its_checkpoint(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.restart([{"step": 1}])
    metrics.write({"step": 2})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == metrics.history
    assert metrics.history == [{"step": 1}, {"step": 2}]
    assert "validation 1.5000" in progress_line({"step": 2, "validation_loss": 1.5}, 10)
    assert peak_memory_bytes(torch.device("cpu")) > 1 << 20


def test_times_between_readings_are_means_over_steps() -> None:
    meter = Meter(torch.device("cpu"), torch.float32, num_ranks=1)
    assert meter.needs_peak
    with pytest.raises(AssertionError, match="count first"):
        meter.read()
    tokens = torch.tensor([[0, 1, 2], [3, 0, 1]])
    meter.count(_Normed(), {"input_ids": tokens, "labels": tokens})
    meter.measure_peak()
    for read, places in ((6, 8), (10, 12)):
        meter.tick(read, places)
    found = meter.read()
    assert (found["tokens_per_step"], found["padding_ratio"]) == (8.0, 0.2)
    assert "padding 20.0%" in progress_line({"step": 1, **found}, 10)


class _Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = torch.nn.Embedding(4, 8), torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = self.head(self.norm(self.table(input_ids).flatten(0, 1)))
        return torch.nn.functional.cross_entropy(scores, labels.flatten())


def test_counting_flops_is_no_training_step() -> None:
    model, tokens = _Normed(), torch.tensor([[0, 1, 2], [3, 0, 1]])
    meter = Meter(torch.device("cpu"), torch.float32, num_ranks=1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    meter.count(model, {"input_ids": tokens, "labels": tokens})
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert meter._per_token is not None
    assert meter._per_token.full == 3 * 2 * 8 * 4  # one matrix of 8 x 4, forward and backward, per token


def test_random_states_return_on_every_generator() -> None:
    import random

    import numpy as np

    states = json.loads(json.dumps(capture_random_states()))
    first = (random.random(), float(np.random.rand()), float(torch.rand(1)))
    restore_random_states(states)
    assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == first


def test_a_curve_is_drawn_and_an_empty_one_is_not(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'plots' is not installed")
    records = [{"step": step, "loss": 5.0 / step, "tokens": 10 * step} for step in range(1, 5)]
    assert plot_losses([*records, {"step": 4, "validation_loss": 1.0}], tmp_path / "loss.png", title="t") is None
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert plot_losses([], tmp_path / "none.png", title="t") == "no step was logged"


def test_models_come_from_an_architecture_or_a_function() -> None:
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    spec = {"architecture": "llama", "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}}
    one, same = (build_model(spec, vocab_size=257, seed=3, dtype=torch.float64) for _ in range(2))
    assert one.config.vocab_size == 257
    pairs = zip(materialise(one).parameters(), materialise(same).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert {each.dtype for each in one.parameters()} == {torch.float64}
    linear = build_model(
        {"python": "torch.nn:Linear", "arguments": {"in_features": 2, "out_features": 3}}, vocab_size=9, seed=0
    )
    assert tuple(linear.weight.shape) == (3, 2)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"architecture": "lama"}, "did you mean 'llama'?"),
        ({"architecture": "llama", "config": {"vocab_size": 100}}, "smaller than the 257 tokens"),
        (
            {"architecture": "llama", "config": {"hiden_size": 64}},
            "knows no 'hiden_size'; did you mean 'hidden_size'?",
        ),
        ({"architecture": "gpt2", "config": {"n_laier": 64}}, "did you mean 'n_layer'?"),
        ({"python": "nowhere:build"}, "'nowhere' cannot be imported"),
        ({"python": "torch.nn:Linaer"}, "did you mean 'Linear'?"),
        ({"python": "torch.nn:Linear", "arguments": {"in": 2}}, "failed"),
        ({"python": "math:sqrt", "arguments": {}}, "failed"),
        ({"path": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(spec: dict, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelBuildError) as caught:
        build_model(spec, vocab_size=257, seed=0)
    assert text in str(caught.value)
    with pytest.raises(ModelBuildError):
        import_function("math:nothing")


def test_settings_that_only_a_models_code_knows_are_kept() -> None:
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "rope_theta": 5e3, "my_own": 3}
    assert build_model({"architecture": "llama", "config": small}, vocab_size=257, seed=0).config.my_own == 3


def test_text_is_shared_by_data_rank_and_fingerprinted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} " * 200)
    data = {
        "files": [str(tmp_path / "*.txt")],
        "tokenizer": "bytes",
        "sequence_length": 16,
        "validation_fraction": 0.5,
        "max_bytes": None,
    }
    text = load_text(data, seed=0, batch_size=4)
    whole = text.training_batch(3, 0, 1)["input_ids"]
    parts = [text.training_batch(3, rank, 2)["input_ids"] for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    assert text.validation_batch(0, 0, 1)["input_ids"].shape == (4, 16)
    assert text.fingerprint() != load_text(data, seed=1, batch_size=4).fingerprint()
    with pytest.raises(CorpusError, match=r"fewer than data\.sequence_length=5000"):
        load_text({**data, "sequence_length": 5000}, seed=0, batch_size=4)


def test_validation_draws_from_all_held_out_documents_alike_in_every_run(tmp_path: Path) -> None:
    for number in range(64):
        (tmp_path / f"{number}.txt").write_text(chr(64 + number) * 15)  # with its separator, one window
    data = {
        "files": [str(tmp_path / "*.txt")],
        "tokenizer": "bytes",
        "sequence_length": 16,
        "validation_fraction": 0.5,
        "max_bytes": None,
    }
    text = load_text(data, seed=0, batch_size=4)
    assert text.validation is not None
    letters = [text.validation_batch(number, 0, 1)["input_ids"][:, 0].tolist() for number in range(8)]
    stored = text.validation.batch(range(32))["input_ids"][:, 0].tolist()
    assert sorted(letter for batch in letters for letter in batch) == sorted(stored), "every window once"
    assert set(letters[0] + letters[1]) & set(stored[16:]), "few batches do not stay with the first documents"
    shares = [text.validation_batch(3, rank, 2)["input_ids"][:, 0].tolist() for rank in range(2)]
    assert shares[0] + shares[1] == letters[3]
    other = load_text(data, seed=7, batch_size=4)
    assert other.validation_batch(0, 0, 1)["input_ids"][:, 0].tolist() == letters[0]


def test_exit_codes_tell_who_can_mend_it() -> None:
    assert exit_code_of(ModelBuildError("x")) == 65
    assert exit_code_of(CheckpointError("x")) == 74
    assert exit_code_of(OSError(errno.ENOSPC, "full")) == 74
    assert exit_code_of(KeyError("x")) == 1
