"""Experts that are modules: what a slice needs of their parameters is seen, and what cannot be a sum is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.moe.errors import SwapError
from meshwright.moe.listed import draws, form_of, slice_expert
from tests.moe.models import Gated


class Written(nn.Module):
    """A feed-forward network whose code is a test's own."""

    def __init__(self, code: Callable[[Any, Tensor], Any], *, inner: int = 7, p: float = 0.0) -> None:
        super().__init__()
        self.down = nn.Linear(inner, 5)
        self.up, self.gate = nn.Linear(5, inner), nn.Linear(5, inner)
        self.drop = nn.Dropout(p)
        self.code = code

    def forward(self, rows: Tensor) -> Any:
        return self.code(self, rows)


def gated(own: Any, rows: Tensor) -> Any:
    return own.down(own.drop(functional.silu(own.gate(rows)) * own.up(rows)))


def in_place(own: Any, rows: Tensor) -> Any:
    return own.down(functional.relu_(own.gate(rows).mul_(2.0)).to(own.down.weight.dtype) * own.up(rows))


def two_steps(own: Any, rows: Tensor) -> Any:
    normed = functional.layer_norm(rows, rows.shape[-1:])
    return functional.linear(own.gate(normed).clamp(max=1.0) * own.up(rows), own.down.weight, own.down.bias)


@pytest.mark.parametrize("code", [gated, in_place, two_steps])
@pytest.mark.parametrize("slices", [2, 3])
def test_slices_add_up_to_an_expert_however_it_is_written(code: Callable[[Any, Tensor], Any], slices: int) -> None:
    with torch.device("meta"):
        shapes = Written(code)
    cuts = slice_expert(shapes, slices=slices, where="0")
    expert, rows = Written(code).double(), torch.randn(4, 5, dtype=torch.float64)
    made = torch.zeros(4, 5, dtype=torch.float64)
    for part in range(slices):
        mine = Written(code).double()
        for name, each in expert.named_parameters():
            path, _, leaf = name.rpartition(".")
            kept = nn.Parameter(cuts[name].take(each.detach(), part)) if cuts[name].held[part] else None
            mine.get_submodule(path)._parameters[leaf] = kept
        made += mine(rows)
    torch.testing.assert_close(made, expert(rows), rtol=1e-12, atol=1e-13)


def test_gates_side_by_side_go_with_what_they_gate() -> None:
    cuts = slice_expert(Gated(5, 3), slices=2, where="0")
    assert cuts["both.weight"].held == cuts["both.bias"].held == (((0, 4),), ((4, 6),))
    assert cuts["back.weight"].held == (((0, 2),), ((2, 3),))
    assert cuts["back.bias"].held == (((0, 5),), ())


def test_experts_of_another_library_are_cut() -> None:
    from transformers.models.nllb_moe.configuration_nllb_moe import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeDenseActDense

    cuts = slice_expert(NllbMoeDenseActDense(NllbMoeConfig(d_model=4), 6), slices=2, where="0")
    assert {name: cut.held for name, cut in cuts.items() if "fc1" in name} == {
        "fc1.weight": (((0, 3),), ((3, 6),)),
        "fc1.bias": (((0, 3),), ((3, 6),)),
    }


def noisy(own: Any, rows: Tensor) -> Any:
    return gated(own, rows + torch.rand_like(rows))


def quantised(own: Any, rows: Tensor) -> Any:
    hidden = own.gate(rows) * own.up(rows)
    return own.down(hidden / hidden.detach().abs().amax(-1, keepdim=True))


REFUSED: dict[str, Callable[[Any, Tensor], Any]] = {
    "it is not what its last linear layer down.weight makes": lambda own, rows: rows + gated(own, rows),
    "features of gate.weight do not each go to hidden features of one slice": lambda own, rows: own.down(
        own.gate(rows).softmax(-1) * own.up(rows)
    ),
    "slice 0 gives its linear layers something else than the whole expert": quantised,
    "it draws random numbers": noisy,
    "gate.weight is used otherwise than by a linear layer": lambda own, rows: own.down(
        (rows @ own.gate.weight.mT) * own.up(rows)
    ),
    "its parameters are not each used by one call of a linear layer": lambda own, rows: own.down(own.up(rows)),
    "features of up.weight do not each go": lambda own, rows: own.gate(own.down(own.up(rows))),
    "it calls no linear layer": lambda own, rows: rows,
    "it cannot be followed (AttributeError: 'Written' object has no attribute 'other')": lambda own, rows: own.other(
        rows
    ),
    "it cannot be followed": lambda own, rows: own.down(functional.relu_(own.gate(rows)).mul_(own.up(rows))),
    "it is not what": lambda own, rows: (gated(own, rows), None),
    "it drops elements that are no hidden features": lambda own, rows: gated(own, functional.dropout(rows, 0.5)),
    "not by nn.Dropout": lambda own, rows: own.down(functional.dropout(own.gate(rows) * own.up(rows), 0.5)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_seen_to_be_a_sum_of_slices_is_refused(why: str) -> None:
    with pytest.raises(SwapError) as caught:
        slice_expert(Written(REFUSED[why]), slices=2, where="mlp.experts.0")
    assert str(caught.value).startswith("expert mlp.experts.0 is not seen to be the sum of 2 slices: ")
    assert why in str(caught.value)
    assert str(caught.value).endswith("; use one slice")
    with pytest.raises(SwapError, match="it has 7 hidden features"):
        slice_expert(Written(gated), slices=8, where="0")


def test_dropout_of_hidden_features_may_stay_and_no_other() -> None:
    assert slice_expert(Written(gated, p=0.5), slices=2, where="0")
    assert draws(Written(gated, p=0.5))
    with pytest.raises(SwapError, match="it drops elements that are no hidden features"):
        slice_expert(Written(lambda own, rows: own.drop(gated(own, rows)), p=0.5), slices=2, where="0")


def test_experts_are_alike_whose_weights_alone_differ() -> None:
    assert form_of(Written(gated)) == form_of(Written(gated))
    others = (Written(in_place), Written(gated, inner=8), Written(gated, p=0.1))
    assert all(form_of(Written(gated)) != form_of(each) for each in others)


def test_cutting_leaves_an_expert_as_it_was() -> None:
    expert = Written(gated).eval()
    before = {name: each.clone() for name, each in expert.state_dict().items()}
    slice_expert(expert, slices=2, where="0")
    assert not expert.training
    assert all(torch.equal(each, before[name]) for name, each in expert.state_dict().items())
