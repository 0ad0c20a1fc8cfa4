"""Words of a command reach a rank as they were written; what cannot be is said soon."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from meshwright.clusters.base import Program
from meshwright.clusters.files import StepHandle, step_folder
from meshwright.clusters.prefork import escape
from meshwright.clusters.slurm import plan_slurm
from tests.clusters.test_slurm import OPTIONS, REQUEST

WORD = st.text(st.characters(exclude_characters="\0"), max_size=40)


def test_the_program_starts_itself_once_more_before_it_imports_what_takes_time() -> None:
    program = (
        "import os, runpy, sys\n"
        "def told(*_):\n"
        "    print(*(name for name in sys.modules if name.startswith('meshwright.clusters.')), flush=True)\n"
        "    os._exit(0)\n"
        "os.execve = told\n"
        "runpy.run_module('meshwright.clusters.agent', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["meshwright.clusters.carrying"]


@given(st.lists(WORD | st.sampled_from(["${local_rank}", "$$", "$local_rank", "a b", "'\"", "\n"]), max_size=6))
def test_any_words_survive_the_way_to_torchs_agent(argv: list[str]) -> None:
    from torch.distributed.elastic.utils import macros

    told = json.loads(json.dumps({"argv": argv}))["argv"]
    assert macros.substitute([escape(word) for word in told], "1") == argv


def test_unescaped_words_would_not() -> None:
    from torch.distributed.elastic.utils import macros

    assert macros.substitute(["$$ ${local_rank}"], "1") == ["$ 1"]


def test_a_port_that_is_taken_is_said_before_torch_is_there(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was loaded')\n")
    (tmp_path / "private").mkdir()
    (tmp_path / "logs").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        meeting = replace(REQUEST.meeting, interface="lo", port=taken.getsockname()[1])
        program = Program(argv=("true",), workdir=tmp_path, inherit=("*",))
        request = replace(REQUEST, run_dir=tmp_path, program=program, meeting=meeting)
        handle = StepHandle(plan_slurm(request, OPTIONS), {}, words=["sleep", "600"], warning=lambda asked: None)
        path = os.pathsep.join([str(tmp_path), *sys.path])
        words = [sys.executable, "-m", "meshwright.clusters.agent", str(tmp_path), "NODE"]
        try:
            subprocess.run(words, env={**os.environ, "PYTHONPATH": path, "NODE": "0"}, timeout=60, check=False)
        finally:
            handle.kill()
    lines = (step_folder(tmp_path) / "node-0.jsonl").read_text().splitlines()
    told = json.loads(lines[-1])
    assert told["state"] == "rendezvous_failed", told
    assert f"port {meeting.port} of 127.0.0.1" in told["message"]
