"""Every closure of transformers' masks is the structured mask that is read from it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as made

from meshwright.parallel.blockwise.closures import read_mask
from meshwright.parallel.blockwise.masks import Frame, MaskFunction

BATCH, LENGTH = 3, 23


def _random(seed: int, high: int, shape: tuple[int, ...] = (BATCH, LENGTH)) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def _positions(seed: int) -> Tensor:
    """Numbers that count up from 0, or from anywhere, in every document."""
    starts = _random(seed, 4) == 0
    starts[:, 0] = True
    since = torch.arange(LENGTH) - (torch.arange(LENGTH) * starts).cummax(-1).values
    return since + (starts * _random(seed + 1, 5)).cummax(-1).values * (seed % 2)


def _documents(seed: int) -> Tensor:
    found = made.find_packed_sequence_indices(_positions(seed))
    assert found is not None
    return found


def _packed(inner: MaskFunction, seed: int) -> MaskFunction:
    renumbered = made.remap_positions_for_packed_sequence(inner, _positions(seed))
    return made.and_masks(renumbered, made.packed_sequence_mask_function(_documents(seed)))


def _packed_with_pictures(seed: int) -> MaskFunction:
    renumbered = made.remap_positions_for_packed_sequence(made.causal_mask_function, _positions(seed))
    either = made.or_masks(renumbered, made.blockwise_overlay(_random(seed, 4) - 1))
    return made.and_masks(either, made.packed_sequence_mask_function(_documents(seed)))


KNOWN: dict[str, Callable[[int], MaskFunction]] = {
    "causal": lambda seed: made.causal_mask_function,
    "bidirectional": lambda seed: made.bidirectional_mask_function,
    "window": lambda seed: made.sliding_window_causal_mask_function(seed + 1),
    "window to both sides": lambda seed: made.sliding_window_bidirectional_mask_function(seed + 1),
    "chunks": lambda seed: made.chunked_causal_mask_function(seed + 2, _random(seed, 6, (BATCH,))),
    "pictures": lambda seed: made.or_masks(made.causal_mask_function, made.blockwise_overlay(_random(seed, 4) - 1)),
    "padding": lambda seed: made.and_masks(
        made.causal_mask_function, made.padding_mask_function(_random(seed, 2).bool())
    ),
    "packed": lambda seed: _packed(made.causal_mask_function, seed),
    "packed window": lambda seed: _packed(made.sliding_window_causal_mask_function(seed + 1), seed),
    "packed chunks": lambda seed: _packed(made.chunked_causal_mask_function(3, torch.zeros(BATCH, dtype=int)), seed),
    "packed pictures": _packed_with_pictures,
    "everything or nothing": lambda seed: made.or_masks(made.causal_mask_function, made.bidirectional_mask_function),
}


def _values(asked: MaskFunction) -> Tensor:
    """As transformers makes a dense mask."""
    indices = made._non_vmap_expansion_sdpa(*(torch.arange(size) for size in (BATCH, 1, LENGTH, LENGTH)))
    found: Tensor = asked(*indices)
    return found.expand(BATCH, 1, LENGTH, LENGTH)


def _read(asked: MaskFunction, **options: Any) -> tuple[Tensor, str]:
    mask = read_mask(asked, **{"length": LENGTH, **options})
    if mask is None:
        return torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool), "None"
    found = mask.pairs(range(LENGTH), range(LENGTH), Frame(range(BATCH), range(1)))
    return found.expand(BATCH, 1, LENGTH, LENGTH), _parts(mask)


def _parts(mask: Any) -> str:
    if hasattr(mask, "one"):
        return f"{_parts(mask.one)} {_parts(mask.other)}"
    return type(mask).__name__


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_closure_is_the_mask_that_is_read_from_it(name: str, seed: int) -> None:
    asked = KNOWN[name](seed)
    found, parts = _read(asked)
    assert torch.equal(found, _values(asked))
    assert "Function" not in parts


@pytest.mark.parametrize("name", KNOWN)
def test_queries_and_keys_that_are_not_the_same_positions_are_read_too(name: str) -> None:
    asked = KNOWN[name](1)
    found, _ = _read(asked, length=None)
    assert torch.equal(found, _values(asked))


def _of_a_user(sample: Any, head: Any, query: Any, key: Any) -> Any:
    return (query + key + sample) % 3 != 0


@pytest.mark.parametrize("use_vmap", [False, True])
def test_an_unknown_function_stays_a_function_beside_known_ones(use_vmap: bool) -> None:
    asked = made.and_masks(made.sliding_window_causal_mask_function(5), _of_a_user)
    found, parts = _read(asked, use_vmap=use_vmap)
    assert torch.equal(found, _values(asked))
    assert parts == "Band Function"
    within = _packed(made.and_masks(made.causal_mask_function, _of_a_user), 2)
    found, parts = _read(within, use_vmap=use_vmap)
    assert torch.equal(found, _values(within))
    assert parts == "Band Function Documents"


def test_a_window_of_nothing_shows_nothing() -> None:
    found, _ = _read(made.sliding_window_causal_mask_function(0))
    assert not found.any()


def test_a_function_of_single_positions_is_asked_one_by_one() -> None:
    table = _random(0, 2, (LENGTH, LENGTH)).bool()

    def asked(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del sample, head
        assert query.dim() == 0
        return table[query][key]

    found, _ = _read(asked, use_vmap=True)
    assert torch.equal(found, table.expand_as(found))


def test_positions_that_do_not_count_up_within_documents_are_not_taken_for_packing() -> None:
    renumbered = made.remap_positions_for_packed_sequence(made.causal_mask_function, _random(0, 9))
    asked = made.and_masks(renumbered, made.packed_sequence_mask_function(_documents(0)))
    found, parts = _read(asked)
    assert torch.equal(found, _values(asked))
    assert "Function" in parts


def test_a_look_alike_of_a_known_closure_is_not_taken_for_it() -> None:
    def sliding_window_overlay(sliding_window: int) -> MaskFunction:
        def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            return kv_idx > q_idx - 2 * sliding_window

        return inner_mask

    found, parts = _read(sliding_window_overlay(2))
    assert torch.equal(found, _values(sliding_window_overlay(2)))
    assert parts == "Function"
