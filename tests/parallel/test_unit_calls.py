"""How a model calls its modules."""

import torch
from torch import nn

from meshwright.parallel.unit_calls import calls_of, signature_of


def test_the_first_call_of_each_unit_is_kept_with_what_an_earlier_unit_made() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    calls = calls_of(model, lambda: model(torch.ones(3, 4)), ["0", "1"])
    assert [tuple(call.args[0].shape) for call in calls.values()] == [(3, 4), (3, 4)]
    assert not calls["0"].passed_on
    assert calls["1"].passed_on == {0}


def test_units_are_told_apart_by_settings_shapes_and_what_they_are_given() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    calls = calls_of(model, lambda: model(torch.ones(3, 4).requires_grad_()), ["0", "1", "2"])
    first, second, third = (signature_of(model.get_submodule(path), call) for path, call in calls.items())
    assert first == second != third
    assert signature_of(model[0], calls["0"], "dealt otherwise") != first
