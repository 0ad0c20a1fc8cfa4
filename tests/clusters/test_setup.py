"""A setup script hands on its environment, or fails with its own code."""

from pathlib import Path

import pytest

from meshwright.clusters.setup import SetupError, run_setup

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
