"""Builds the stand-in for NVIDIA's library, and reads GPUs through it as a node does: in a process of its own."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from meshwright.clusters.gpus import GpuReport
from meshwright.clusters.inventory import facts_from

__all__ = ["fake_library", "read", "with_gpus"]

SOURCE = Path(__file__).with_name("fake_nvml.c")


@functools.cache
def fake_library(*flags: str) -> Path:
    """A folder with a libnvidia-ml.so.1 of our own; skips the test, with the reason, where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: what NVML tells cannot be tested without a GPU; apt install gcc")
    folder = Path(tempfile.mkdtemp(prefix="fake-nvml-"))
    words = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)]
    subprocess.run([compiler, *flags, *words], check=True)
    return folder


def with_gpus(story: str, *flags: str) -> dict[str, str]:
    """An environment in which NVML tells a story, such as "gpus=2 1.lost=1"."""
    return {**os.environ, "LD_LIBRARY_PATH": str(fake_library(*flags)), "FAKE_NVML": story}


def read(environment: dict[str, str]) -> GpuReport:
    """What a node with this environment tells of its GPUs."""
    done = subprocess.run(
        [sys.executable, "-m", "meshwright.clusters.inventory", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return facts_from(json.loads(done.stdout)).gpus
