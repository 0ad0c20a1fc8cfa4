from pathlib import Path

import pytest

from meshwright.launch.worker.corpus import Document, find_files, read_documents, split_documents
from meshwright.launch.worker.errors import CorpusError, CorpusMissingError


def test_the_standard_library_is_there_and_its_tests_are_not() -> None:
    names = [name for name, _ in find_files("python-stdlib")]
    assert "argparse.py" in names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert names == [name for name, _ in find_files("python-stdlib")]


def test_patterns_are_read_up_to_a_number_of_bytes(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * 10)
    (tmp_path / "empty.txt").write_bytes(b"")
    found = read_documents([str(tmp_path / "*.txt")], max_bytes=25)
    assert sum(len(each.content) for each in found) == 25
    assert all(each.content for each in found)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusMissingError, match=r"nothing\.txt' matches no file"):
        read_documents([str(tmp_path / "nothing.txt")])
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(CorpusError, match="holds no text"):
        read_documents([str(tmp_path / "empty.txt")])


def test_documents_are_held_out_whole_and_never_learnt_from() -> None:
    texts = [Document(str(number), b"x" * (number + 1)) for number in range(30)]
    training, held_out = split_documents(texts, 0.2)
    assert {each.name for each in training} & {each.name for each in held_out} == set()
    assert len(training) + len(held_out) == 30
    assert sum(len(each.content) for each in held_out) >= 0.2 * 465
    assert split_documents(texts, 0.0)[1] == []
    with pytest.raises(CorpusError, match="takes all 30 documents"):
        split_documents(texts, 0.999)
