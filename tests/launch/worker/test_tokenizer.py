from pathlib import Path

import pytest

from meshwright.launch.worker.corpus import Document
from meshwright.launch.worker.errors import CorpusError, CorpusMissingError
from meshwright.launch.worker.tokenizer import byte_tokenizer, make_tokenizer

TEXTS = [Document("a", b"the cat sat on the mat " * 20), Document("b", "déjà vu ".encode() * 20)]


def test_bytes_are_tokens_and_the_separator_is_none_of_them() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode([bytes(range(256))])[0].tolist() == list(range(256))
    assert tokenizer.separator == 256 == tokenizer.vocab_size - 1


def test_bpe_depends_on_its_documents_alone_and_is_shorter_than_bytes() -> None:
    pytest.importorskip("tokenizers", reason="the extra 'hf' is not installed")
    one, same = (make_tokenizer({"bpe": {"vocab_size": 300}}, TEXTS) for _ in range(2))
    encoded = one.encode([each.content for each in TEXTS])
    assert [each.tolist() for each in encoded] == [each.tolist() for each in same.encode([t.content for t in TEXTS])]
    assert all(len(short) < len(text.content) for short, text in zip(encoded, TEXTS, strict=True))
    assert max(int(each.max()) for each in encoded) < one.vocab_size <= 300


def test_a_tokenizer_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the extra 'hf' is not installed")
    with pytest.raises(CorpusMissingError, match=r"gone\.json"):
        make_tokenizer({"file": str(tmp_path / "gone.json")}, TEXTS)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CorpusError, match=r"bad\.json"):
        make_tokenizer({"file": str(tmp_path / "bad.json")}, TEXTS)
