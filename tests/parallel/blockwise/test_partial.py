"""Halves of attention over chunks of keys: merged and added up, they are attention."""

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.parallel.blockwise import masks
from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.biases import alibi
from meshwright.parallel.blockwise.chunk import Chunk
from meshwright.parallel.blockwise.merge import merge
from meshwright.parallel.blockwise.partial import Gradients, Upstream, partial_backward, partial_forward
from meshwright.parallel.blockwise.positions import pieces_of
from meshwright.parallel.blockwise.scoring import Scoring
from meshwright.parallel.errors import WrapError
from tests.parallel.blockwise.dense import Given, relative_error

_SIZE, _RANKS = 48, 4
_IDS = torch.arange(_SIZE)[None] // torch.tensor([[9], [20]])
_LAYOUTS = {
    "contiguous": [[range(12 * rank, 12 * rank + 12)] for rank in range(_RANKS)],
    "zigzag": [[range(6 * rank, 6 * rank + 6), range(42 - 6 * rank, 48 - 6 * rank)] for rank in range(_RANKS)],
    "striped": [[range(rank, _SIZE, _RANKS)] for rank in range(_RANKS)],
    "uneven": [[range(5)], [range(5, 31), range(40, 48)], [range(31, 40)], []],
}
_SCORINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"mask": masks.causal()},
    "window": {"mask": masks.causal() & masks.window(10)},
    "packed": {"mask": masks.causal() & masks.documents(_IDS)},
    "function": {"mask": masks.function(lambda b, h, q, k: (q + k + h) % 3 != b)},
    "capped": {"mask": masks.causal(), "softcap": 2.0, "bias": alibi(torch.tensor([0.5, 0.1, 0.2, 0.3]).double())},
    "dropped": {"mask": masks.causal(), "dropout_p": 0.3, "dropout_seed": 9},
}


def _chunks(given: Given, layout: list[list[range]], rank: int) -> list[Chunk]:
    """The queries of one rank with the keys of each."""
    at = [torch.tensor([each for piece in pieces for each in piece], dtype=torch.long) for pieces in layout]
    pieces = [pieces_of(each, len(here), "tokens") for each, here in zip(layout, at, strict=True)]
    query, key, value = (each.detach() for each in given.all)
    return [
        Chunk(query[:, :, at[rank]], key[:, :, here], value[:, :, here], queries=pieces[rank], keys=theirs)
        for here, theirs in zip(at, pieces, strict=True)
    ]


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("scoring", _SCORINGS)
def test_every_rank_has_its_rows_and_all_gradients_add_up(scoring: str, layout: str) -> None:
    given, places = Given.random(lengths=(_SIZE, _SIZE)), _LAYOUTS[layout]
    out, lse = attend(given.query, given.key, given.value, with_lse=True, **_SCORINGS[scoring])
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    alive = lse.isfinite()
    wanted = torch.autograd.grad((out * grad_out).sum() + (lse * grad_lse)[alive].sum(), given.all)
    found = [torch.zeros_like(each) for each in wanted]
    for rank, pieces in enumerate(places):
        here = torch.tensor([each for piece in pieces for each in piece], dtype=torch.long)
        chunks, made = _chunks(given, places, rank), Scoring(**_SCORINGS[scoring], query_block=8, kv_block=7)
        result = None
        for chunk in chunks[rank:] + chunks[:rank]:
            result = partial_forward(chunk, made, so_far=result)
        assert result is not None
        assert relative_error(result.out, out[:, :, here]) <= 1e-12
        assert relative_error(result.lse, lse[:, :, here]) <= 1e-12
        upstream = Upstream(grad_out[:, :, here], grad_lse[:, :, here], *result)
        for number, chunk in enumerate(chunks):
            there = torch.tensor([each for piece in places[number] for each in piece], dtype=torch.long)
            with torch.no_grad():
                gradients = partial_backward(chunk, made, upstream)
            found[0][:, :, here] += gradients.query
            found[1][:, :, there] += gradients.key
            found[2][:, :, there] += gradients.value
    assert max(relative_error(*pair) for pair in zip(found, wanted, strict=True)) <= 1e-12


def test_chunks_may_come_in_any_order_and_be_merged_later() -> None:
    given = Given.random(lengths=(_SIZE, _SIZE))
    chunks, scoring = _chunks(given, _LAYOUTS["zigzag"], 1), Scoring(mask=masks.causal())
    parts = [partial_forward(chunk, scoring) for chunk in chunks]
    first = merge(merge(parts[0], parts[1]), merge(parts[2], parts[3]))
    for one, two, three, four in permutations(parts):
        assert relative_error(merge(merge(merge(one, two), three), four).out, first.out) <= 1e-14


def test_gradients_are_added_to_those_of_other_chunks() -> None:
    given = Given.random(lengths=(_SIZE, _SIZE))
    chunk, scoring = _chunks(given, _LAYOUTS["contiguous"], 1)[0], Scoring()
    result = partial_forward(chunk, scoring)
    upstream = Upstream(torch.ones_like(result.out), None, *result)
    once = partial_backward(chunk, scoring, upstream)
    so_far = Gradients(once.query.clone(), once.key.clone(), once.value.clone(), None)
    twice = partial_backward(chunk, scoring, upstream, so_far=so_far)
    assert twice is so_far
    assert torch.allclose(twice.key, once.key * 2)


def test_half_precision_is_gathered_in_single() -> None:
    given = Given.random(lengths=(_SIZE, _SIZE), dtype=torch.bfloat16)
    chunk = _chunks(given, _LAYOUTS["contiguous"], 1)[0]
    result = partial_forward(chunk, Scoring())
    gradients = partial_backward(chunk, Scoring(), Upstream(result.out.bfloat16(), None, *result))
    tensors: list[Tensor] = [*result, gradients.query, gradients.key, gradients.value]
    assert {each.dtype for each in tensors} == {torch.float32}


@pytest.mark.parametrize("positions", [range(3), [range(2), range(3)], range(-1, 3), range(4, 0, -1)], ids=str)
def test_positions_that_are_none_are_refused(positions: Any) -> None:
    with pytest.raises(WrapError, match="must be ranges of 4 positions"):
        pieces_of(positions, 4, "keys")
