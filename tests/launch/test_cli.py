"""The command line: messages without tracebacks, and exit codes that mean something."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.clusters import spawn
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


@pytest.mark.parametrize("run_id", ["../up", "", "a b", "\udcff", "-x", "a\nb"])
def test_a_run_id_that_is_no_name_of_a_directory_is_refused(
    run_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    assert cli.main(["launch", str(tmp_path / "job.yaml"), "--dry-run", f"--run-id={run_id}"]) == 64
    assert f"--run-id {run_id!r}: expected a name" in capsys.readouterr().err


def test_a_directory_of_any_bytes_is_printed_as_it_is(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a\udcff"
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    monkeypatch.chdir(folder)
    assert cli.main(["launch", "job.yaml", "--dry-run"]) == 0
    assert b"/a\xff" in capfdbinary.readouterr().out


def test_a_name_cannot_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "\x1b[2J.yaml", "--dry-run"]) == 65
    assert r"\x1b[2J.yaml:1:1: this job file does not exist" in capsys.readouterr().err


def test_a_name_that_no_file_can_have_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["page", "1" * 400]) == 64
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cluster", "more", "kept"),
    [
        ("", [], True),
        ("cluster: {type: local}\n", [], True),
        ("cluster:\n  simulate_nodes: 2\n\n  type: local\n", [], True),
        ("cluster: far\nenv: {A: local}\n", [], False),
        ("cluster:\n  type: ssh\nname: local\n", [], False),
        ("cluster: far\n", ["--set", "cluster.type=local"], True),
        ("", ["--set", "cluster=far"], False),
        ("", ["--set", "cluster=far", "--set", "cluster.type=local"], True),
    ],
)
def test_an_agent_is_kept_warm_where_the_job_will_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str, more: list[str], *, kept: bool
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"name: j\ncommand: [x]\n{cluster}env: {{}}\n")
    started: list[bool] = []
    monkeypatch.setattr(spawn, "keep_warm", lambda: started.append(True))
    monkeypatch.setattr(cli, "_run", lambda words: 0)
    assert cli.main(["launch", str(job), *more]) == 0
    assert bool(started) == kept


def test_a_command_seldom_looks_for_garbage_and_not_at_its_end() -> None:
    program = (
        "import atexit, gc\n"
        "from meshwright.launch import cli\n"
        "def searched(): return sum(each['collections'] for each in gc.get_stats())\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > len(gc.get_objects())))\n"
        "before = searched()\n"
        "cli.main(['ps'])\n"
        "print(searched() - before < 5)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[-2:] == ["True", "True"]


def test_a_job_that_comes_through_a_pipe_is_not_read_before_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "job.yaml")
    started: list[bool] = []
    monkeypatch.setattr(spawn, "keep_warm", lambda: started.append(True))
    monkeypatch.setattr(cli, "_run", lambda words: 0)
    assert cli.main(["launch", str(tmp_path / "job.yaml")]) == 0
    assert started
