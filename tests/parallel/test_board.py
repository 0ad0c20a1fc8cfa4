"""What one rank writes, the others read, through a folder and through torch's store."""

from pathlib import Path

import pytest
import torch.distributed as dist

from meshwright.parallel.board import Board, FolderBoard, StoreBoard


def _boards(kind: str, folder: Path) -> tuple[Board, Board]:
    if kind == "folder":
        return FolderBoard(folder), FolderBoard(folder)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    return StoreBoard(store), StoreBoard(dist.PrefixStore("", store).underlying_store)


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_the_last_word_of_each_rank_is_read_and_missing_ones_are_left_out(kind: str, tmp_path: Path) -> None:
    mine, other = _boards(kind, tmp_path)
    mine.put(0, "first")
    mine.put(0, "second")
    other.put(2, "ü")
    assert other.read([0, 1, 2]) == {0: "second", 2: "ü"}
    assert mine.read([1]) == {}
