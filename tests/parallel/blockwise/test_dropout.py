"""Attention dropout: a function of numbers and positions, with the statistics of chance."""

from itertools import product
from typing import Any

import pytest
import torch

from meshwright.parallel.blockwise import masks
from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.biases import alibi
from meshwright.parallel.blockwise.dropout import kept
from meshwright.parallel.blockwise.masks import Frame
from tests.parallel.blockwise.dense import Given, dense_attention, elements, relative_error

_IDS = torch.tensor([[0] * 10 + [1] * 8 + [2] * 6, [0] * 3 + [1] * 21])
_MASKS = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.window(5, 2),
    "packed": masks.causal() & masks.documents(_IDS),
    "function": masks.function(lambda sample, head, query, key: (query + head - key) % 3 == sample),
}
_64, _32 = (1 << 64) - 1, (1 << 32) - 1


def _mixed_64(bits: int) -> int:
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _64
    return bits ^ bits >> 31


def _mixed_32(bits: int) -> int:
    bits = (bits ^ bits >> 16) * 0x85EBCA6B & _32
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 & _32
    return bits ^ bits >> 16


def _is_kept(seed: int, numbers: tuple[int, int, int], key: int, share: float) -> bool:
    golden, row = 0x9E3779B97F4A7C15, seed & _64
    for number in numbers:
        row = _mixed_64(row * golden + number & _64)
    column = _mixed_64(key * golden + ~seed & _64)
    return _mixed_32((row ^ column) & _32) ^ 1 << 31 >= round(share * 2**32)


@pytest.mark.parametrize("seed", [0, 1, 1 << 52, -3])
def test_the_hash_is_that_of_whole_numbers(seed: int) -> None:
    frame = Frame(range(2, 4), range(1, 4))
    queries, keys = range(5, 40, 7), range(100, 111)
    found = kept(queries, keys, frame, seed=seed, share=0.3, dtype=torch.float64)
    wanted = [
        _is_kept(seed, (sample, head, row), column, 0.3) / 0.7
        for sample, head, row, column in product(frame.batch, frame.heads, queries, keys)
    ]
    assert relative_error(found.flatten(), torch.tensor(wanted, dtype=torch.float64)) < 1e-15


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_kept_in_every_row_and_column_and_neighbours_are_independent(share: float) -> None:
    numbers = 512
    frame = Frame(range(2), range(2))
    alive = kept(range(numbers), range(numbers), frame, seed=11, share=share, dtype=torch.float64) > 0
    deviation = (share * (1 - share)) ** 0.5
    for dims in ((0, 1, 2, 3), (3,), (2,)):
        mean = alive.double().mean(dims)
        count = alive.numel() // mean.numel()
        assert float((mean - (1 - share)).abs().max()) < 4.5 * deviation / count**0.5
    centred = (alive.double() - (1 - share)) / deviation
    pairs = [(centred[..., 1:], centred[..., :-1]), (centred[..., 1:, :], centred[..., :-1, :])]
    pairs += [(centred[0], centred[1]), (centred[:, 0], centred[:, 1]), (centred, centred.mT)]
    diagonal = torch.eye(numbers, dtype=torch.bool)
    for one, other in pairs:
        products = one * other
        products = products.masked_fill(diagonal, 0.0) if one.shape == centred.shape else products
        assert abs(float(products.mean())) < 6 / products.numel() ** 0.5
    four = centred[..., :-1, :-1] * centred[..., 1:, 1:] * centred[..., 1:, :-1] * centred[..., :-1, 1:]
    assert abs(float(four.mean())) < 6 / four.numel() ** 0.5  # rows and columns are hashed apart, then together


def test_other_seeds_drop_others() -> None:
    masks_ = [kept(range(64), range(64), Frame(), seed=seed, share=0.5, dtype=torch.float32) > 0 for seed in range(9)]
    for seed, one in enumerate(masks_):
        agreeing = [float((one == other).double().mean()) for other in masks_[:seed]]
        assert all(abs(each - 0.5) < 0.05 for each in agreeing)


@pytest.mark.parametrize("mask", _MASKS)
def test_it_is_dropout_on_probabilities_with_any_blocks(mask: str) -> None:
    given = Given.random(lengths=(24, 24))
    allowed = elements(_MASKS[mask], range(24), range(24), batch=2, heads=4)
    factors = kept(range(24), range(24), Frame(range(2), range(4)), seed=7, share=0.3, dtype=torch.float64)
    expected, expected_lse = dense_attention(given, allowed=allowed, kept=factors)
    wanted = torch.autograd.grad(expected.square().sum(), given.all)
    for size in (40, 3):
        out, lse = attend(
            given.query, given.key, given.value, mask=_MASKS[mask], dropout_p=0.3, dropout_seed=7, with_lse=True,
            query_block=size, kv_block=size + 2,
        )  # fmt: skip
        assert relative_error(out, expected) <= 1e-12
        assert relative_error(lse, expected_lse) <= 1e-12
        found = torch.autograd.grad(out.square().sum(), given.all)
        assert max(relative_error(*pair) for pair in zip(found, wanted, strict=True)) <= 1e-12


@pytest.mark.parametrize(
    "positions",
    [[range(8, 16), range(16, 24), range(0, 8)], [range(0, 24, 3), range(1, 24, 3), range(2, 24, 3)]],
    ids=["chunks", "stripes"],
)
@pytest.mark.parametrize("mask", _MASKS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_where_tokens_stand_is_told_by_positions(positions: list[range], mask: str, dropout_p: float) -> None:
    given = Given.random(lengths=(24, 24))
    options: dict[str, Any] = {"mask": _MASKS[mask], "dropout_p": dropout_p, "dropout_seed": 5}
    if mask != "none":
        options["bias"] = alibi(torch.ones(4))
    order = torch.tensor([each for piece in positions for each in piece])
    dealt = [each[:, :, order] for each in given.all]
    plain = attend(given.query, given.key, given.value, **options)
    found = attend(*dealt, query_positions=positions, key_positions=positions, **options)
    assert relative_error(found, plain[:, :, order]) <= 1e-12


def test_it_follows_the_generator_of_torch() -> None:
    given = Given.random()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(attend(given.query, given.key, given.value, dropout_p=0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    state = torch.get_rng_state()
    attend(given.query, given.key, given.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rank_with_some_samples_and_heads_drops_what_the_plain_run_drops() -> None:
    given = Given.random(heads=(4, 4))
    options: dict[str, Any] = {"dropout_p": 0.5, "dropout_seed": 7}
    whole = attend(given.query, given.key, given.value, **options)
    own = [each[1:, 2:] for each in given.all]
    assert relative_error(attend(*own, **options, first_sample=1, first_head=2), whole[1:, 2:]) <= 1e-12


def test_dropping_everything_gives_zeros() -> None:
    given = Given.random()
    out = attend(given.query, given.key, given.value, dropout_p=1.0)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), given.query)[0].any()
