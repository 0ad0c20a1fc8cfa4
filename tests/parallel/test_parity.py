import math
from dataclasses import replace

import torch

from meshwright.parallel.parity import Outcome, compare, relative_errors

LEFT = {"a": torch.tensor([1.0, 2.0]).double(), "b": torch.tensor([3.0]).double()}
RIGHT = {"a": torch.tensor([0.5, -1.0]).double(), "b": torch.tensor([1.0]).double()}
SUM = {name: LEFT[name] + RIGHT[name] for name in LEFT}
PLAIN = Outcome(2.0, SUM, 4.0, LEFT, [[1.0], [3.0]], [LEFT, RIGHT])


def report(found: Outcome):
    return compare(found, PLAIN, mesh="dp=2", dtype="float64", tolerance=1e-10)


def test_equal_outcomes_are_ok() -> None:
    assert report(PLAIN).ok
    assert report(PLAIN).notes == ()


def test_a_factor_is_named_with_its_parameter() -> None:
    found = report(replace(PLAIN, gradients={**SUM, "a": SUM["a"] * 2}))
    assert not found.ok
    assert found.worst_parameter == "a"
    assert "gradient of a is 2 x the plain one" in found.notes[0]


def test_a_missing_reduction_is_told_from_a_factor() -> None:
    found = report(replace(PLAIN, gradients={**SUM, "a": RIGHT["a"]}))
    assert "1 x the share of data rank 1 alone: a reduction is missing" in found.notes[0]


def test_swapped_data_is_seen_though_the_sum_is_the_same() -> None:
    found = report(replace(PLAIN, microbatch_losses=[[3.0], [1.0]]))
    assert not found.ok
    assert found.notes == (
        "data rank 0 worked on the samples of data rank 1",
        "data rank 1 worked on the samples of data rank 0",
    )


def test_a_gradient_that_is_missing_or_too_many_is_infinitely_wrong() -> None:
    found = report(replace(PLAIN, gradients={**SUM, "a": None}))
    assert found.max_relative_gradient_error == math.inf
    assert "gradient of a is missing" in found.notes[0]


def test_nan_is_never_ok() -> None:
    assert not report(replace(PLAIN, loss=math.nan)).ok
    assert report(replace(PLAIN, weights={**LEFT, "a": LEFT["a"] * math.nan})).worst_weight == "a"
    assert not report(replace(PLAIN, weights={**LEFT, "a": LEFT["a"] * math.nan})).ok


def test_a_gradient_that_is_zero_in_theory_does_not_divide_noise_by_noise() -> None:
    errors = relative_errors(
        {"w": torch.ones(1), "k": torch.tensor([2e-17])}, {"w": torch.ones(1), "k": torch.tensor([1e-17])}
    )
    assert errors["k"] < 1e-10


def test_the_report_prints_and_serialises() -> None:
    text = str(report(replace(PLAIN, gradients={**SUM, "a": SUM["a"] * 2})))
    assert "NOT equal to the plain run" in text
    assert "worst: a" in text
    assert report(PLAIN).as_dict()["ok"] is True
