"""The command line: messages without tracebacks, and exit codes that mean something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.launch import cli

JOB = "name: j\ncommand: [python, -c, pass]\nsecrets: {TOKEN: {from_env: NOT_SET}}\n"


@pytest.mark.parametrize("words", [["lunch"], ["launch", "--foo"], ["launch", "--dry-run"]])
def test_a_line_that_cannot_be_read_is_64(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 64
    told = capsys.readouterr()
    assert "Usage" in told.err
    assert "Traceback" not in told.err


def test_a_job_that_cannot_be_read_is_65(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("name: j\ncommand: [x]\nnodez: 2\n")
    assert cli.main(["launch", "--dry-run", str(tmp_path / "job.yaml")]) == 65
    told = capsys.readouterr().err
    assert "job.yaml:3:1: nodez" in told
    assert "Traceback" not in told


def test_a_dry_run_needs_no_secrets_writes_nothing_and_ends_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    assert cli.main(["launch", "--dry-run", "--run-id", "r1", "job.yaml"]) == 0
    assert "secret     TOKEN=*** (from_env NOT_SET)" in capsys.readouterr().out
    assert cli.main(["launch", "--dry-run", "--json", "--run-id", "r1", "job.yaml"]) == 0
    assert json.loads(capsys.readouterr().out)["secrets"] == [["TOKEN", "from_env NOT_SET"]]
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_a_bug_is_70_and_its_traceback_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(words: list[str]) -> int:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(cli, "_run", broken)
    assert cli.main(["show"]) == 70
    told = capsys.readouterr().err
    file = Path(told.split("the traceback is in ")[1].split(";")[0])
    assert "Traceback" not in told
    assert "RuntimeError: no such luck" in file.read_text()
    file.unlink()


def test_every_command_has_a_module_with_a_function_of_its_name() -> None:
    from importlib import import_module

    assert all(callable(getattr(import_module(home), name)) for name, home in cli.COMMANDS.items())


def test_the_launcher_never_imports_torch(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    code = (
        "import sys; from meshwright.launch.cli import main\n"
        f"assert main(['launch', '--dry-run', {str(tmp_path / 'job.yaml')!r}]) == 0\n"
        "assert 'torch' not in sys.modules and 'rich.progress' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
