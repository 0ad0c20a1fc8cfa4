"""Masks say of every block what their elements say, and what is outside their spans is empty."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meshwright.parallel.blockwise import masks
from meshwright.parallel.blockwise.elements import Dense
from meshwright.parallel.blockwise.mask import Band
from meshwright.parallel.blockwise.masks import EMPTY, FULL, Frame, Mask, Uniform
from meshwright.parallel.blockwise.tokens import Padding
from meshwright.parallel.errors import WrapError
from tests.parallel.blockwise.dense import elements

_SIZE = 40
_GENERATOR = torch.Generator().manual_seed(0)
_IDS = torch.tensor([[0] * 12 + [1] * 8 + [-1] * 5 + [2] * 15, [3] * 30 + [0] * 10])
_AGAIN = torch.tensor([0] * 10 + [1] * 10 + [0] * 20)
_PATTERN = torch.rand(2, 1, 5, 5, generator=_GENERATOR) > 0.5
_DENSE = torch.rand(_SIZE, _SIZE, generator=_GENERATOR) > 0.5

MASKS: dict[str, tuple[Mask, Callable[[int, int, int, int], bool]]] = {
    "causal": (masks.causal(), lambda b, h, q, k: k <= q),
    "window": (masks.window(4, 2), lambda b, h, q, k: -4 <= k - q <= 2),
    "ahead": (Band(-3, None), lambda b, h, q, k: k - q >= 3),
    "documents": (masks.documents(_IDS), lambda b, h, q, k: bool(_IDS[b, q] == _IDS[b, k] >= 0)),
    "again": (masks.documents(_AGAIN), lambda b, h, q, k: bool(_AGAIN[q] == _AGAIN[k])),
    "padding": (masks.padding(_IDS >= 0), lambda b, h, q, k: bool(_IDS[b, k] >= 0)),
    "blocks": (masks.blocks(_PATTERN, 9), lambda b, h, q, k: bool(_PATTERN[b, 0, q // 9, k // 9])),
    "dense": (masks.dense(_DENSE), lambda b, h, q, k: bool(_DENSE[q, k])),
    "function": (masks.function(lambda b, h, q, k: (q + k + h) % 3 == b), lambda b, h, q, k: (q + k + h) % 3 == b),
}


def _ranges() -> st.SearchStrategy[range]:
    def made(start: int, count: int, step: int) -> range:
        return range(start, min(start + count * step, _SIZE), step)

    return st.builds(made, st.integers(0, _SIZE - 1), st.integers(1, 12), st.integers(1, 4))


def _brute(allows: Callable[[int, int, int, int], bool], queries: range, keys: range) -> Tensor:
    table = [[[[allows(b, h, q, k) for k in keys] for q in queries] for h in range(2)] for b in range(2)]
    return torch.tensor(table, dtype=torch.bool).reshape(2, 2, len(queries), len(keys))


def _check(mask: Mask, allows: Callable[[int, int, int, int], bool], queries: range, keys: range) -> None:
    wanted = _brute(allows, queries, keys)
    found = elements(mask, queries, keys, batch=2, heads=2)
    assert torch.equal(found.expand_as(wanted), wanted)
    for number in range(mask.rows if mask.rows > 1 else 0):
        verdict = mask.row(number).block(queries, keys, Frame(range(number, number + 1), range(2)))
        own = verdict if isinstance(verdict, Tensor) else torch.tensor(verdict is FULL)
        assert torch.equal(own.expand_as(wanted[:1]), wanted[number : number + 1])
    for number in range(mask.rows):
        span = mask.row(number).span(queries)
        if span is not None:
            outside = [place for place, key in enumerate(keys) if key not in span]
            assert not (wanted[number : number + 1] if mask.rows > 1 else wanted)[..., outside].any()


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=25)
@given(queries=_ranges(), keys=_ranges())
def test_every_block_is_what_its_elements_are(name: str, queries: range, keys: range) -> None:
    _check(*MASKS[name], queries, keys)


@pytest.mark.parametrize("other", MASKS)
@pytest.mark.parametrize("one", ["causal", "window", "documents", "padding"])
@settings(max_examples=4)
@given(queries=_ranges(), keys=_ranges())
def test_masks_combine_as_their_elements_do(one: str, other: str, queries: range, keys: range) -> None:
    (left, allows), (right, permits) = MASKS[one], MASKS[other]
    _check(left & right, lambda *at: allows(*at) and permits(*at), queries, keys)
    _check(left | right, lambda *at: allows(*at) or permits(*at), queries, keys)
    both = MASKS["ahead"][0]
    _check((left & right) | both, lambda *at: (allows(*at) and permits(*at)) or at[3] - at[2] >= 3, queries, keys)


class _Blind(masks.Frame):
    """Nothing may be looked at."""

    def __getattribute__(self, name: str) -> object:
        raise AssertionError("elements were looked at")


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "verdict"),
    [
        (masks.causal(), range(1 << 20), range(1 << 20, 1 << 21), EMPTY),
        (masks.causal(), range(1 << 20, 1 << 21), range(1 << 20), FULL),
        (masks.causal() & masks.window(511), range(4096, 4608), range(0, 3585), EMPTY),
        (masks.causal(), range(0, 64, 4), range(1, 65, 4), None),
        (masks.causal(), range(0, 4), range(1, 2), None),
        (masks.causal(), range(0, 1), range(1, 65, 4), EMPTY),
        (masks.causal() & masks.documents(_AGAIN), range(10, 20), range(0, 10), EMPTY),
        (masks.causal() & masks.documents(_AGAIN), range(20, 40), range(0, 10), FULL),
        (masks.blocks(torch.eye(2).bool(), 1 << 20), range(1 << 20), range(1 << 20, 1 << 21), EMPTY),
        (masks.padding(torch.ones(1, 1 << 20)), range(1 << 20), range(1 << 20), FULL),
    ],
)
def test_structure_is_decided_without_elements(
    mask: Mask, queries: range, keys: range, verdict: Uniform | None
) -> None:
    if verdict is not None:
        assert mask.block(queries, keys, _Blind()) is verdict
    else:
        assert isinstance(mask.block(queries, keys), Tensor)


def test_stripes_have_diagonals() -> None:
    assert masks.causal().sketch(range(1, 64, 4), range(1, 64, 4)) == (-15, 0)
    assert masks.causal().sketch(range(1, 64, 4), range(2, 64, 4)) == (-15, -1)
    assert masks.window(8).sketch(range(1, 64, 4), range(3, 64, 4)) == (-2, -1)


def test_a_dense_mask_of_keys_alone_is_padding() -> None:
    assert isinstance(masks.dense(torch.ones(2, 1, 1, 5).bool()), Padding)
    assert isinstance(masks.dense(torch.ones(2, 1, 5, 5).bool()), Dense)


def test_equal_samples_are_one() -> None:
    assert masks.documents(torch.zeros(7, 12).long()).rows == 1
    assert masks.documents(_IDS).rows == 2
    assert (masks.causal() & masks.documents(_IDS)).rows == 2


def test_documents_do_not_change_with_the_tensor_they_were_made_of() -> None:
    ids = torch.zeros(4).long()
    mask = masks.documents(ids)
    ids[2:] = 1
    assert mask.block(range(2), range(2, 4)) is FULL


def test_what_has_no_document_does_not_attend_to_its_like() -> None:
    mask = masks.documents(torch.tensor([-1, -1, 0]))
    assert mask.block(range(2), range(2)) is EMPTY
    assert mask.block(range(3), range(2)) is EMPTY
    assert mask.span(range(2)) == range(0)


def test_a_function_knows_where_its_samples_and_heads_stand() -> None:
    mask = masks.function(lambda b, h, q, k: (b == 5) & (h == 7) & (q >= k))
    assert mask.block(range(2), range(2), Frame(range(4), range(8))) is EMPTY
    found = mask.block(range(2), range(2), Frame(range(4, 6), range(7, 8)))
    assert isinstance(found, Tensor)
    assert found.sum(dim=(1, 2, 3)).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.window(-3, 1), "a window from 3 to 1"),
        (lambda: masks.documents(torch.zeros(2, 3)), "integer ids [s] or [batch, s], not torch.float32 [2, 3]"),
        (lambda: masks.padding(torch.ones(1, 1, 3)), "[s] or [batch, s], not [1, 1, 3]"),
        (lambda: masks.dense(torch.zeros(3, 3)), "give scores as bias="),
        (lambda: masks.dense(torch.ones(2, 3, 3).bool()), "add dims of size 1"),
        (lambda: masks.blocks(torch.ones(3).bool(), 8), "a bool pattern [query blocks, key blocks]"),
        (lambda: masks.documents(_IDS) & masks.padding(torch.eye(3)), "masks of 2 and 3 samples"),
        (
            lambda: masks.function(lambda b, h, q, k: torch.ones(5, 2, 2).bool()).block(range(2), range(2)),
            "gave torch.bool [5, 2, 2], not bool within [1, 1, 2, 2]",
        ),
        (lambda: masks.function(lambda b, h, q, k: q - k).block(range(2), range(2)), "gave torch.int64"),
    ],
)
def test_what_is_no_mask_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(WrapError) as caught:
        make()
    assert message in str(caught.value)
