"""A calibration of this machine: real ranks, through `meshwright.clusters.calibrate_rank`."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshwright.clusters.calibrate import calibrated, this_machine, usable_gpus, written
from meshwright.clusters.calibration import CalibrationError, hardware_of
from meshwright.parallel.work import Product


@pytest.mark.slow
def test_two_ranks_of_this_machine_are_measured_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    said: list[str] = []
    found = calibrated(said.append, counts=(1, 2), gpus=0)
    assert said[0] == "starting 2 ranks on CPUs"
    assert [each for each in said if " of 2 ranks" in each] == [
        "collectives of 2 ranks in groups of 2",
        "waiting of 2 ranks",
    ]
    assert (set(found["by_ranks"]), found["calibrated"]["threads"]) == ({1, 2}, {1: 1, 2: 1})
    path = tmp_path / "machine.yaml"
    path.write_text(written(found), encoding="utf-8")
    gpu, reached = hardware_of(path, ranks=2)
    kinds = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"}
    assert set(reached.links.measured) == kinds
    assert reached.links.unsteady >= 0 < reached.compute.attention_backward
    small, large = (reached.matmul_s(Product(each, 512, 512, precision="fp32"), gpu) for each in (64, 1024))
    assert 1e-6 < small < large < 10
    assert gpu.memory_bytes == pytest.approx(this_machine().memory_bytes, rel=1e-3)
    assert found["calibrated"]["date"][:2] == "20"
    assert 0 <= found["calibrated"]["busy"] <= 1


def test_ranks_that_fail_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'rank 1: no such device' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CalibrationError, match="ranks failed while they measured: rank 1: no such device"):
        calibrated(lambda line: None, counts=(1, 2), gpus=0)
    assert usable_gpus() == 0


def test_the_machine_is_described_as_ranks_see_it() -> None:
    found = this_machine()
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.memory_bytes > 2**28
    assert found.processor


def test_no_rank_outlives_who_asked_for_numbers(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "meshwright.clusters.calibrate_rank", "gloo", str(tmp_path), "1,2,4", "300"]
    asks = f"import subprocess as s, time; print(s.Popen({words!r}).pid, flush=True); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", asks], stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout is not None
        first = int(asker.stdout.readline())
        deadline_s = time.monotonic() + 60
        while len(ranks := _children(first)) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        asker.kill()
        deadline_s = time.monotonic() + 5  # by themselves they would take longer, and nobody closes their output
        while any(map(_runs, [first, *ranks])) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert len(ranks) == 3
        assert not any(map(_runs, [first, *ranks]))


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
