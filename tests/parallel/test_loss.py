from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from meshwright.parallel.errors import LossError
from meshwright.parallel.loss import LossContract, LossItems, loss_of

SCORES = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([1, -100, 0, 3])
WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight": WEIGHT},
        {"label_smoothing": 0.1},
        {"weight": WEIGHT, "label_smoothing": 0.1},
        {"ignore_index": 3},
    ],
)
def test_mean_times_counted_items_is_the_sum_of_class_losses(settings) -> None:
    targets = CLASSES.clamp(min=0) if "ignore_index" in settings else CLASSES
    with LossItems() as counted:
        loss = functional.cross_entropy(SCORES, targets, **settings)
    total = functional.cross_entropy(SCORES, targets, reduction="sum", **settings)
    torch.testing.assert_close(loss * counted.items(loss), total)


@pytest.mark.parametrize(
    ("function", "items"),
    [
        (lambda: functional.mse_loss(SCORES, SCORES + 1), 20),
        (lambda: functional.l1_loss(SCORES, SCORES + 1), 20),
        (lambda: functional.kl_div(SCORES, SCORES.exp(), reduction="batchmean"), 4),
        (lambda: functional.cross_entropy(SCORES, SCORES.softmax(-1)), 4),
        (lambda: functional.cross_entropy(SCORES.T[None], SCORES.T[None].softmax(1)), 4),
        (lambda: nn.NLLLoss()(SCORES, CLASSES), 3),
        (lambda: functional.binary_cross_entropy_with_logits(SCORES[:2], SCORES[:2].sigmoid()), 10),
    ],
)
def test_items_are_what_torch_divides_by(function, items: int) -> None:
    with LossItems() as counted:
        loss = function()
    assert float(counted.items(loss)) == items


def test_the_call_that_made_the_loss_is_counted_among_several() -> None:
    with LossItems() as counted:
        functional.mse_loss(SCORES, SCORES)
        loss = functional.cross_entropy(SCORES, CLASSES)
    assert float(counted.items(loss)) == 3


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: functional.cross_entropy(SCORES, CLASSES, reduction="sum") / 7, "cross_entropy(reduction='sum')"),
        (lambda: functional.mse_loss(SCORES, SCORES) + functional.l1_loss(SCORES, SCORES), "2 mean-reduced loss calls"),
        (SCORES.mean, "no mean-reduced loss call"),
    ],
)
def test_a_loss_whose_items_are_unknown_is_refused_with_the_way_out(function, text: str) -> None:
    with LossItems() as counted:
        loss = function()
    with pytest.raises(LossError) as caught:
        counted.items(loss)
    assert text in str(caught.value)
    assert "loss_items=" in str(caught.value)


def test_items_come_from_a_batch_key_a_function_or_the_samples() -> None:
    batch = {"mask": torch.tensor([1, 0, 1])}
    loss = torch.tensor(2.0)
    assert float(LossContract("token_mean", "mask").run(lambda: loss, batch)[1]) == 2
    assert float(LossContract("token_mean", lambda b: b["mask"].numel()).run(lambda: loss, batch)[1]) == 3
    assert float(LossContract("sample_mean").run(lambda: loss, batch)[1]) == 3
    assert float(LossContract("sum").run(lambda: loss, batch)[1]) == 1


@pytest.mark.parametrize(
    "output",
    [torch.tensor(2.0), {"loss": torch.tensor(2.0)}, SimpleNamespace(loss=torch.tensor([2.0])), (torch.tensor(2.0), 1)],
)
def test_the_loss_is_found_in_every_usual_output(output) -> None:
    assert float(loss_of(output)) == 2.0


@pytest.mark.parametrize("output", [torch.zeros(3), {"logits": torch.zeros(1)}, SimpleNamespace(loss=None), None])
def test_an_output_without_loss_says_what_was_found(output) -> None:
    with pytest.raises(LossError, match="the model returned no loss"):
        loss_of(output)


def test_unknown_contracts_and_keys_name_the_nearest() -> None:
    with pytest.raises(LossError, match="did you mean 'token_mean'"):
        LossContract("token_means")  # type: ignore[arg-type]
    with pytest.raises(LossError, match="did you mean 'mask'"):
        LossContract("token_mean", "masks").run(lambda: torch.tensor(1.0), {"mask": torch.ones(1)})
