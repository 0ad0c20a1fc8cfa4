"""Group-limited and node-limited choices."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from meshwright.moe.errors import RoutingError
from meshwright.moe.groups import Groups
from meshwright.moe.top_k import TopK
from meshwright.parallel.mesh import Mesh
from tests.moe.golden import flat_logits

LIMITED = [{0, 1, 6, 7}, *[{0, 1, 4, 5}] * 3, *[{2, 3, 6, 7}] * 2, {2, 3, 4, 5}, {0, 1, 4, 5}]
PLAIN = [
    {1, 2, 6, 7},
    {0, 1, 5, 6},
    {0, 1, 4, 5},
    {0, 3, 4, 7},
    {0, 3, 6, 7},
    {2, 3, 5, 6},
    {1, 2, 5, 6},
    {1, 2, 4, 5},
]


@pytest.mark.parametrize(("groups", "expected"), [(Groups(number=4, limit=2), LIMITED), (None, PLAIN)])
def test_the_golden_choices(groups: Groups | None, expected: list[set[int]]) -> None:
    routing = TopK(num_experts=8, k=4, score="sigmoid", groups=groups).route(flat_logits(8))
    assert [set(row) for row in routing.experts.tolist()] == expected


@given(some.integers(1, 4), some.integers(1, 4), some.integers(1, 4), some.integers(0, 2**30), some.data())
def test_choices_are_those_of_the_definition(
    number: int, size: int, limit: int, seed: int, data: some.DataObject
) -> None:
    limit = min(limit, number)
    k = data.draw(some.integers(1, limit * size))
    groups = Groups(number=number, limit=limit, top=data.draw(some.one_of(some.none(), some.integers(1, size))))
    ranking = torch.randn(9, number * size, generator=torch.Generator().manual_seed(seed)) - 9.0  # all negative
    found = groups.masked(ranking, k)
    for row, masked in zip(ranking.tolist(), found.tolist(), strict=True):
        own = [sorted(row[at * size : (at + 1) * size], reverse=True) for at in range(number)]
        best = sorted(range(number), key=lambda at, own=own: -sum(own[at][: groups.scored_by(k)]))[:limit]
        assert masked == [each if at // size in best else -torch.inf for at, each in enumerate(row)]


def test_negative_scores_stay_in_the_chosen_groups() -> None:
    bias = torch.tensor([-5.0, -5.0, -4.0, -4.0])
    routing = TopK(num_experts=4, k=2, score="sigmoid", groups=Groups(number=2, limit=1)).route(
        torch.zeros(3, 4), bias=bias
    )
    assert routing.experts.tolist() == [[2, 3]] * 3


def test_the_best_expert_or_the_best_sum_makes_a_group() -> None:
    ranking = torch.tensor([[9.0, 0.0, 5.0, 6.0]])
    assert Groups(number=2, limit=1, top=1).masked(ranking, 2).isfinite().tolist() == [[True, True, False, False]]
    assert Groups(number=2, limit=1).masked(ranking, 2).isfinite().tolist() == [[False, False, True, True]]


def test_groups_are_scored_by_as_many_experts_as_a_token_has_in_each() -> None:
    assert Groups(number=8, limit=4).scored_by(8) == 2
    assert Groups(number=4, limit=2).scored_by(8) == 4
    assert Groups(number=8, limit=4).scored_by(2) == 1  # never by none, which would make all groups equal


def test_a_token_stays_on_as_many_nodes_as_allowed() -> None:
    mesh = Mesh(dp=8, ep=8, ep_node=4)
    routing = TopK(num_experts=32, k=6, groups=Groups.by_node(mesh, limit=2)).route(torch.randn(100, 32))
    assert max(len(set(row)) for row in (routing.experts // 8).tolist()) == 2


@pytest.mark.parametrize(
    ("number", "limit", "top", "k", "words"),
    [
        (4, 5, None, 2, "5 of 4 groups for each token: use 1 to 4"),
        (4, 0, None, 2, "0 of 4 groups for each token: use 1 to 4"),
        (4, 2, 0, 2, "groups scored by their best 0 experts: use 1 (DeepSeek-V2) or more"),
        (3, 2, None, 2, "8 experts do not make 3 equal groups; choose from: 1, 2, 4, 8"),
        (4, 2, None, 5, "2 of 4 groups hold 4 experts, fewer than k=5; use limit=3 or k=4"),
        (4, 2, 3, 2, "groups of 2 experts cannot be scored by 3; use top=2"),
    ],
)
def test_groups_that_do_not_fit_are_refused(number: int, limit: int, top: int | None, k: int, words: str) -> None:
    with pytest.raises(RoutingError, match=re.escape(words)):
        Groups(number=number, limit=limit, top=top).check(8, k)
