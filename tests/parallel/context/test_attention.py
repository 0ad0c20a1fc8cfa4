"""A sequence dealt over real ranks: output and gradients of dense attention, for every kind, dealing and feature."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from meshwright.parallel.blockwise.masks import causal, dense, documents, function, padding, window
from meshwright.parallel.context.dealing import Dealing, DealingKind
from meshwright.parallel.context.kinds import GatherKV, Hybrid, Kind, Ring, Ulysses
from meshwright.parallel.mesh import Mesh
from meshwright.testing import run_ranks
from tests.parallel.context.dense import Case, axis_here, differences

pytestmark = pytest.mark.slow

DEALINGS = get_args(DealingKind)
KINDS: tuple[Kind, ...] = (Ring(), Ulysses(), Hybrid(2), GatherKV())


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(length: int = 19, heads: int = 4, kv_heads: int = 4, more: Any = None, **options: Any) -> Case:
    """Two samples; values are narrower than keys."""
    query, key = _random(1, 2, heads, length, 5), _random(2, 2, kv_heads, length, 5)
    value, grad = _random(3, 2, kv_heads, length, 3), _random(4, 2, heads, length, 3)
    return Case(query, key, value, dict(more or {}), options, grad)


def _packed(length: int) -> Any:
    """Documents that cross the borders of ranks, other ones in each sample."""
    numbers = torch.arange(length)
    return causal() & documents(torch.stack([numbers * 3 // length, numbers * 4 // length - 1]))


def _by_distance(queries: range, keys: range) -> Tensor:
    distance = torch.tensor(list(keys)) - torch.tensor(list(queries))[:, None]
    return torch.arange(1.0, 5.0, dtype=torch.float64)[:, None, None] * distance * 0.1


def _odd_heads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query + key + head + batch) % 3 != 0


FEATURES: dict[str, Callable[[], Case]] = {
    "full": case,
    "causal": partial(case, mask=causal()),
    "causal, grouped heads": partial(case, heads=8, mask=causal()),
    "one key head": partial(case, kv_heads=1, mask=causal()),
    "two key heads": partial(case, kv_heads=2, mask=causal()),
    "uneven heads": partial(case, heads=6, kv_heads=6, mask=causal()),
    "uneven groups": partial(case, heads=9, kv_heads=3),
    "window": partial(case, mask=window(4)),
    "window on both sides": partial(case, kv_heads=2, mask=window(2, 3)),
    "packed documents": partial(case, kv_heads=2, mask=_packed(19)),
    "padding": partial(case, mask=padding(torch.arange(19) >= 7) & causal()),
    "dense mask": partial(case, mask=dense(_random(5, 2, 1, 19, 19) > 0)),
    "mask by head": partial(case, mask=function(_odd_heads)),
    "sinks": partial(case, kv_heads=2, mask=window(3), more={"sinks": _random(6, 4)}),
    "bias rows": partial(case, mask=causal(), more={"bias": _random(7, 2, 4, 19, 19)}),
    "bias rows of all heads": partial(case, kv_heads=2, mask=causal(), more={"bias": _random(7, 19, 19)}),
    "bias without rows": partial(case, mask=causal(), more={"bias": _random(8, 4, 1, 19)}),
    "bias function": partial(case, mask=causal(), bias=_by_distance),
    "softcap": partial(case, mask=causal(), softcap=2.0, scale=1.5),
    "dropout": partial(case, kv_heads=2, mask=causal(), dropout_p=0.4),
    "small blocks": partial(case, kv_heads=2, mask=causal(), query_block=3, kv_block=2),
}


def _worst(kind: Kind, cases: Iterable[tuple[str, Callable[[], Case]]]) -> dict[str, float]:
    axis = axis_here(kind)
    found = {}
    for (name, make), dealt in product(cases, DEALINGS):
        for what, error in differences(make(), axis=axis, dealing=Dealing(dealt, axis.size), kind=kind).items():
            if not error < 1e-12:
                found[f"{name}, {dealt}: {what}"] = error
    return found


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_output_and_gradients_are_those_of_dense_attention(kind: Kind, degree: int) -> None:
    for found in run_ranks(_worst, Mesh(cp=degree), kind, tuple(FEATURES.items())):
        assert found == {}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_length_is_exact_also_with_ranks_that_hold_nothing(kind: Kind) -> None:
    lengths = {f"length {length}": partial(case, length, mask=causal(), kv_heads=2) for length in (1, 3, 5, 8, 13)}
    for found in run_ranks(_worst, Mesh(cp=4), kind, tuple(lengths.items())):
        assert found == {}


@pytest.mark.parametrize("kind", [Ring(), Ulysses(), GatherKV()], ids=str)
def test_three_ranks_are_as_good_as_two(kind: Kind) -> None:
    names = ("causal", "window", "packed documents", "sinks", "uneven groups", "two key heads", "bias rows")
    for found in run_ranks(_worst, Mesh(cp=3), kind, tuple((name, FEATURES[name]) for name in names)):
        assert found == {}
