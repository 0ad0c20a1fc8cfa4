"""A fork shows variables of its own in /proc, by which a sweep finds it; nothing else of it changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

_PROGRAM = """
import ctypes, os, sys
from meshwright.clusters.carrying import make_room, show
make_room()
assert "MESHWRIGHT_ROOM" not in os.environ
before = dict(os.environ)
ready, done = os.pipe(), os.pipe()
if not (child := os.fork()):
    shown = show({"MESHWRIGHT_RUN_ID": sys.argv[1], "RANK": "3"})
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    same = all(libc.getenv(os.fsencode(name)) == os.fsencode(value) for name, value in before.items())
    os.write(ready[1], b"shown" if shown and same and os.environ == before else b"no")
    os.read(done[0], 1)
    os._exit(0)
answer = os.read(ready[0], 5)
words = [open(f"/proc/{pid}/environ", "rb").read().split(b"\\0") for pid in (child, os.getpid())]
os.write(done[1], b".")
os.waitpid(child, 0)
wanted = {b"MESHWRIGHT_RUN_ID=" + os.fsencode(sys.argv[1]), b"RANK=3"}
print(answer.decode(), wanted <= {*words[0]}, wanted & {*words[1]} == set(), sys.argv[2:])
"""


def _run(program: str, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FIRST": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_fork_shows_what_it_was_told_to_and_its_variables_stay() -> None:
    assert _run(_PROGRAM, "run-ü 1", "a b", "$c") == "shown True True ['a b', '$c']"


def test_what_does_not_fit_is_not_shown() -> None:
    assert _run(_PROGRAM, "x" * 2000).startswith("no False")


def test_a_process_without_room_shows_nothing(tmp_path: Path) -> None:
    assert _run("from meshwright.clusters.carrying import show; print(show({'A': 'b'}))") == "False"
