"""Unpadding and back, packed rows equal to padded batches, partial sorting, balanced parts."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from meshwright.parallel.errors import BatchError
from meshwright.parallel.promote import Promote
from meshwright.parallel.ragged import balance, pad_back, padding_ratio, positions, sort_batches, unpad, unpad_batch

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "llama": {**SHAPE, "num_key_value_heads": 2},
    "qwen3": {**SHAPE, "num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {**SHAPE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "gpt2": {**GPT2, "bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": SHAPE,
}


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(0, 2))
def test_padding_back_is_the_inverse_wherever_padding_stands(kept: list[list[bool]], extra_dims: int) -> None:
    mask = torch.tensor(kept)
    padded = torch.rand(*mask.shape, *[3] * extra_dims) * mask.reshape(*mask.shape, *[1] * extra_dims)
    values, cu_seqlens, indices = unpad(padded, mask)
    assert len(values) == int(mask.sum())
    assert torch.equal(pad_back(values, indices, (len(kept), 6)), padded)
    for row, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        assert torch.equal(values[start:end], padded[row][mask[row]])
    expected = [place for row in kept for place in range(sum(row))]
    assert positions(cu_seqlens).tolist() == expected


def test_gradients_go_through_both_ways() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    padded = torch.rand(2, 3, 4, requires_grad=True)
    found = unpad(padded, mask)
    (pad_back(found.values * 2, found.indices, (2, 3)) * 3).sum().backward()
    assert padded.grad is not None
    assert torch.equal(padded.grad, 6.0 * mask[:, :, None].expand(2, 3, 4))


def _padded(lengths: list[int], vocabulary: int = 50) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(0, vocabulary, mask.shape, generator=generator) * mask
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def _alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    length = int(batch["attention_mask"][row].sum())
    return {name: batch[name][row : row + 1, :length] for name in ("input_ids", "labels")}


def _step(model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, list[Tensor]]:
    """Token-weighted loss and gradients of some batches."""
    model.zero_grad()
    items = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = 0.0
    with Promote():
        for batch, count in zip(batches, items, strict=True):
            if count:
                loss = model(**batch).loss * (count / sum(items))
                loss.backward()
                total += float(loss.detach())
    return total, [each.grad.clone() for each in model.parameters() if each.grad is not None]


def _error(one: list[Tensor], other: list[Tensor]) -> float:
    scale = max(float(each.abs().max()) for each in one)
    pairs = zip(one, other, strict=True)
    return max(float((a - b).abs().max() / max(float(a.abs().max()), 1e-6 * scale)) for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_has_the_loss_and_gradients_of_the_padded_batch_and_of_its_documents(family: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=50, use_cache=False, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).double().train()
    padded = _padded([5, 9, 1, 2, 12, 7])
    loss, gradients = _step(model, [padded])
    for same in ([unpad_batch(padded)], [_alone(padded, row) for row in range(6)]):
        found, others = _step(model, same)
        assert found == pytest.approx(loss, rel=1e-12)
        assert _error(gradients, others) <= 1e-12


def test_a_batch_padded_on_the_left_gives_the_same_row() -> None:
    right = _padded([3, 5, 1])
    left = {name: torch.stack([row.roll(shift) for row, shift in zip(each, (2, 0, 4), strict=True)])
            for name, each in right.items()}  # fmt: skip
    one, other = unpad_batch(right), unpad_batch(left)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_no_padded_batch_is_refused() -> None:
    with pytest.raises(BatchError, match="the batch holds labels and no attention_mask"):
        unpad_batch({"labels": torch.zeros(2, 3)})
    with pytest.raises(BatchError, match=r"mask of shape \(2, 3\) does not fit a tensor of shape \(2, 4\)"):
        unpad_batch({"labels": torch.zeros(2, 4), "attention_mask": torch.ones(2, 3)})
    with pytest.raises(BatchError, match="max_tokens=0 holds nothing"):
        sort_batches([1], batch_size=1, max_tokens=0)


@given(LENGTHS, st.integers(1, 9), st.none() | st.integers(1, 12), st.integers(0, 9), st.none() | st.integers(1, 200))
def test_an_epoch_holds_every_sequence_once_within_its_limits(
    lengths: list[int], size: int, window: int | None, seed: int, max_tokens: int | None
) -> None:
    batches = sort_batches(lengths, batch_size=size, window=window, seed=seed, max_tokens=max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert max_tokens is None or len(batch) == 1 or len(batch) * max(lengths[each] for each in batch) <= max_tokens
    assert batches == sort_batches(lengths, batch_size=size, window=window, seed=seed, max_tokens=max_tokens)


def test_padding_falls_with_the_window_and_batches_stay_shuffled() -> None:
    lengths = (
        (torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 0.8 + 4).exp().int().clamp(1, 999).tolist()
    )
    ratios = []
    for window in (1, 4, 16, 64, None):
        found = [sort_batches(lengths, batch_size=16, window=window, seed=seed) for seed in range(5)]
        ratios.append(sum(padding_ratio([[lengths[i] for i in batch] for batch in each]) for each in found) / 5)
    assert all(wider < 0.8 * narrower for narrower, wider in pairwise(ratios)), ratios
    assert ratios[0] > 0.5
    assert ratios[-1] < 0.05
    longest = [max(lengths[index] for index in batch) for batch in sort_batches(lengths, batch_size=16, window=None)]
    assert longest != sorted(longest)
    assert padding_ratio([]) == 0.0


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 9))
@example([0, 0], 2)
def test_every_sequence_is_in_one_part_and_no_part_is_empty_without_need(lengths: list[int], parts: int) -> None:
    dealt = balance(lengths, parts)
    assert sorted(index for part in dealt for index in part) == list(range(len(lengths)))
    assert all(dealt) or len(lengths) < parts
    assert all(part == sorted(part) for part in dealt)
    assert dealt == balance(lengths, parts)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(1, 3))
def test_the_largest_part_is_within_grahams_bound_of_the_best(lengths: list[int], parts: int) -> None:
    ways = product(range(parts), repeat=len(lengths))
    best = min(
        max(sum(n for n, at in zip(lengths, way, strict=True) if at == part) for part in range(parts)) for way in ways
    )
    largest = max(sum(lengths[index] for index in part) for part in balance(lengths, parts))
    assert best <= largest <= (4 / 3 - 1 / (3 * parts)) * best + 1e-9
