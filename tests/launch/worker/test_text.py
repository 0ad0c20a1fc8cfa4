"""Batches of unequal lengths on ranks: one loss, whatever the layout and the form; and what a run keeps of them."""

from itertools import pairwise
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.launch.worker.samples import Samples, cut_documents
from meshwright.launch.worker.text import Text
from meshwright.parallel.promote import Promote
from meshwright.testing import run_ranks
from tests.parallel.models import VOCABULARY, gpt2, llama

LENGTH = 24
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}


def samples(form: str, number: int = 40, seed: int = 0, multiple: int = 1) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(number, generator=generator) * 0.9 + 2).exp().int().clamp(1, 60).tolist()
    texts = [torch.randint(0, VOCABULARY - 1, (length,), generator=generator) for length in lengths]
    sizes: dict[str, Any] = {"separator": VOCABULARY - 1, "sequence_length": LENGTH, "vocab_size": VOCABULARY}
    return cut_documents(texts, **sizes, form=form, multiple=multiple)  # type: ignore[arg-type]


def text(form: str, *, num_microbatches: int = 1, multiple: int = 1, **sorting: Any) -> Text:
    training, held_out = samples(form, multiple=multiple), samples(form, 12, 1, multiple)
    keywords = {"seed": 3, "batch_size": 8, "num_microbatches": num_microbatches, **sorting}
    return Text(training, held_out, VOCABULARY, **keywords)


def read(source: Text, step: int, degree: int) -> list[list[int]]:
    """The samples of a step on all ranks, as tokens, sorted."""
    rows = []
    for rank in range(degree):
        for part in source.training_batch(step, rank, degree):
            if (part["labels"] == -100).all():  # a rank that goes along
                continue
            starts = part["position_ids"][0] == 0
            borders = [*starts.nonzero().flatten().tolist(), len(starts)]
            rows += [part["input_ids"][0, a:b].tolist() for a, b in pairwise(borders)]
    return sorted(rows)


@pytest.mark.parametrize("sorting", [{"sort_window": 1}, {"sort_window": 4}, {"sort_window": None, "by_tokens": True}])
def test_a_step_reads_the_same_samples_on_any_number_of_ranks_and_in_both_forms(sorting: dict[str, Any]) -> None:
    packed = [text("packed", num_microbatches=parts, **sorting) for parts in (1, 2)]
    padded = [text("padded", num_microbatches=parts, **sorting) for parts in (1, 2)]
    for step in range(1, 9):
        expected = read(packed[0], step, 1)
        assert read(packed[0], step, 4) == read(packed[1], step, 2) == expected
        for source, degree in ((packed[1], 2), (padded[1], 2), (padded[0], 1)):
            size = source.training_size(step, degree)
            parts = [part for rank in range(degree) for part in source.training_batch(step, rank, degree)]
            assert len(parts) == degree * source.num_microbatches
            assert size.tokens == sum(map(len, expected))
            assert size.places == sum(part["input_ids"].numel() for part in parts)
        fillers = 2 * max(0, 4 - len(expected))  # of micro-batches without a sample
        assert packed[1].training_size(step, 2).places == sum(map(len, expected)) + fillers


def test_padding_falls_with_the_window() -> None:
    ratios = []
    for window in (1, 5, None):
        source = text("padded", sort_window=window)
        sizes = [source.training_size(step, 1) for step in range(1, 61)]
        ratios.append(1 - sum(each.tokens for each in sizes) / sum(each.places for each in sizes))
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 2 * ratios[-1] > 0


def test_a_checkpoint_of_other_batches_is_told_by_the_fingerprint_and_the_form_is_no_other_batch() -> None:
    marks = [
        text("padded", **sorting).fingerprint()
        for sorting in ({}, {"sort_window": 2}, {"sort_window": None}, {"sort_window": 2, "by_tokens": True})
    ]
    assert len(set(marks)) == 4
    assert text("packed", multiple=4).fingerprint() == marks[0]


def test_validation_reads_the_same_samples_however_training_is_sorted() -> None:
    held_out = [
        [part["input_ids"].tolist() for part in text("packed", sort_window=window).validation_batch(1, 0, 1)]
        for window in (1, None)
    ]
    assert held_out[0] == held_out[1]


def test_the_usual_length_lies_between_the_mean_and_the_longest() -> None:
    source = text("padded")
    lengths = source.training.lengths
    assert sum(lengths) / len(lengths) < source.usual_length < max(lengths)


def _train(build: Any, mesh: mw.Mesh, source: Text, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Losses of steps with updates between them, and a mean of the held-out text."""
    torch.set_num_threads(1)
    with Promote():
        example = {name: torch.zeros(1, LENGTH, dtype=torch.int64) for name in ("input_ids", "labels")}
        model = mw.parallelize(
            build().double(), mesh, num_microbatches=source.num_microbatches, example=example, **options
        )
        optimizer = model.make_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.3))
        losses = []
        for step in range(1, 5):
            losses.append(float(model.step(source.training_batch(step, model.data_rank, mesh.data_degree))))
            optimizer.step()
            optimizer.zero_grad()
        parts = source.validation_batch(0, model.data_rank, mesh.data_degree)
        sums = sum(torch.stack(model.evaluate(part)) for part in parts)
    return losses, sums.tolist()


RUNS: list[tuple[str, dict[str, int], int, dict[str, Any]]] = [
    ("padded", {"dp": 2}, 1, {}),
    ("packed", {}, 3, {}),
    ("packed", {"dp": 2}, 1, {}),
    ("packed", {"dp": 4}, 1, {}),
    ("packed", {"fsdp": 2}, 2, {"schedule": "layered"}),
    ("padded", {"fsdp": 2}, 2, {"zero_stage": 3}),
    ("packed", {"tp": 2}, 1, {"sequence_parallel": True}),
    ("padded", {"tp": 2}, 1, {}),
    ("packed", {"pp": 2}, 2, {"schedule": "1f1b"}),
    ("padded", {"pp": 2}, 2, {"schedule": "gpipe"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "window"), [("llama", 3), ("gpt2", None)])
def test_losses_do_not_depend_on_the_form_or_on_ranks_and_micro_batches(family: str, window: int | None) -> None:
    build = llama() if family == "llama" else gpt2(**STILL)
    sorting = {"sort_window": window, "by_tokens": window is None}  # by tokens, some micro-batches are empty
    plain, held_out = run_ranks(_train, mw.Mesh(), build, mw.Mesh(), text("padded", **sorting), {})[0]
    assert len(set(plain)) == len(plain)
    for form, degrees, parts, options in RUNS if family == "llama" else RUNS[:4]:
        mesh = mw.Mesh(**degrees)
        source = text(form, num_microbatches=parts, multiple=parts, **sorting)
        for losses, sums in run_ranks(_train, mesh, build, mesh, source, options):
            assert losses == pytest.approx(plain, rel=1e-12), (form, degrees)
            assert sums == pytest.approx(held_out, rel=1e-12), (form, degrees)
