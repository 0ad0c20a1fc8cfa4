"""The threads of a rank: they read the others, end a rank that hangs with the reason, and leave a moving one alone."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from threading import Event

import pytest
import torch.distributed as dist

from meshwright.parallel.board import Board, FolderBoard
from meshwright.parallel.hang import EXIT_CODE
from meshwright.parallel.progress import Call, Progress, Words
from meshwright.parallel.watchdog import Guard, Watchdog, guard, unguard

LIMIT_S = 1.0


class Rank:
    """A rank of this process: its progress, its watchdog, the code it left with."""

    def __init__(
        self, number: int, folder: Path, *, warn: bool = False, limit_s: float = LIMIT_S, board: Board | None = None
    ) -> None:
        self.codes: list[int] = []
        self.progress = Progress()
        self.progress.begin(1)
        self.progress.end()
        asked = Guard(limit_s, warn, folder, self.progress)
        self.watchdog = Watchdog(
            number, 2, board=board or FolderBoard(folder / "ranks"), asked=asked, leave=self.codes.append
        )
        self.watchdog.start()

    def wait(self, *, limit_s: float = 60.0) -> None:
        end_s = time.monotonic() + limit_s
        while not self.codes and time.monotonic() < end_s:
            time.sleep(0.01)


def test_a_rank_that_waits_names_the_one_that_computes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = [Rank(0, tmp_path), Rank(1, tmp_path)]
    ranks[1].progress.to(Words("reading a batch"))
    ranks[0].progress.to(Call("all_reduce over dp", (1,)), 4)
    for each in ranks:
        each.wait()
        each.watchdog.stop()
    assert EXIT_CODE in ranks[0].codes + ranks[1].codes
    told = json.loads((tmp_path / "errors/hang-0.json").read_text())
    assert told["suspects"] == [1]
    assert told["ranks"]["0"] == "waits for rank 1 at all_reduce over dp (number 4)"
    assert "hang: rank 1 has been at reading a batch for 1 s" in capfd.readouterr().err
    assert "test_a_rank_that_waits" in told["stacks"][str(told["found_by"])], "the main thread's stack"


@pytest.mark.slow
def test_a_slow_rank_that_moves_is_left_alone_with_those_that_wait_for_it(tmp_path: Path) -> None:
    ranks = [Rank(0, tmp_path, limit_s=2 * LIMIT_S), Rank(1, tmp_path, limit_s=2 * LIMIT_S)]
    ranks[0].progress.to(Call("all_reduce over dp", (1,)), 4)
    end_s = time.monotonic() + 5 * LIMIT_S
    while time.monotonic() < end_s:
        ranks[1].progress.to(Words("forward"))
        time.sleep(LIMIT_S / 4)
    assert [each.codes for each in ranks] == [[], []]
    for each in ranks:
        each.watchdog.stop()


@pytest.mark.slow
def test_a_warning_is_given_once_and_ends_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = [Rank(0, tmp_path, warn=True), Rank(1, tmp_path, limit_s=100.0)]
    time.sleep(3 * LIMIT_S)
    for each in ranks:
        each.watchdog.stop()
    assert ranks[0].codes == []
    assert capfd.readouterr().err.count("hang:") == 1


@pytest.mark.slow
def test_a_rank_that_left_in_peace_is_not_missed(tmp_path: Path) -> None:
    ranks = [Rank(0, tmp_path), Rank(1, tmp_path)]
    ranks[1].watchdog.stop()
    end_s = time.monotonic() + 2 * LIMIT_S
    while time.monotonic() < end_s:
        ranks[0].progress.to(Words("plotting"))
        time.sleep(LIMIT_S / 4)
    assert ranks[0].codes == []
    ranks[0].wait()
    ranks[0].watchdog.stop()
    told = json.loads((tmp_path / "errors/hang-0.json").read_text())
    assert told["suspects"] == [0]


class Dead:
    """A board that never answers."""

    def put(self, rank: int, text: str) -> None:
        Event().wait()

    def read(self, ranks: Iterable[int]) -> dict[int, str]:
        raise AssertionError(ranks)


def test_a_board_that_does_not_answer_ends_the_rank_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    alone = Rank(0, tmp_path, board=Dead())
    alone.progress.to(Call("all_reduce over dp", (1,)), 4)
    alone.wait()
    assert alone.codes == [EXIT_CODE]
    words = "hang: rank 0 waits at all_reduce over dp (number 4) and cannot reach the other ranks' notes"
    assert words in capfd.readouterr().err


def test_nobody_watches_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_store() -> None:
        raise AssertionError("a folder is there")

    meeting = f"file://{tmp_path}/meet"
    monkeypatch.delenv("MESHWRIGHT_HANG_S", raising=False)
    assert guard(0, 1, hang_s=None, meeting=meeting, store=no_store) is None
    monkeypatch.setenv("MESHWRIGHT_HANG_S", "300")
    monkeypatch.delenv("MESHWRIGHT_RUN_DIR", raising=False)
    try:
        assert guard(0, 1, hang_s=None, meeting=meeting, store=no_store) is not None
    finally:
        unguard()
    told = json.loads((tmp_path / "meet-progress/0/progress.json").read_text())
    assert told["left"] is True


APART = """
import os, time
import torch
from meshwright.parallel.collectives import gather_integers, start_ranks
from meshwright.parallel.progress import HERE, doing
here = start_ranks()
HERE.begin(1)
gather_integers(0)
HERE.end()
doing("reading a batch")
while here.rank == 1:
    time.sleep(1)
gather_integers(1)
"""


@pytest.mark.slow
def test_of_ranks_whose_hosts_have_run_directories_of_their_own_the_one_that_is_behind_is_named(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    met = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = []
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        place = {"RANK": str(rank), "WORLD_SIZE": "3", "MESHWRIGHT_RUN_DIR": str(tmp_path / str(rank))}
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "MESHWRIGHT_HANG_S": "4", **met, **place}
        ranks.append(subprocess.Popen([sys.executable, "-c", APART], env=env, stderr=subprocess.PIPE, text=True))
    try:
        told = [each.communicate(timeout=90)[1] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    assert EXIT_CODE in [each.returncode for each in ranks]
    records = [json.loads(each.read_text()) for each in tmp_path.glob("*/errors/hang-0.json")]
    assert {tuple(each["suspects"]) for each in records} == {(1,)}, told
    assert all("reading a batch" in each["ranks"]["1"] for each in records)
    assert all((tmp_path / f"{rank}/ranks/{rank}/progress.json").exists() for rank in range(3)), "each keeps its record"
