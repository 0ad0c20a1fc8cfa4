"""What the tests of this folder share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.launch.errors import JobError
from meshwright.launch.load import load_job


@pytest.fixture
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this test's launches are written down, apart from those of other tests."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., list[str]]:
    """Loads a job text that must be refused; gives the lines of the error, without the folder's name."""

    def load(text: str | bytes, *overrides: str) -> list[str]:
        file = tmp_path / "job.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(JobError) as caught:
            load_job(file, overrides)
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return load
