"""Scores dealt by the vocabulary behave like the scores."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from meshwright.parallel.layout import deal
from meshwright.parallel.loss import items_of_graph
from meshwright.parallel.threads import ThreadAxis, run_threads
from meshwright.parallel.vocabulary import DealtScores

VOCABULARY = 7
TARGET = torch.tensor([0, 6, -100, 3, 5, 2])


def _loss(scores: Tensor) -> Tensor:
    return functional.cross_entropy(scores.float().view(-1, VOCABULARY).double(), TARGET)


def _shifted(scores: Tensor) -> Tensor:
    return functional.cross_entropy(scores[..., :-1, :].contiguous().view(-1, VOCABULARY), TARGET[:4])


def _capped(scores: Tensor) -> Tensor:
    return functional.cross_entropy(
        (torch.tanh(scores / 3.0) * 3.0).reshape(6, VOCABULARY), TARGET.abs() % 7, ignore_index=2
    )


def _summed(scores: Tensor) -> Tensor:
    return functional.cross_entropy(scores.view(6, VOCABULARY), TARGET, reduction="sum") * 2


def _each(scores: Tensor) -> Tensor:
    return functional.cross_entropy(scores.view(6, VOCABULARY), TARGET, reduction="none").square().sum()


def _smoothed(scores: Tensor) -> Tensor:
    return functional.cross_entropy(scores.view(6, VOCABULARY), TARGET, label_smoothing=0.1)


def _positions_last(scores: Tensor) -> Tensor:
    return functional.cross_entropy(scores.permute(0, 2, 1), TARGET.view(2, 3))


def _by_hand(scores: Tensor) -> Tensor:
    return scores.log_softmax(-1)[..., 2].sum() + scores.exp().sum().log()


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize(
    "use",
    [_loss, _shifted, _capped, _summed, _each, _smoothed, _positions_last, _by_hand],
    ids=lambda use: use.__name__,
)
def test_losses_and_gradients_are_those_of_whole_scores(use: Callable[[Tensor], Tensor], degree: int) -> None:
    whole = torch.randn(2, 3, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole.requires_grad_()
    expected = use(whole)
    expected.backward()

    def work(axis: ThreadAxis) -> tuple[Tensor, Tensor | None]:
        start, stop = deal(VOCABULARY, degree)[axis.rank]
        columns = whole.detach()[..., start:stop].clone().requires_grad_()
        loss = use(DealtScores.of(columns.clone(), axis, VOCABULARY))
        loss.backward()
        return loss.detach(), columns.grad

    found = run_threads(work, degree)
    tolerance = 1e-6 if use is _loss else 1e-12
    gradients = torch.cat([gradient for _, gradient in found if gradient is not None], -1)
    torch.testing.assert_close(gradients, whole.grad, rtol=tolerance, atol=tolerance)
    for loss, _ in found:
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=tolerance)


def test_a_learned_scale_gets_the_gradient_of_all_scores() -> None:
    whole = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0))
    plain = torch.tensor(2.0, requires_grad=True)
    functional.cross_entropy(whole * plain, TARGET).backward()

    def work(axis: ThreadAxis) -> Tensor | None:
        start, stop = deal(VOCABULARY, 2)[axis.rank]
        scale = torch.tensor(2.0, requires_grad=True)
        functional.cross_entropy(
            DealtScores.of(whole[:, start:stop].clone(), axis, VOCABULARY) * scale, TARGET
        ).backward()
        return scale.grad

    for gradient in run_threads(work, 2):
        torch.testing.assert_close(gradient, plain.grad)


def test_scores_have_the_shape_of_all_and_ask_nobody() -> None:
    scores = DealtScores.of(torch.zeros(2, 3, 4), _Nobody(), VOCABULARY)
    assert (scores.shape, scores.size(-1), scores.dim(), len(scores)) == ((2, 3, VOCABULARY), VOCABULARY, 3, 2)
    assert scores[:, 1:, :].half().shape == (2, 2, VOCABULARY)


def test_the_loss_knows_how_many_targets_it_counted() -> None:
    def work(axis: ThreadAxis) -> Any:
        scores = DealtScores.of(torch.zeros(6, 4 - axis.rank, requires_grad=True), axis, VOCABULARY)
        return items_of_graph(functional.cross_entropy(scores, TARGET))

    assert run_threads(work, 2) == [5.0, 5.0]


class _Nobody(ThreadAxis):
    def __init__(self) -> None:
        self.rank, self.size = 0, 2
