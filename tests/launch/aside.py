"""A run that is left alone and found again from other terminals: one contract for every cluster."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from meshwright.clusters.sweep import carriers
from tests.launch.waiting import eventually, kill_all

__all__ = ["SLEEP", "check_left_alone"]

SLEEP = "import os, time; print('up', os.environ['RANK'], flush=True); time.sleep(600)"
"""What every rank of such a run does."""

_CLI = (sys.executable, "-m", "meshwright.launch.cli")


class _Terminal:
    """Another terminal of the same user."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder, self._env = folder, dict(env)

    def type(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*_CLI, *words], cwd=self._folder, env=self._env, capture_output=True, text=True, timeout=120, check=False
        )

    @contextmanager
    def typing(self, *words: str) -> Iterator["subprocess.Popen[str]"]:
        """A command that lasts."""
        found = subprocess.Popen(
            [*_CLI, *words],
            cwd=self._folder,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield found
        finally:
            found.kill()
            found.communicate()


def check_left_alone(run_dir: Path, env: Mapping[str, str], *words: str, ranks: int) -> None:
    """Detaches a run of `SLEEP`, then lists it, reads it, follows it and ends it, each from a terminal of its own.

    Args:
        run_dir: of the run, three folders below the current one.
        env: of all terminals.
        words: of the launch.
        ranks: how many it has.
    """
    run_id, here = run_dir.name, _Terminal(run_dir.parents[2], env)
    merged = run_dir / "merged.log"
    try:
        done = here.type("launch", *words, "--run-id", run_id, "--detach")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"meshwright attach {run_id}" in done.stdout
        up = eventually(lambda: merged.exists() and merged.read_text().count("| up") == ranks)
        assert up, (run_dir / "launcher.log").read_text()
        with here.typing("attach", run_id) as attached, here.typing("logs", run_id, "-f") as followed:
            _look(here, run_id, ranks)
            assert attached.poll() is followed.poll() is None, "they wait for the end"
            assert "was asked to end" in here.type("cancel", run_id).stdout
            seen, told = (each.communicate(timeout=120)[0] for each in (attached, followed))
            codes = attached.returncode, followed.returncode
        left = list(carriers(run_id))
    finally:
        kill_all(carriers(run_id))
    assert codes == (143, 0), seen + told
    assert all(f":{rank} | up {rank}\n" in text for rank in range(ranks) for text in (seen, told))
    assert f"run directory: {run_dir}" in seen
    assert left == []
    assert json.loads(here.type("ps", "--json").stdout) == {"runs": []}
    assert run_id in here.type("ps", "--all").stdout


def _look(here: _Terminal, run_id: str, ranks: int) -> None:
    """While it runs."""
    (run,) = json.loads(here.type("ps", "--json").stdout)["runs"]
    assert (run["run_id"], run["state"]) == (run_id, "running")
    said = here.type("logs", run_id, "--rank", str(ranks - 1)).stdout
    assert said.endswith(f":{ranks - 1} | up {ranks - 1}\n")
    wrong = here.type("logs", run_id, "--rank", "9")
    assert (wrong.returncode, f"the run has ranks 0 to {ranks - 1}" in wrong.stderr) == (64, True)
