"""The newest metrics for Prometheus: its text format, served on loopback by a thread of rank 0 (opt-in).

The format is "Prometheus text format 0.0.4": https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

import math
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any

from meshwright.launch.spec.job import Job
from meshwright.launch.worker.metrics import MetricsFile

__all__ = ["Endpoint", "exposition", "metrics_of"]

_LOOPBACK = "127.0.0.1"
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_HELP = {
    "step": "Optimizer steps done.",
    "loss": "Training loss of the step logged last, in nats per token.",
    "validation_loss": "Mean loss over held-out text, in nats per token.",
    "tokens": "Tokens read by all ranks since the first step.",
    "tokens_per_s": "Tokens of all ranks per second, since the step logged before.",
    "step_s": "Seconds per step, since the step logged before.",
    "lr": "Learning rate.",
    "gradient_norm": "Norm of the gradient before clipping.",
    "mfu_full": "Model-FLOP utilisation, full attention counted, 0 to 1.",
    "mfu_causal": "Model-FLOP utilisation, causal attention counted, 0 to 1.",
    "time_unix_s": "When the newest record was written, in seconds since 1970.",
}
"""Key of a record -> what it means; every other key stands for itself."""


def exposition(record: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A record of metrics.jsonl in Prometheus's text format; every number in it is a gauge.

    Args:
        record: its numbers, also of blocks such as `experts`; what is no number is left out.
        labels: of every sample.

    >>> print(exposition({"loss": 2.5, "event": "end"}, {"run": "r1"}), end="")
    # HELP meshwright_loss Training loss of the step logged last, in nats per token.
    # TYPE meshwright_loss gauge
    meshwright_loss{run="r1"} 2.5
    """
    told = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    lines = []
    for key, value in _numbers(record):
        name = f"meshwright_{re.sub('[^a-zA-Z0-9_]', '_', key)}"
        lines.append(f"# HELP {name} {_HELP.get(key, f'The key {key} of metrics.jsonl.')}")
        lines.append(f"# TYPE {name} gauge")
        lines.append(f"{name}{{{told}}} {_value(value)}")
    return "".join(f"{line}\n" for line in lines)


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}_{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _value(number: float) -> str:
    if math.isfinite(number):
        return repr(number)
    return "NaN" if math.isnan(number) else "+Inf" if number > 0 else "-Inf"


def _escaped(value: str) -> str:
    r"""A label's value: backslash, quote and line feed are written with a backslash.

    >>> _escaped('a"b\\c')
    'a\\"b\\\\c'
    """
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class _Server(ThreadingTCPServer):
    """http.server's own class asks the name service who 127.0.0.1 is, which may take long."""

    allow_reuse_address = True  # a restarted run finds its port in TIME_WAIT
    daemon_threads = True


class Endpoint:
    """Serves the newest numbers at http://127.0.0.1:PORT/metrics until the process ends, never on another address.

    Args:
        port: 0 takes any free one.
        labels: of every sample.

    Raises:
        OSError: when the port is taken.
    """

    def __init__(self, port: int, labels: Mapping[str, str]) -> None:
        self._newest: dict[str, Any] = {}
        self._server = _Server((_LOOPBACK, port), _handler(lambda: exposition(self._newest, labels)))
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    def hear(self, record: Mapping[str, Any]) -> None:
        """Takes a record in: its keys replace older ones, so that the last validation stays beside the last step."""
        self._newest = {**self._newest, **record}  # a new value, since a request may be reading the old one

    def close(self) -> None:
        """Gives the port back."""
        self._server.shutdown()
        self._server.server_close()


def _handler(text: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers GET /metrics."""

        timeout = 10.0

        def do_GET(self) -> None:  # the name that http.server calls
            """Sends the numbers, or says where they are."""
            found = self.path.partition("?")[0] == "/metrics"
            body = (text() if found else "metrics are at /metrics\n").encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", _CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged: standard output is the run's."""

    return Handler


def metrics_of(job: Job, run_dir: Path, *, rank: int, say: Callable[[str], None]) -> MetricsFile:
    """The metrics file of a rank; with `monitor.prometheus_port`, rank 0 serves what is written to it.

    Args:
        job: that trains.
        run_dir: where the file lies.
        rank: only rank 0 writes.
        say: where lines for people go.
    """
    if rank:
        return MetricsFile(None)
    metrics, port = MetricsFile(run_dir / "metrics.jsonl"), job.monitor.prometheus_port
    if port is None:
        return metrics
    try:
        endpoint = Endpoint(port, _labels(job, run_dir))
    except OSError as error:
        say(
            f"warning: monitor.prometheus_port: port {port} on {_LOOPBACK} cannot be served ({error.strerror}); the "
            "run goes on without; choose another port, or 0 for any"
        )
        return metrics
    metrics.heard = endpoint.hear
    say(f"metrics for Prometheus: http://{_LOOPBACK}:{endpoint.port}/metrics")
    return metrics


def _labels(job: Job, run_dir: Path) -> dict[str, str]:
    """Of every sample: the run, and the host whose counters they are."""
    told = {"run": ("MESHWRIGHT_RUN_ID", run_dir.name), "host": ("MESHWRIGHT_HOST", socket.gethostname())}
    return {"job": job.name, **{label: os.environ.get(name, other) for label, (name, other) in told.items()}}
