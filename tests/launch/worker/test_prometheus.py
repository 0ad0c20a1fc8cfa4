"""The newest metrics are served in Prometheus's text format, on loopback only."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from meshwright.launch.load import load_job
from meshwright.launch.worker.prometheus import Endpoint, exposition, metrics_of

LINE = re.compile(r'meshwright_[a-zA-Z0-9_]+\{job="(?:[^"\\\n]|\\["\\n])*",run="r"\} (?:NaN|[+-]Inf|-?[0-9].*)')


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint(0, {"job": "j", "run": "r"})
    yield made
    made.close()


def scrape(port: int, path: str = "/metrics") -> str:
    with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return str(answer.read().decode())


def test_the_newest_step_and_the_last_validation_are_served_together(endpoint: Endpoint) -> None:
    assert scrape(endpoint.port) == ""
    endpoint.hear({"step": 4, "validation_loss": 3.0})
    endpoint.hear({"step": 5, "loss": 2.0, "tokens_per_s": 10.5})
    endpoint.hear({"step": 6, "loss": 1.5, "experts": {"worst_expert_ratio": 1.25}})
    text = scrape(endpoint.port, "/metrics?x=1")
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    labels = '{job="j",run="r"}'
    assert samples == {
        f"meshwright_step{labels}": "6",
        f"meshwright_validation_loss{labels}": "3.0",
        f"meshwright_loss{labels}": "1.5",
        f"meshwright_tokens_per_s{labels}": "10.5",
        f"meshwright_experts_worst_expert_ratio{labels}": "1.25",
    }


def test_every_sample_has_help_and_type_and_a_legal_name_and_value() -> None:
    record = {"loss": float("nan"), "lr": 1e-05, "a b": -float("inf"), "event": "end", "norm": None, "ok": True}
    *lines, end = exposition({**record, "collectives": [{"calls": 2}]}, {"job": 'a"b\\c\nd', "run": "r"}).split("\n")
    assert end == "", "the last line ends too"
    assert len(lines) == 9, "three numbers of three lines each"
    for help_line, type_line, sample in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        name = sample.partition("{")[0]
        assert help_line.startswith(f"# HELP {name} ")
        assert type_line == f"# TYPE {name} gauge"
        assert LINE.fullmatch(sample), sample
    assert [line.rpartition(" ")[2] for line in lines[2::3]] == ["NaN", "1e-05", "-Inf"]


def test_only_metrics_are_served_and_only_on_loopback(endpoint: Endpoint) -> None:
    with pytest.raises(HTTPError, match="404"):
        scrape(endpoint.port, "/etc/passwd")
    sockets = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [words[1] for words in sockets if words[3] == "0A" and words[1].endswith(f":{endpoint.port:04X}")]
    assert listening == [f"0100007F:{endpoint.port:04X}"]


def job(tmp_path: Path, port: int | None) -> Path:
    file = tmp_path / "job.yaml"
    (tmp_path / "a.txt").write_text("text\n")
    monitor = "" if port is None else f"monitor: {{prometheus_port: {port}}}\n"
    model = "model: {python: 'a:b'}\ndata: {files: [a.txt], sequence_length: 8}\n"
    file.write_text(f"name: j\n{model}train: {{steps: 1, batch_size: 1, optimizer: {{lr: 1}}}}\n{monitor}")
    return file


def test_a_run_says_where_it_is_served_and_serves_what_it_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_RUN_ID", "r1")
    monkeypatch.setenv("MESHWRIGHT_HOST", "gpu01")
    said: list[str] = []
    metrics = metrics_of(load_job(job(tmp_path, 0)).job, tmp_path, rank=0, say=said.append)
    metrics.write({"step": 1, "loss": 2.5})
    (line,) = said
    assert re.fullmatch(r"metrics for Prometheus: http://127\.0\.0\.1:[0-9]+/metrics", line)
    served = scrape(int(line.split(":")[-1].partition("/")[0]))
    assert 'meshwright_loss{job="j",run="r1",host="gpu01"} 2.5' in served


def test_a_port_that_is_taken_is_a_warning_and_metrics_go_to_their_file(tmp_path: Path) -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        metrics = metrics_of(load_job(job(tmp_path, port)).job, tmp_path, rank=0, say=said.append)
    metrics.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step":1}\n'
    assert said[0].startswith(f"warning: monitor.prometheus_port: port {port} on 127.0.0.1 cannot be served (Address")


@pytest.mark.parametrize(("port", "rank"), [(None, 0), (0, 1)])
def test_nothing_is_served_unasked_or_by_another_rank(tmp_path: Path, port: int | None, rank: int) -> None:
    said: list[str] = []
    metrics = metrics_of(load_job(job(tmp_path, port)).job, tmp_path, rank=rank, say=said.append)
    assert (said, metrics.heard, metrics.path is None) == ([], None, rank != 0)
