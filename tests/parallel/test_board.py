"""What one rank writes, the others read, through a folder and through torch's store."""

from pathlib import Path

import pytest
import torch.distributed as dist

from meshwright.parallel.board import Board, FolderBoard, RecordedBoard, StoreBoard, board_of


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


def test_what_somebody_without_the_key_of_the_ranks_writes_is_not_read(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESHWRIGHT_BOARD_KEY", "ab" * 32)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    ours, stranger = StoreBoard(store), StoreBoard(store, "cd" * 32)
    ours.put(0, "own")
    stranger.put(1, "not own")
    StoreBoard(store, "").put(2, '{"left": true}')
    store.set("meshwright/progress/0/3", b"\xff\x00")  # type: ignore[arg-type]
    assert [ours.read(range(5)) for _ in range(2)] == [{0: "own"}] * 2
    assert capfd.readouterr().err.count("was not written by this run") == 3, "once of each"
    StoreBoard(store).put(1, "own, too")
    assert ours.read([0, 1]) == {0: "own", 1: "own, too"}


def test_a_run_directory_is_trusted_to_be_shared_only_where_ranks_met_inside_of_it(tmp_path: Path) -> None:
    def no_store() -> None:
        raise AssertionError("ranks met by a file")

    run_dir, other = tmp_path / "run", tmp_path / "other"
    assert isinstance(board_of(f"file://{run_dir}/private/ranks-0", run_dir, no_store), FolderBoard)
    assert isinstance(board_of(f"file://{other}", run_dir, no_store), RecordedBoard)
    assert isinstance(board_of(None, run_dir, object), RecordedBoard)
    assert isinstance(board_of("tcp://a:1", None, object), StoreBoard)


def test_a_record_that_cannot_be_written_keeps_no_word_from_the_others(tmp_path: Path) -> None:
    (tmp_path / "0").write_text("in the way")
    board = RecordedBoard(FolderBoard(tmp_path / "seen"), FolderBoard(tmp_path))
    board.put(0, "word")
    board.put(1, "other")
    assert board.read([0, 1]) == {0: "word", 1: "other"}
    assert FolderBoard(tmp_path).read([0, 1]) == {1: "other"}
