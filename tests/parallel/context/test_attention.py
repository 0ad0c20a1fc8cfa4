"""A sequence dealt over real ranks: output and gradients of dense attention, for every kind, dealing and feature."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.masks import causal, dense, documents, function, padding, window
from meshwright.parallel.collectives import Groups
from meshwright.parallel.context.attention import attend_dealt
from meshwright.parallel.context.axis import context_axis
from meshwright.parallel.context.dealing import Dealing, DealingKind
from meshwright.parallel.context.kinds import GatherKV, Hybrid, Kind, Ring, Ulysses
from meshwright.parallel.errors import WrapError
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
    "dense mask by head": partial(case, kv_heads=2, mask=dense(_random(5, 1, 4, 19, 19) > 0)),
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
    for length in (2, 6):  # some ranks hold one row, or none
        lengths[f"{length} rows"] = partial(case, length, kv_heads=2, more={"bias": _random(7, 4, length, length)})
    for found in run_ranks(_worst, Mesh(cp=4), kind, tuple(lengths.items())):
        assert found == {}


@pytest.mark.parametrize("kind", [Ring(), Ulysses(), GatherKV()], ids=str)
def test_three_ranks_are_as_good_as_two(kind: Kind) -> None:
    names = ("causal", "window", "packed documents", "sinks", "uneven groups", "two key heads", "bias rows")
    for found in run_ranks(_worst, Mesh(cp=3), kind, tuple((name, FEATURES[name]) for name in names)):
        assert found == {}


def _tokens(length: int, heads: int, *, axis: Any, dealing: Dealing) -> list[Tensor]:
    places = [place for piece in dealing.pieces(length, axis.rank) for place in piece]
    return [_random(seed, 1, heads, length, 4)[:, :, places].requires_grad_() for seed in range(3)]


def _second(kind: Kind) -> list[Tensor]:
    axis, dealing = axis_here(kind), Dealing("zigzag", dist.get_world_size())
    own = _tokens(7, 2, axis=axis, dealing=dealing)
    out = attend_dealt(*own, axis=axis, dealing=dealing, length=7, kind=kind, mask=causal())
    grads = torch.autograd.grad(out.square().sum(), own, create_graph=True)
    return [each.detach() for each in torch.autograd.grad(sum(each.square().sum() for each in grads), own)]


def test_ulysses_has_second_derivatives_and_rings_refuse_them() -> None:
    whole = [_random(seed, 1, 2, 7, 4).requires_grad_() for seed in range(3)]
    grads = torch.autograd.grad(attend(*whole, mask=causal()).square().sum(), whole, create_graph=True)
    wanted = torch.autograd.grad(sum(each.square().sum() for each in grads), whole)
    for rank, found in enumerate(run_ranks(_second, Mesh(cp=2), Ulysses())):
        places = [place for piece in Dealing("zigzag", 2).pieces(7, rank) for place in piece]
        for one, other in zip(found, wanted, strict=True):
            assert torch.allclose(one, other[:, :, places], rtol=1e-12, atol=1e-12)
    for kind in (Ring(), GatherKV()):
        assert all("no second derivative" in found for found in run_ranks(_no_second, Mesh(cp=2), kind))


def _no_second(kind: Kind) -> str:
    with pytest.raises(WrapError) as caught:
        _second(kind)
    return str(caught.value)


def _narrow(kind: Kind) -> list[float]:
    """Errors of bfloat16 gradients over all positions, against those of one process in bfloat16."""
    axis, dealing, length = axis_here(kind), Dealing("zigzag", dist.get_world_size()), 256
    places = [place for piece in dealing.pieces(length, axis.rank) for place in piece]
    whole = [_random(seed, 1, 4, length, 16).bfloat16() for seed in range(4)]

    def grads(tensors: list[Tensor], grad: Tensor, attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        own = [each.clone().requires_grad_() for each in tensors]
        return torch.autograd.grad((attention(*own, mask=causal()) * grad).sum(), own)

    exact = grads([each.double() for each in whole[:3]], whole[3].double(), attend)
    alone = grads(whole[:3], whole[3], attend)
    dealt = partial(attend_dealt, axis=axis, dealing=dealing, length=length, kind=kind)
    found = grads([each[:, :, places] for each in whole[:3]], whole[3][:, :, places], dealt)
    ratios = []
    for one, single, best in zip(found, alone, exact, strict=True):
        squares = (one - best[:, :, places]).square().sum()
        dist.all_reduce(squares, group=axis.group)
        ratios.append(float(squares.sqrt() / (single - best).norm()))
    return ratios


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_in_bfloat16_are_about_as_good_as_on_one_rank(kind: Kind) -> None:
    for found in run_ranks(_narrow, Mesh(cp=4), kind):
        assert max(found) < 1.25, found


def _autocast() -> tuple[torch.dtype, float]:
    axis, dealing = axis_here(Ring()), Dealing("striped", 2)
    own = [each.float() for each in _tokens(16, 2, axis=axis, dealing=dealing)]
    options: Any = {"axis": axis, "dealing": dealing, "length": 16, "kind": Ring()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_dealt(*own, **options)
    return out.dtype, float((out - attend_dealt(*own, **options)).abs().max())


def test_autocast_narrows_what_is_sent() -> None:
    for dtype, error in run_ranks(_autocast, Mesh(cp=2)):
        assert dtype is torch.bfloat16
        assert 0 < error < 0.05


REFUSED: dict[str, dict[str, Any]] = {
    r"2 heads cannot be dealt over 4 ranks.*at most 2": {"kind": Ulysses()},
    r"made without groups of 2 ranks": {"kind": Hybrid(2)},
    r"groups of 3 ranks do not divide cp=4; choose ulysses from: 1, 2, 4": {"kind": Hybrid(3)},
    r"must be \[batch, heads, ., d\]: this rank has . of 23": {"length": 23},
    r"needs a dropout_seed": {"dropout_p": 0.1},
    r"dealt over 2 ranks cannot be attended to on 4": {"dealing": Dealing("zigzag", 2)},
    r"rows of this rank's positions, columns of all": {"bias": torch.zeros(3, 16)},
    r"no option 'sink'; did you mean 'sinks'": {"sink": None},
    r"do not fit": {"key": torch.zeros(1, 3, 4, 3)},
}


def _refused() -> list[str]:
    axis, found = axis_here(Ring()), []
    for change in REFUSED.values():
        options: Any = {"axis": axis, "dealing": Dealing("zigzag", 4), "length": 16, "kind": Ring(), **change}
        tokens = torch.zeros(1, 2, 4, 3)
        with pytest.raises(WrapError) as caught:
            attend_dealt(tokens, options.pop("key", tokens), tokens, **options)
        found.append(str(caught.value))
    return found


def test_what_cannot_be_is_refused_with_a_way_out() -> None:
    for found in run_ranks(_refused, Mesh(cp=4)):
        assert [message for wanted, message in zip(REFUSED, found, strict=True) if not re.search(wanted, message)] == []


def _two_models() -> float:
    """Other numbers of heads in one process leave each other alone."""
    kind = Ulysses()
    axis, worst = axis_here(kind), 0.0
    for heads, kv_heads in ((4, 2), (6, 6), (4, 2), (3, 1)):
        made = case(heads=heads, kv_heads=kv_heads, mask=causal())
        worst = max(worst, *differences(made, axis=axis, dealing=Dealing("zigzag", 2), kind=kind).values())
    return worst


def test_models_with_other_heads_share_a_process() -> None:
    assert max(run_ranks(_two_models, Mesh(cp=2))) < 1e-12


def _with_others() -> dict[str, float]:
    groups = Groups(Mesh(dp=2, cp=2))
    axis = context_axis(groups, Ring(), Ulysses())
    found = {}
    for kind in (Ring(), Ulysses()):
        for what, error in differences(case(), axis=axis, dealing=Dealing("zigzag", 2), kind=kind).items():
            found[f"{kind}: {what}"] = error
    return found


def test_the_axis_may_be_one_of_several() -> None:
    for found in run_ranks(_with_others, Mesh(dp=2, cp=2)):
        assert max(found.values()) < 1e-12
