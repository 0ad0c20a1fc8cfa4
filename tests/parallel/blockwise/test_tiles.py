"""Plans of blocks: every pair in exactly one, few that are computed in vain, none larger than allowed."""

import pytest
import torch
from torch import Tensor

from meshwright.parallel.blockwise import masks
from meshwright.parallel.blockwise.bands import Limits
from meshwright.parallel.blockwise.cells import parts_of
from meshwright.parallel.blockwise.diagonals import FULL, Diagonals
from meshwright.parallel.blockwise.mask import Band
from meshwright.parallel.blockwise.masks import Frame, Mask
from meshwright.parallel.blockwise.plan import plan_for
from meshwright.parallel.blockwise.positions import Pieces
from meshwright.parallel.blockwise.tiles import Tile
from tests.parallel.blockwise.dense import elements

_IDS = torch.arange(600)[None] // torch.tensor([[70], [200]])
_GENERATOR = torch.Generator().manual_seed(0)
MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": masks.causal(),
    "strictly": Band(None, -1),
    "window": masks.causal() & masks.window(99),
    "wide": masks.window(250, 30),
    "ahead": Band(-20, None),
    "packed": masks.causal() & masks.documents(_IDS),
    "tiny": masks.documents(torch.arange(600) // 7),
    "function": masks.function(lambda b, h, q, k: (q >= k) | (k < 40)),
    "sparse": masks.blocks(torch.rand(10, 10, generator=_GENERATOR) > 0.7, 64),
}
POSITIONS: dict[str, tuple[Pieces, Pieces]] = {
    "all": ((range(600),), (range(600),)),
    "chunks": ((range(100, 250), range(450, 600)), (range(100), range(250, 450))),
    "same chunks": ((range(100, 250), range(450, 600)), (range(100, 250), range(450, 600))),
    "stripes": ((range(1, 600, 4),), (range(3, 600, 4),)),
    "one query": ((range(299, 300),), (range(600),)),
    "steps differ": ((range(0, 600, 3),), (range(0, 600, 2),)),
}
LIMITS = {
    "fused": Limits(128, 128, fused=True, call_cost=300.0),
    "plain": Limits(128, 96, fused=False, call_cost=300.0),
    "banded": Limits(128, 96, fused=True, call_cost=300.0, banded=True),
    "costly calls": Limits(1024, 1024, fused=True, call_cost=1e6),
}


def _tiles(mask: Mask | None, positions: tuple[Pieces, Pieces], limits: Limits) -> tuple[Tile, ...]:
    return plan_for(mask, *positions, limits=limits, frame=Frame(range(2), range(1))).tiles


def _pairs(mask: Mask | None, tile: Tile) -> Tensor:
    rows, columns = len(tile.queries), len(tile.keys)
    if tile.sketch is FULL:
        return torch.ones(rows, columns, dtype=torch.bool)
    if isinstance(tile.sketch, Diagonals):
        return tile.sketch.tensor(rows, columns)
    assert mask is not None
    own = mask if tile.sample is None else mask.row(tile.sample)
    return elements(own, tile.queries, tile.keys)[0, 0]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_pair_is_in_exactly_one_block(mask: str, positions: str, limits: str) -> None:
    chosen, (queries, keys) = MASKS[mask], POSITIONS[positions]
    samples = 1 if chosen is None else chosen.rows
    found = torch.zeros(samples, sum(map(len, queries)), sum(map(len, keys)), dtype=torch.int)
    touched = torch.zeros(found.shape[:2], dtype=torch.bool)
    places = [torch.tensor([each for piece in pieces for each in piece]) for pieces in (queries, keys)]
    for tile in _tiles(chosen, (queries, keys), LIMITS[limits]):
        assert places[0][tile.rows].tolist() == list(tile.queries)
        assert places[1][tile.columns].tolist() == list(tile.keys)
        sample = tile.sample or 0
        if tile.first:
            assert not touched[sample, tile.rows].any()
        touched[sample, tile.rows] = True
        found[sample, tile.rows, tile.columns] += _pairs(chosen, tile).int()
        triangle = tile.sketch == (1 - len(tile.queries), 0) and len(tile.queries) == len(tile.keys)
        if LIMITS[limits].banded and isinstance(tile.sketch, Diagonals):
            assert tile.sketch.low <= len(tile.keys) - len(tile.queries) <= tile.sketch.high
        elif not LIMITS[limits].fused or not (tile.sketch is FULL or triangle):
            assert len(tile.queries) <= LIMITS[limits].query_block
            assert len(tile.keys) <= LIMITS[limits].kv_block
    for sample in range(samples):
        own = chosen if chosen is None else chosen.row(sample)
        wanted = elements(own, range(600), range(600))[0, 0][places[0]][:, places[1]]
        assert torch.equal(found[sample], wanted.int())


