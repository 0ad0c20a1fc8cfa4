"""`meshwright page RUN` writes a page of any run; a training leaves one at its end, whatever came of it."""

import json
from pathlib import Path

import pytest

from meshwright.launch import cli
from meshwright.launch.commands.page import page
from meshwright.launch.page import write
from meshwright.launch.page.write import try_to_write_page, write_page
from meshwright.launch.runs import Known, remember
from tests.launch.page.made import write_run
from tests.launch.worker.runs import finish, run_dir, write_job


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_the_command_says_where_the_page_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "r", state="succeeded", reason="", exit_code=0)
    remember(Known("r1", "llama", "local", str(folder), 1.0))
    assert cli.main(["page", "r1"]) == 0
    assert capsys.readouterr().out == f"page: {folder / 'page.html'}\n"
    assert "<h1>llama</h1>" in (folder / "page.html").read_text()
    assert (folder / "page.html").stat().st_mode & 0o077 == 0, "as private as the run"
    assert cli.main(["page", str(folder), "--output", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()


def test_the_page_of_a_run_that_is_not_over_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    remember(Known("r1", "llama", "local", str(folder), 1.0).of_this_process())
    page("r1")
    assert 'class="pill running">running<' in (folder / "page.html").read_text()


def test_metrics_of_another_launcher_have_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    page(str(tmp_path))
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_a_run_that_is_not_known_and_a_place_that_cannot_be_written_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["page", "never"]) == 64
    assert "no run 'never' is known" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert cli.main(["page", str(tmp_path), "--output", str(tmp_path / "no/folder.html")]) == 74
    assert "folder.html cannot be written" in capsys.readouterr().err


def test_a_page_that_cannot_be_made_is_only_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*words: object, **named: object) -> Path:
        raise ValueError("a chart too far")

    monkeypatch.setattr(write, "write_page", fail)
    try_to_write_page(tmp_path)
    assert capsys.readouterr().err == "meshwright: no page.html: ValueError: a chart too far\n"


def test_a_page_is_whole_or_absent(tmp_path: Path) -> None:
    assert write_page(tmp_path) == tmp_path / "page.html"
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text().endswith("</html>\n")


@pytest.mark.slow
def test_a_training_leaves_its_page_with_its_counters_also_when_it_fails(tmp_path: Path) -> None:
    job = write_job(tmp_path, steps=4, every=2)
    code, output = finish(job, "one", "monitor.prometheus_port=0")
    assert code == 0, output
    path = run_dir(job, "one") / "page.html"
    assert f"page: {path}" in output.splitlines()
    assert "metrics for Prometheus: http://127.0.0.1:" in output
    text = path.read_text()
    assert 'aria-label="Loss"' in text
    assert 'aria-label="Loopback"' in text
    code, output = finish(job, "two", "model.arguments={width: wrong}")
    assert code != 0
    assert json.loads((run_dir(job, "two") / "exit.json").read_text())["restarts"] == []
    text = (run_dir(job, "two") / "page.html").read_text()
    assert "No step has been logged." in text
    assert "Traceback" in text
