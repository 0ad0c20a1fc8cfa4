"""The program that tells what a node is and has."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import pytest

from meshwright.clusters.inventory import facts_from, read_directory, read_node


def test_the_program_prints_one_json_object_that_reads_back(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "meshwright.clusters.inventory", "--json", str(tmp_path / "runs/later")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    facts = facts_from(json.loads(done.stdout))
    assert facts.versions["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}"
    assert facts.versions["torch"] is not None
    assert (facts.python, facts.cores >= 1, facts.memory_bytes is not None) == (sys.executable, True, True)
    (directory,) = facts.directories
    assert directory.error is None
    assert directory.free_bytes is not None
    assert directory.write_bytes_per_s is not None
    assert list(tmp_path.iterdir()) == []


def test_looking_at_a_node_imports_no_torch() -> None:
    code = (
        "import sys; from meshwright.clusters import inventory; inventory.read_node(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_place_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = read_directory(str(tmp_path / "file"))
    assert (found.free_bytes, found.write_bytes_per_s) == (None, None)
    assert found.error == f"Not a directory ({tmp_path / 'file'})"


def test_the_bytes_that_time_a_disk_are_no_part_of_the_time_and_cannot_be_made_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(count: int) -> bytes:
        time.sleep(1.0)
        return random.randbytes(count)

    monkeypatch.setattr(os, "urandom", slow)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: (tmp_path / "kept").open("w+b"))
    start_s = time.monotonic()
    found = read_directory(str(tmp_path), 12 << 20)
    assert found.write_bytes_per_s is not None
    assert (12 << 20) / found.write_bytes_per_s < time.monotonic() - start_s - 0.9
    written = (tmp_path / "kept").read_bytes()
    assert len(written) == (12 << 20) + 1
    assert len(zlib.compress(written, 1)) > 0.99 * len(written)
    blocks = [written[first : first + 4096] for first in range(0, 12 << 20, 4096)]
    assert len({*blocks}) == len(blocks), "a disk that keeps equal blocks once keeps all of these"


def test_what_another_version_tells_is_refused() -> None:
    told = read_node().as_dict()
    del told["gpus"]
    with pytest.raises(ValueError, match="gpus"):
        facts_from(told)
