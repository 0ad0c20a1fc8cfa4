"""Jobs in pods of pretended clusters, as tests of the command line write them."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from meshwright.clusters.network import interfaces
from tests.launch.pretend_kubectl import write_kubectl

__all__ = ["PROD", "clusters_at", "pod_job"]

PROD = "arn:aws:eks:eu:1:cluster/prod"


def clusters_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl with two clusters, of which jobs name the one that is not current."""
    if all(address.startswith("127.") for address in interfaces().values()):
        pytest.skip("this machine has no address besides loopback, at which pods could meet")
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("TOKEN", "tok-123")
    return write_kubectl(folder / "bin", "dev", PROD)


def pod_job(folder: Path, code: str, cluster: dict[str, object] | None = None, **more: object) -> Path:
    """A job of two pods, each a rank that runs some Python."""
    told = {
        "name": "j",
        "command": [sys.executable, "-c", code],
        "nodes": 2,
        "nproc_per_node": 1,
        "secrets": {"TOKEN": {"from_env": "TOKEN"}},
        "failure": {"shutdown_grace": "2s"},
        "cluster": {
            **{"type": "kubernetes", "image": "x", "namespace": "train", "secret": "tokens", "python": sys.executable},
            **{"context": PROD, **(cluster or {})},
        },
    }
    kept = {key: value for key, value in {**told, **more}.items() if value is not None}
    (folder / "job.yaml").write_text(yaml.safe_dump(kept))
    return folder / "job.yaml"
