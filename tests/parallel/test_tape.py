"""A recorded constructor gives the values of any one tensor, whatever made them."""

import numpy
import pytest
import torch
from torch import nn

from meshwright.parallel.errors import WrapError
from meshwright.parallel.tape import Tape


class Odd(nn.Module):
    """A constructor that views, shares, asks and loops."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(4, 6))
        nn.init.orthogonal_(self.first)
        self.doubled = nn.Parameter(torch.zeros(4, 6))
        self.tail = nn.Embedding(5, 3, padding_idx=2)
        self.cut = nn.Parameter(nn.init.trunc_normal_(torch.empty(50, 50), std=1.5))
        self.unfilled = nn.Parameter(torch.empty(3))
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)]
        self.register_buffer("mask", torch.tril(torch.ones(3, 3)).bool())
        with torch.no_grad():
            self.doubled.copy_(self.first * 2)
            self.doubled[1].fill_(9.0)
            self.first.view(-1)[:2] += 1.0
        self.first_row = self.first.detach()[0]


def recorded(seed: int = 0) -> tuple[Tape, Odd]:
    tape = Tape(seed)
    with tape.recording():
        model = Odd()
    return tape, model


def values(tape: Tape, tensor: torch.Tensor) -> torch.Tensor:
    return tape.values(tape.view(tensor))


def test_views_copies_and_in_place_changes_are_replayed_in_order() -> None:
    tape, model = recorded()
    first, doubled = values(tape, model.first), values(tape, model.doubled)
    before = first.clone()
    before.view(-1)[:2] -= 1.0
    assert torch.allclose(before @ before.T, torch.eye(4), atol=1e-6)  # orthogonal, as initialised
    assert torch.equal(doubled[1], torch.full((6,), 9.0))
    assert torch.allclose(doubled[[0, 2, 3]], 2 * before[[0, 2, 3]])
    assert torch.equal(values(tape, model.first_row), first[0])


def test_values_depend_on_the_seed_and_not_on_what_was_asked_before() -> None:
    (tape, model), (again, same), (other, different) = recorded(1), recorded(1), recorded(2)
    cut = values(tape, model.cut)
    values(again, same.tail.weight)
    assert torch.equal(values(again, same.cut), cut)
    assert torch.equal(values(tape, model.cut), cut)
    assert not torch.equal(values(other, different.cut), cut)
    assert float(cut.abs().max()) <= 2.0
    assert len(set(cut.flatten().tolist())) > 2400  # drawn, not repeated


def test_what_nobody_fills_is_zero_and_the_padding_row_too() -> None:
    tape, model = recorded()
    assert torch.equal(values(tape, model.unfilled), torch.zeros(3))
    tail = values(tape, model.tail.weight)
    assert bool((tail[2] == 0).all())
    assert not bool((tail[1] == 0).any())
    assert torch.equal(values(tape, model.mask), torch.tril(torch.ones(3, 3)).bool())


def test_questions_about_values_are_answered_while_recording() -> None:
    _, model = recorded()
    assert model.rates == [0.0, 0.25, 0.5]


def test_texts_of_recipes_are_equal_when_values_are() -> None:
    (one, model), (two, same), (three, other) = recorded(1), recorded(1), recorded(2)
    text = one.recipe(one.view(model.cut))
    assert text == two.recipe(two.view(same.cut))
    assert text != three.recipe(three.view(other.cut))
    assert text != one.recipe(one.view(model.tail.weight))


def test_a_tensor_with_values_that_changed_later_is_refused() -> None:
    given = torch.from_numpy(numpy.arange(3.0))
    tape = Tape(0)
    with tape.recording():
        made = torch.zeros(3, dtype=torch.float64) + given
    assert torch.equal(values(tape, made), given)
    given.add_(1.0)
    with pytest.raises(WrapError, match="was changed later"):
        values(tape, made)
