"""Documents as samples: cut, padded, packed, dealt."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.launch.worker.errors import CorpusError
from meshwright.launch.worker.packing import IGNORED
from meshwright.launch.worker.samples import Samples, cut_documents
from meshwright.parallel.ragged import unpad_batch

SEPARATOR = 99
DOCUMENTS = st.lists(st.lists(st.integers(1, 90), max_size=17).map(torch.tensor), min_size=1, max_size=9)


def cut(texts: list[torch.Tensor], length: int = 6, form: str = "padded", multiple: int = 1) -> Samples:
    return cut_documents(
        [text.long() for text in texts],
        separator=SEPARATOR,
        sequence_length=length,
        vocab_size=100,
        form=form,  # type: ignore[arg-type]
        multiple=multiple,
    )


def rows_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    kept = batch["attention_mask"].bool()
    return [row[mask].tolist() for row, mask in zip(batch["input_ids"], kept, strict=True)]


@given(DOCUMENTS, st.integers(2, 9))
def test_samples_are_documents_cut_to_length_and_no_target_is_lost(texts: list[torch.Tensor], length: int) -> None:
    pieces = [
        stream[begin : begin + length]
        for stream in ([*text.tolist(), SEPARATOR] for text in texts)
        for begin in range(0, len(stream), length)
    ]
    expected = [piece for piece in pieces if len(piece) > 1]  # a token alone predicts nothing
    if not expected:
        with pytest.raises(CorpusError, match="no document holds a token"):
            cut(texts, length)
        return
    samples = cut(texts, length)
    batch = samples.batch(range(len(samples)))
    assert rows_of(batch) == expected
    assert list(samples.lengths) == [len(piece) for piece in expected]
    counted = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
    assert counted.sum(1).tolist() == [len(piece) - 1 for piece in expected]
    assert not counted[:, 0].any()


@given(DOCUMENTS, st.integers(1, 5), st.data())
def test_padded_and_packed_hold_the_same_and_places_count_them(
    texts: list[torch.Tensor], multiple: int, data: st.DataObject
) -> None:
    texts = [*texts, torch.tensor([1, 2, 3])]
    padded, packed = (cut(texts, form=form, multiple=multiple) for form in ("padded", "packed"))
    assert padded.fingerprint() == packed.fingerprint()
    chosen = data.draw(st.lists(st.integers(0, len(padded) - 1), max_size=6))
    one, other = padded.batch(chosen), packed.batch(chosen)
    for samples, batch in ((padded, one), (packed, other)):
        assert samples.places(chosen) == batch["input_ids"].numel()
        assert batch["input_ids"].shape[1] % multiple == 0
        assert {each.dtype for each in batch.values()} == {torch.int64}
    plain = unpad_batch(one)
    size = plain["input_ids"].shape[1]
    assert all(torch.equal(other[name][:, :size], plain[name]) for name in plain)
    assert (other["labels"][:, size:] == IGNORED).all(), "what fills a row up is no target"
    assert other["position_ids"][0, size:].tolist() == list(range(other["input_ids"].shape[1] - size))


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_a_micro_batch_without_samples_counts_nothing(form: str) -> None:
    batch = cut([torch.tensor([1, 2])], form=form).batch([])
    assert (batch["labels"] == IGNORED).all()
    assert batch["input_ids"].shape == (1, 2)
    assert batch.get("attention_mask", torch.ones(1)).all(), "a row without a key to look at would give NaN"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 8))
def test_every_sample_is_dealt_once_like_lengths_together_or_tokens_alike(lengths: list[int], parts: int) -> None:
    texts = [torch.ones(length, dtype=torch.int64) for length in lengths]
    for form in ("padded", "packed"):
        samples = cut(texts, 31, form)
        batch = sorted(range(len(samples)), key=samples.lengths.__getitem__)
        dealt = samples.deal(batch, parts)
        assert sorted(each for part in dealt for each in part) == sorted(batch)
        assert len(dealt) == parts
        if form == "padded":
            assert [each for part in dealt for each in part] == batch
        else:
            tokens = [sum(samples.lengths[each] for each in part) for part in dealt]
            assert max(tokens) - min(tokens) <= max(samples.lengths)


def test_the_fingerprint_changes_with_tokens_and_cuts() -> None:
    marks = {
        cut(texts, length).fingerprint()
        for texts, length in (
            ([torch.tensor([1, 2, 3])], 6),
            ([torch.tensor([1, 2, 4])], 6),
            ([torch.tensor([1, 2, 3])], 2),
            ([torch.tensor([1]), torch.tensor([3])], 6),
        )
    }
    assert len(marks) == 4
