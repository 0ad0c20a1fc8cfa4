"""Experts cut into slices: together they are the experts, and each knows its part of every parameter."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.moe.errors import DispatchError, SwapError
from meshwright.moe.recognise import FoundExperts, find_experts
from meshwright.moe.slices import sliced_columns
from meshwright.moe.stacked import StackedExperts
from meshwright.moe.swap import _Listed, deal_experts, plan_experts
from meshwright.parallel.mesh import Mesh
from tests.moe.models import NUM_EXPERTS, GatedList, build
from tests.moe.test_swap import own
from tests.moe.threads import on_threads


def test_gates_in_halves_and_side_by_side_are_cut_with_what_they_gate() -> None:
    (halves, *_), (pairs, *_) = (find_experts(build(family)) for family in ("mixtral", "gpt_oss"))
    columns = sliced_columns(halves, ranks=2, slices=2)
    assert columns["gate_up_proj"].held == (((0, 12), (24, 36)), ((12, 24), (36, 48)))
    assert columns["down_proj"].held == (((0, 12),), ((12, 24),))
    columns = sliced_columns(pairs, ranks=4, slices=2)
    assert columns["gate_up_proj"].held == (((0, 12),), ((12, 24),)) * 2
    assert columns["gate_up_proj_bias"].held == columns["gate_up_proj"].held
    assert columns["down_proj_bias"].held == (((0, 16),), ()) * 2


class Small(nn.Module):
    """A gate and gated experts, with biases or without."""

    def __init__(self, *, biased: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = ((4, 10, 6), (4, 6, 5), (4, 10), (4, 6))
        up, down, *biases = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        self.gate = nn.Parameter(torch.randn(4, 6, generator=generator, dtype=torch.float64))
        both = (biases[0], biases[1]) if biased else None
        self.experts = StackedExperts(up, down, nn.functional.silu, biases=both)

    def forward(self, tokens: Tensor) -> Tensor:
        weights, ids = (tokens @ self.gate.mT).softmax(-1).topk(2)
        made: Tensor = self.experts(tokens, ids, weights)
        return made


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("slices", [2, 4])
def test_slices_of_one_expert_add_up_to_it(slices: int, biased: bool) -> None:
    tokens = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, models = Small(biased=biased), [Small(biased=biased) for _ in range(4)]
    expected = plain(tokens)
    expected.square().sum().backward()

    def work(rank: int, axes: Any) -> Tensor:
        deal_experts(models[rank], axes, slices=slices)
        made: Tensor = models[rank](tokens[4 * rank : 4 * rank + 4])
        made.square().sum().backward()
        return made.detach()

    found = torch.cat(on_threads(Mesh(dp=4, ep=4), work))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-13)
    tiles = plan_experts(Small(biased=biased), ranks=4, slices=slices).tiles
    assert len(tiles) == (4 if biased else 2)
    for name, each in plain.named_parameters():
        parts = [model.get_parameter(name).grad for model in models]
        assert each.grad is not None
        assert all(part is not None for part in parts)
        whole = tiles[name].join(parts) if name in tiles else torch.stack(parts).sum(0)  # type: ignore[arg-type]
        torch.testing.assert_close(whole, each.grad, rtol=1e-11, atol=1e-13, msg=name)


class SmallList(nn.Module):
    """A gate, and experts that are modules."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate = nn.Linear(6, NUM_EXPERTS).double()
        self.experts = GatedList(6, 7).double()
        with torch.no_grad():
            for each in self.parameters():
                each.normal_(generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        weights, ids = self.gate(tokens).softmax(-1).topk(2)
        made: Tensor = self.experts(tokens, ids, weights)
        return made


@pytest.mark.parametrize("slices", [2, 4])
def test_slices_of_experts_that_are_modules_add_up(slices: int) -> None:
    tokens = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, models = SmallList(), [SmallList() for _ in range(4)]
    expected = plain(tokens)
    expected.square().sum().backward()

    def work(rank: int, axes: Any) -> Tensor:
        deal_experts(models[rank], axes, slices=slices)
        made: Tensor = models[rank](tokens[4 * rank : 4 * rank + 4])
        made.square().sum().backward()
        return made.detach()

    found = torch.cat(on_threads(Mesh(dp=4, ep=4), work))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-13)
    plan = plan_experts(SmallList(), ranks=4, slices=slices)
    for name, each in plain.experts.named_parameters():
        path, number = f"experts.{name}", int(name.partition(".")[0])
        first = number // (NUM_EXPERTS * slices // 4) * slices
        assert plan.homes[path] == tuple(range(first, first + (1 if name.endswith("back.bias") else slices)))
        kept = [dict(model.experts.named_parameters()) for model in models]
        assert [rank for rank in range(4) if name in kept[rank]] == list(plan.homes[path])
        parts = [kept[rank][name].grad if name in kept[rank] else None for rank in range(4)]
        if each.grad is None:  # an expert without tokens
            assert not any(part is not None for part in parts)
            continue
        for rank, part in enumerate(parts):
            assert part is None or part.shape == plan.local_shape(path, each.shape, rank)
        empty = [each.new_empty(plan.local_shape(path, each.shape, rank)) for rank in range(4)]
        given = [empty[rank] if part is None else part for rank, part in enumerate(parts)]
        whole = plan.splits[path].join(given) if path in plan.splits else given[first]
        torch.testing.assert_close(whole, each.grad, rtol=1e-11, atol=1e-13, msg=name)


def test_slices_of_one_expert_drop_features_apart_from_one_seed() -> None:
    experts = nn.ModuleList([nn.Dropout(0.5)]).train()
    rows = torch.ones(1, 64)

    def dropped(part: int | None, calls: int = 1) -> list[Tensor]:
        torch.manual_seed(3)
        own = _Listed(experts, range(1), part)
        return [own(rows, torch.tensor([1])) for _ in range(calls)]

    masks = [*dropped(None), *dropped(0, calls=2), *dropped(1, calls=2)]
    assert len({tuple(each.flatten().tolist()) for each in masks}) == 5
    assert torch.equal(dropped(1, calls=2)[1], masks[4])


def test_what_cannot_be_sliced_is_refused() -> None:
    with pytest.raises(SwapError, match=r"expert chosen\.0 is not seen to be the sum of 2 slices: "):
        plan_experts(own(), ranks=2, slices=2)
    with pytest.raises(DispatchError, match=re.escape("3 slices of each expert do not divide ep=4 ranks")):
        plan_experts(build("mixtral"), ranks=4, slices=3)
    (found, *_) = find_experts(build("mixtral"))
    with pytest.raises(SwapError, match="have 24 hidden features, too few for 25 slices"):
        sliced_columns(found, ranks=25, slices=25)
    whole: Any = SimpleNamespace(
        has_gate=False,
        has_bias=False,
        is_transposed=False,
        act_fn=nn.Softmax(-1),
        up_proj=torch.zeros(2, 8, 3),
        down_proj=torch.zeros(2, 3, 8),
    )
    with pytest.raises(SwapError, match="experts mixed mix their hidden features in the activation"):
        sliced_columns(FoundExperts("mixed", whole, 2, "stacked"), ranks=2, slices=2)
