"""Nothing lost: a training killed at any moment and launched again ends with the bits of an undisturbed one."""

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.own import own
from tests.launch.waiting import kill_all
from tests.launch.worker.runs import differing, final_states, finish, losses, run_dir, start, train_here, write_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # torch's, about reading checkpoints
]

KILLS = int(os.environ.get("MESHWRIGHT_FAULTS", "0"))
STEPS = 60
KILLS_PER_RUN = 5  # then it is left alone and compared


def _alive(run_id: str) -> list[int]:
    """Processes that carry the run's id in their environment and are no zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            carries = f"MESHWRIGHT_RUN_ID={own(run_id)}".encode() in (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if carries and state != "Z":
            found.append(int(entry.name))
    return found


def _wait(condition: Callable[[], bool], process: subprocess.Popen[str], limit_s: float = 240.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition() and process.poll() is None and time.monotonic() < end_s:
        time.sleep(0.002)


def _kill_once(job: Path, run_id: str, generator: random.Random, *, in_save: bool) -> bool:
    """Starts the job and SIGKILLs it at a random moment, its launcher or one of its ranks.

    Returns whether the blow fell before the last step.
    """
    process = start(job, run_id)
    metrics = run_dir(job, run_id) / "metrics.jsonl"
    checkpoints = job.parent / "checkpoints"
    _wait(lambda: metrics.exists() and '"loss"' in metrics.read_text(), process)
    if in_save:
        _wait(lambda: any(checkpoints.glob(".step-*.partial")), process)
    else:
        time.sleep(generator.uniform(0.0, 0.5))
    ranks = _alive(run_id)
    target = generator.choice([process.pid, *ranks]) if process.poll() is None else process.pid
    if process.poll() is None:
        kill_all([target])
    process.communicate(timeout=240)
    end_s = time.monotonic() + 120
    while _alive(run_id) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert _alive(run_id) == []
    return f'"step":{STEPS},' not in metrics.read_text()


@pytest.mark.parametrize(
    ("parallel", "kills"),
    [
        ("{fsdp: 2, num_microbatches: 2}", 1),
        pytest.param("{dp: 2}", 2, marks=pytest.mark.wide),
        pytest.param("{pp: 2, schedule: modular, num_microbatches: 2}", 1, marks=pytest.mark.wide),
        *([("{dp: 4}", 1), ("{fsdp: 4}", 1)] if KILLS else []),  # nothing is saved otherwise on four ranks than on two
    ],
)
def test_a_killed_and_resumed_training_ends_with_the_same_bits(tmp_path: Path, parallel: str, kills: int) -> None:
    plain = write_job(tmp_path / "plain", parallel=parallel, steps=STEPS)
    train_here(plain, "plain")
    generator = random.Random(parallel)
    left, number = KILLS or kills, 0
    while left > 0:
        broken = write_job(tmp_path / f"broken-{number}", parallel=parallel, steps=STEPS)
        for attempt in range(min(left, KILLS_PER_RUN)):
            if not _kill_once(broken, f"killed-{attempt}", generator, in_save=left % 2 == 0):
                break
            left -= 1
        number += 1
        assert number <= 4 * (KILLS or kills), "trainings end before they can be killed"
        code, output = finish(broken, "last")
        assert code == 0, output
        assert losses(broken, "last") == losses(plain, "plain")
        assert differing(final_states(plain, STEPS), final_states(broken, STEPS)) == []
