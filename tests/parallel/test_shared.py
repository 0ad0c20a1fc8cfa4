"""Gradients that several ranks hold parts of."""

import torch
from torch import nn

from meshwright.parallel.collectives import Groups
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.ranks import run_ranks
from meshwright.parallel.shared import SharedGradients


def summed(rank_uses: list[list[str]]) -> dict[str, list[float] | None]:
    groups = Groups(Mesh(cp=2), "cpu")
    held = {name: nn.Parameter(torch.zeros(2)) for name in ("both", "one", "none", "other")}
    for name in rank_uses[groups.rank]:
        held[name].grad = torch.tensor([1.0, 2.0]) * (groups.rank + 1)
    shared = SharedGradients(["both", "one", "none", "missing"], groups, "cp")
    shared.fill(held)
    shared.sum({name: (each, each.grad) for name, each in held.items()})
    return {name: None if each.grad is None else each.grad.tolist() for name, each in held.items()}


def test_parts_are_summed_and_what_no_rank_used_keeps_no_gradient() -> None:
    found = run_ranks(summed, Mesh(cp=2), [["both", "other"], ["both", "one"]])
    for each in found:
        assert each["both"] == [3.0, 6.0]
        assert each["one"] == [2.0, 4.0]
        assert each["none"] is None
    assert found[0]["other"] == [1.0, 2.0]
    assert found[1]["other"] is None
