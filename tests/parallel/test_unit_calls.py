"""How a model calls its modules."""

import torch
from torch import nn

from meshwright.parallel.unit_calls import calls_of, handed_on, signature_of


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


class _Loop(nn.Module):
    """Three blocks; `between` says behind which of them code stands, `kept` of which the output is used later."""

    def __init__(self, between: tuple[int, ...] = (), kept: tuple[int, ...] = (), order: tuple[int, ...] = (0, 1, 2)):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.between, self.kept, self.order = between, kept, order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for number in self.order:
            x = self.blocks[number](x)
            assert x.dtype is torch.float32, "what is alike of a part may be asked for"
            if number in self.kept:
                kept.append(x)
            if number in self.between:
                x.mul_(2.0)
        return torch.stack([x, *kept]).sum()


def _runs(**how: tuple[int, ...]) -> list[str]:
    model = _Loop(**how)
    paths = [f"blocks.{number}" for number in range(3)]
    calls = calls_of(model, lambda: model(torch.ones(2, 3, 4)), paths)
    return ["".join(path[-1] for path in run) for run in handed_on(paths, calls, dict.fromkeys(paths, 0))]


def test_blocks_that_give_on_what_the_one_before_gave_are_one_run() -> None:
    assert _runs() == ["012"]
    assert _runs(kept=(2,)) == ["012"]


def test_a_run_ends_where_code_changes_the_stream_or_uses_it_later() -> None:
    assert _runs(between=(1,)) == ["01", "2"]
    assert _runs(kept=(0,)) == ["0", "12"]
    assert _runs(between=(0, 1)) == ["0", "1", "2"]


def test_runs_are_in_the_order_of_calls_and_hold_in_every_call() -> None:
    assert _runs(order=(2, 1, 0)) == ["210"]
    assert _runs(order=(0, 1, 2, 0, 1, 2)) == ["012"]
    assert _runs(order=(0, 1, 2, 0, 2, 1)) == ["0", "1", "2"]


def test_blocks_that_were_not_called_stay_with_the_others() -> None:
    assert handed_on(["0", "1"], {}, {"0": 0, "1": 0}) == [("0", "1")]
