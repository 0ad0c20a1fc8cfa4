"""A setup script hands on its environment, or fails with its own code."""

import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from meshwright.clusters.setup import SetupError, run_setup
from meshwright.clusters.sweep import sweep
from tests.launch.own import own

ENV = {"PATH": "/usr/bin:/bin", "GONE": "1"}


def test_the_environment_after_the_script_is_handed_on(tmp_path: Path) -> None:
    script = "export NEW='two\nlines'\nunset GONE\necho told"
    found = run_setup(script, cwd=str(tmp_path), env=ENV, log=tmp_path / "log")
    assert found["NEW"] == "two\nlines"
    assert "GONE" not in found
    assert (tmp_path / "log").read_text() == "told\n"


@pytest.mark.parametrize(("script", "code"), [("false; echo never", 1), ("exit 3", 3), ("kill -9 $$", -9)])
def test_a_script_that_fails_says_how(tmp_path: Path, script: str, code: int) -> None:
    with pytest.raises(SetupError) as caught:
        run_setup(script, cwd=str(tmp_path), env=ENV, log=tmp_path / "log")
    assert caught.value.code == code
    assert "never" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("code", [0, 3])
def test_what_a_script_leaves_running_is_not_waited_for(tmp_path: Path, code: int) -> None:
    began_s, failed = time.monotonic(), pytest.raises(SetupError) if code else nullcontext()
    env = {**ENV, "MESHWRIGHT_RUN_ID": own("left")}
    with failed:
        run_setup(f"sleep 600 &\n[ {code} = 0 ] || exit {code}", cwd=str(tmp_path), env=env, log=tmp_path / "log")
    assert time.monotonic() - began_s < 60
    assert sweep(own("left")) == 1


def test_an_environment_that_is_longer_than_a_pipe_is_handed_on(tmp_path: Path) -> None:
    script = "for each in 1 2 3 4; do export LONG$each=$(head -c 100000 /dev/zero | tr '\\0' x); done"
    found = run_setup(script, cwd=str(tmp_path), env=ENV, log=tmp_path / "log")
    assert [len(found[f"LONG{each}"]) for each in (1, 2, 3, 4)] == [100000] * 4
