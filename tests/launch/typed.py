"""Commands as a user types them."""

import subprocess
import sys
from pathlib import Path

__all__ = ["begin", "meshwright"]


def begin(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """A command that runs in a folder."""
    argv = [sys.executable, "-m", "meshwright.launch.cli", *words]
    return subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def meshwright(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """One that has ended."""
    process = begin(folder, *words)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(words, process.returncode, out, err)