@pytest.mark.parametrize(
    ("mask", "num_tiles"),
    [(None, 1), (masks.causal(), 1), (masks.padding(torch.arange(4096) < 3000), 1)],
    ids=["none", "causal", "padded"],
)
def test_what_a_kernel_takes_whole_is_one_block(mask: Mask | None, num_tiles: int) -> None:
    limits = Limits(1024, 1024, fused=True, call_cost=2500.0)
    assert len(_tiles(mask, ((range(4096),), (range(4096),)), limits)) == num_tiles


@pytest.mark.parametrize(
    ("mask", "most"),
    [
        (masks.causal() & masks.window(511), 0.18),  # 512 of 4096 keys a query are 0.125
        (masks.causal() & masks.documents(torch.arange(4096) // 512), 0.13),
        (masks.documents(torch.arange(4096) // 500), 0.14),
        (masks.blocks(torch.eye(32).bool(), 128), 1 / 32),
        (masks.function(lambda b, h, q, k: q // 512 == k // 512), 1 / 8),
    ],
    ids=["window", "packed", "unaligned", "sparse", "function"],
)
def test_few_pairs_are_computed_in_vain(mask: Mask, most: float) -> None:
    limits = Limits(1024, 1024, fused=True, call_cost=2500.0)
    tiles = _tiles(mask, ((range(4096),), (range(4096),)), limits)
    assert sum(len(each.queries) * len(each.keys) for each in tiles) <= most * 4096**2


def test_cells_at_the_edge_are_whole_too() -> None:
    pairs = torch.zeros(100, 150, dtype=torch.bool)
    pairs[64:, 64:] = True
    (part,) = parts_of(pairs, Limits(1024, 1024, fused=True, call_cost=100.0))
    assert part == (slice(64, 100), slice(64, 150), FULL)
    assert parts_of(torch.zeros(3, 4, dtype=torch.bool), LIMITS["fused"]) == []


def test_long_sequences_are_planned_in_no_time() -> None:
    limits = Limits(1024, 1024, fused=True, call_cost=2500.0)
    tokens = range(1 << 20)
    ids = torch.arange(1 << 20) // 5000
    tiles = _tiles(masks.causal() & masks.documents(ids), ((tokens,), (tokens,)), limits)
    assert {each.queries[0] // 5000 for each in tiles} == set(range(210))
    assert all(each.queries[0] // 5000 == each.keys[-1] // 5000 for each in tiles)


def test_plans_are_made_once_for_a_mask_and_forgotten_with_it() -> None:
    limits, frame, tokens = LIMITS["fused"], Frame(), (range(600),)
    mask = masks.function(lambda b, h, q, k: q >= k)
    plan = plan_for(mask, tokens, tokens, limits=limits, frame=frame)
    assert plan_for(mask, tokens, tokens, limits=limits, frame=frame) is plan
    assert plan_for(masks.causal(), tokens, tokens, limits=limits, frame=frame) is plan_for(
        masks.causal(), tokens, tokens, limits=limits, frame=frame
    )
    tile = next(each for each in plan.tiles if each.sketch is None)
    assert plan.allowed(mask, tile, frame) is plan.allowed(mask, tile, frame)
