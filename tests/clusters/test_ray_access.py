"""Who is let near a Ray cluster."""

import sys
from types import SimpleNamespace

import pytest

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.ray_access import attached


@pytest.mark.parametrize(
    ("version", "refused"), [("2.53.9", True), ("2.9.0", True), ("2.54.0", False), ("3.0.0rc1", False)]
)
def test_a_ray_that_web_pages_could_use_is_refused_at_run_time(
    monkeypatch: pytest.MonkeyPatch, version: str, refused: bool
) -> None:
    ray = SimpleNamespace(__version__=version, is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", ray)
    if not refused:
        assert attached("auto") is ray
        return
    with pytest.raises(UnavailableError, match=f"ray {version} is installed, and versions before 2.54 let web pages"):
        attached("auto")
