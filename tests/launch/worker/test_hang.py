"""A rank that stops or dies in the middle of a pipeline's schedule: the job ends soon, and with its name."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from meshwright.launch.worker import __main__ as program
from meshwright.parallel.progress import Progress, Words
from tests.launch.waiting import least_s
from tests.launch.worker.runs import run_dir, start, write_job

pytestmark = pytest.mark.slow

KILL_LIMIT_S = 5.0
HANG_S = 4

MODEL = """
import os
import time
from pathlib import Path

from torch import nn

from tiny import Tiny


class Falling(nn.Module):
    '''Sends its own rank the signal that the file `signal` names: its number, and the rank.'''

    def forward(self, hidden):
        if self.training and Path("signal").exists():
            number, rank = Path("signal").read_text().split()
            if os.environ["RANK"] == rank:
                time.sleep(1.5)  # so that it tells where it is
                Path("fell").write_text(str(time.time()))
                os.kill(os.getpid(), int(number))
        return hidden


def build(width):
    model = Tiny(width, 0.0)
    model.layers[1].append(Falling())
    return model
"""


def fall(folder: Path, number: signal.Signals, rank: int, *overrides: str, parallel: str) -> tuple[float, Any]:
    """Lets a rank of a running job fall in a forward; returns how long the job went on, and its record."""
    job = write_job(folder, parallel=parallel, steps=100_000, every=100_000)
    (folder / "falling.py").write_text(MODEL)
    process = start(job, "r", 'model.python="falling:build"', *overrides)
    try:
        return _fallen(job, process, f"{int(number)} {rank}")
    finally:
        process.kill()


def _fallen(job: Path, process: "subprocess.Popen[str]", told: str) -> tuple[float, Any]:
    metrics = run_dir(job, "r") / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step":2,' in metrics.read_text()):
        time.sleep(0.05)
    part = job.parent / "signal.part"
    part.write_text(told)
    part.rename(job.parent / "signal")
    process.communicate(timeout=240)
    fell = job.parent / "fell"  # a machine that stands still for seconds has ranks that hang before
    taken_s = time.time() - float(fell.read_text()) if fell.exists() else float("inf")
    return taken_s, json.loads((run_dir(job, "r") / "exit.json").read_text())


def test_a_rank_that_stops_answering_is_named_with_its_action_within_the_limit(tmp_path: Path) -> None:
    told: Any = {}

    def stopped_s(number: int) -> float:
        asked = f"failure.hang.no_progress_for={HANG_S}s"
        parallel = "{pp: 2, schedule: modular, num_microbatches: 2}"
        taken_s, found = fall(tmp_path / str(number), signal.SIGSTOP, 1, asked, parallel=parallel)
        told.update(found)
        return taken_s

    assert least_s(stopped_s, HANG_S + 4) < HANG_S + 4, told
    assert told["exit_code"] == 125
    assert told["first_failure"]["rank"] == 1
    assert re.search(
        r"hang: rank 1 \(pp=1\) has not answered for \d s \(its process is stopped by a signal\); "
        r"it was last heard of at step \d+, 1F([01]) \(forward, stage 1, micro-batch \1\); "
        r"rank 0 waits for rank 1 at step \d+, 0RECV_B\d",
        told["reason"],
    ), told["reason"]
    assert [victim["rank"] for victim in told["victims"]] == [0]
    assert "in wait" in told["victims"][0]["traceback"], "stacks of the ranks that can tell are kept"


def test_a_killed_rank_ends_the_job_in_five_seconds_and_is_named(tmp_path: Path) -> None:
    told: Any = {}

    def killed_s(number: int) -> float:
        parallel = "{pp: 2, dp: 2, schedule: modular, num_microbatches: 2}"
        asked = "failure.hang.no_progress_for=600s"
        taken_s, found = fall(tmp_path / str(number), signal.SIGKILL, 3, asked, parallel=parallel)
        told.update(found)
        return taken_s

    assert least_s(killed_s, KILL_LIMIT_S) < KILL_LIMIT_S, told
    assert told["exit_code"] == 137
    first = told["first_failure"]
    assert (first["rank"], first["signal"]) == (3, "SIGKILL")
    assert re.search(r"; last: 1F[01] \(forward, stage 1, micro-batch [01]\) in step \d+$", first["evidence"]), first
    assert sorted(victim["rank"] for victim in told["victims"]) == [0, 1, 2]


def test_an_error_record_says_what_the_rank_was_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Progress()
    monkeypatch.setattr(program, "HERE", here)
    for words in ("", "backward in step 8"):
        program._record(tmp_path, ValueError("no"))
        assert json.loads((tmp_path / "errors/rank-0.json").read_text())["at"] == words
        here.begin(8)
        here.to(Words("backward"))


def test_of_a_collective_that_timed_out_torchs_record_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr(program, "save", lambda *words: kept.append(words))
    program._record(tmp_path, ValueError("Timed out"))
    program._record(tmp_path, RuntimeError("Connection closed by peer"))
    assert kept == []
    program._record(tmp_path, RuntimeError("[unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"))
    assert kept == [(tmp_path, 0)]


OWN = """
import os
from pathlib import Path

import torch
import torch.distributed as dist

from tiny import Tiny


class Alone(Tiny):
    def forward(self, input_ids, labels, **more):
        if self.training and Path("signal").exists() and os.environ["RANK"] == "2":
            dist.all_reduce(torch.ones(7), group=OWN[0])
        return super().forward(input_ids, labels, **more)


OWN = []


def build(width):
    if dist.is_initialized():
        OWN.append(dist.new_group(group_desc="own"))
    return Alone(width, 0.0)
"""


def test_a_collective_of_the_models_own_that_one_rank_calls_alone_is_named_as_torch_saw_it(tmp_path: Path) -> None:
    job = write_job(tmp_path, parallel="{dp: 3}", steps=100_000, every=100_000)
    (tmp_path / "falling.py").write_text(OWN)
    asked = ('model.python="falling:build"', f"failure.hang.no_progress_for={HANG_S}s", "train.batch_size=9")
    process = start(job, "r", *asked)
    try:
        metrics = run_dir(job, "r") / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and '"step":2,' in metrics.read_text()):
            time.sleep(0.05)
        (tmp_path / "signal").touch()
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    found = json.loads((run_dir(job, "r") / "exit.json").read_text())
    assert found["exit_code"] == 125, output
    assert found["first_failure"]["rank"] == 2, found["reason"]
    call = r"inside all_reduce \(torch: all_reduce number 1 of process group \w+ \(own\), Float \[\[7\]\], scheduled; "
    absent = r"not joined by rank 0 \(its last is number 0\), rank 1 \(its last is number 0\)\)"
    assert re.search(call + absent, found["reason"]), found["reason"]
    for rank in range(3):
        kept = json.loads((run_dir(job, "r") / f"hang/fr-rank-{rank}.json").read_text())
        assert kept["entries"]
