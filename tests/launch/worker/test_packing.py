import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.launch.worker.errors import CorpusError
from meshwright.launch.worker.packing import IGNORED, pack

SEPARATOR = 99
documents = st.lists(st.lists(st.integers(0, 9), max_size=9).map(torch.tensor), min_size=1, max_size=6)


@given(documents, st.integers(2, 8))
def test_no_token_is_lost_and_no_border_is_predicted(texts: list[torch.Tensor], length: int) -> None:
    stream = [token for text in texts for token in [*text.tolist(), SEPARATOR]]
    if len(stream) < length:
        with pytest.raises(CorpusError, match=r"fewer than data\.sequence_length"):
            pack(texts, separator=SEPARATOR, sequence_length=length, vocab_size=100)
        return
    packed = pack(texts, separator=SEPARATOR, sequence_length=length, vocab_size=100)
    assert packed.tokens.tolist() == stream
    starts = [0]
    for text in texts[:-1]:
        starts.append(starts[-1] + len(text) + 1)
    targets = []
    for window in range(len(packed)):
        batch = packed.batch([window])
        assert batch["input_ids"].shape == (1, length)
        first = min(window * length, len(stream) - length)
        kept = [first + place for place, label in enumerate(batch["labels"][0].tolist()) if label != IGNORED]
        assert all(batch["labels"][0, place - first] == stream[place] for place in kept)
        targets += kept
    assert len(targets) == len(set(targets)), "a token is a target once"
    assert not set(targets) & set(starts), "the first token of a document is no target"


def test_the_fingerprint_changes_with_tokens_borders_and_length() -> None:
    def mark(texts: list[list[int]], length: int = 2) -> int:
        return pack(
            [torch.tensor(each) for each in texts], separator=9, sequence_length=length, vocab_size=10
        ).fingerprint()

    assert len({mark([[1, 2, 3]]), mark([[1, 2, 4]]), mark([[1, 9, 3]]), mark([[1], [3]]), mark([[1, 2, 3]], 3)}) == 5
